"""Reports of evaluations and exports, read from their files as tables of text. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trueup.training import durable

Word = Callable[[str], str]
#: figures that are shares, which are drawn beside each other.
SHARES = ("accuracy", "accuracy_equal_length", "longer_wins")
_MOST_ANSWERS = 12


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval."""

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, kept: Mapping[str, Any]) -> Interval | None:
        """From a report; None where a figure is not finite."""
        value = kept.get("value")
        return None if value is None else cls(float(value), kept.get("low"), kept.get("high"))

    def shown(self, sign: str = "") -> str:
        ends = "" if self.low is None or self.high is None else f" [{short(self.low)}, {short(self.high)}]"
        return f"{short(self.value, sign)}{ends}"


@dataclass
class Evaluation:
    """What an evaluation found. `asked`: the first prompts, with every model's answer."""

    models: list[str]
    kept: dict[str, Any]
    asked: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> Evaluation:
        """Raises OSError, ValueError, KeyError for what is no report."""
        kept = durable.read_json(folder / "eval_report.json")
        return cls([str(model["name"]) for model in kept["models"]], kept, _answers(folder / "eval_answers.jsonl"))

    def figures(self, part: str = "figures") -> dict[str, list[Interval | None]]:
        """Figure → its value for each model, in the report's order."""
        names = dict.fromkeys(name for model in self.kept["models"] for name in model.get(part, {}))
        return {
            name: [Interval.of(model.get(part, {}).get(name, {})) for model in self.kept["models"]] for name in names
        }

    def differences(self) -> Iterator[tuple[str, str, Interval]]:
        """(model, figure, how much more than the first model's, row by row)."""
        for model, figures in self.kept.get("differences_to_the_first", {}).items():
            for name, kept in figures.items():
                if found := Interval.of(kept):
                    yield model, name, found

    def duels(self) -> Iterator[tuple[str, Interval, Interval | None, tuple[int, int, int]]]:
        """(model, win rate, the same with length taken out, (won, tied, lost)) against the first model."""
        for model, kept in self.kept.get("against_the_first", {}).items():
            if rate := Interval.of(kept["win_rate"]):
                equal = Interval.of(kept.get("win_rate_equal_length") or {})
                yield model, rate, equal, (int(kept["wins"]), int(kept["ties"]), int(kept["losses"]))

    def facts(self) -> Iterator[tuple[str, str]]:
        """(word, value) of what every figure stands on."""
        data = self.kept.get("data", {})
        rows = sum(data.get("rows", {}).values())
        yield "data", ", ".join(data.get("datasets", [])) or "–"
        if rows:
            yield "rows", f"{rows:,}"
        if self.kept.get("reference"):
            yield "reference", str(self.kept["reference"])
        for name, value in self.kept.get("settings", {}).items():
            yield name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)

    def notes(self) -> Sequence[str]:
        return [str(note) for note in self.kept.get("notes", [])]


def _answers(path: Path) -> list[dict[str, Any]]:
    found = []
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                found.append(json.loads(line))
                if len(found) == _MOST_ANSWERS:
                    break
    except (OSError, ValueError):
        return found
    return found


def short(value: float, sign: str = "") -> str:
    """A figure in four digits."""
    text = f"{value:{sign},.0f}" if abs(value) >= 10_000 else f"{value:{sign}.4g}"
    return text.replace("-", "−")
