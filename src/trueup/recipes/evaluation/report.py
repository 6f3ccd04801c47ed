"""The report of an evaluation: what was measured on what, and all figures of all models in one table."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trueup import __version__
from trueup.recipes.evaluation.intervals import Bootstrap, Estimate, shown

#: figure → what it is, in the order of the report. Figures that are not here come after these.
LABELS: dict[str, str] = {
    "accuracy": "preference accuracy (ties ½)",
    "accuracy_equal_length": "… with length taken out",
    "longer_wins": "the longer answer wins",
    "margin": "reward margin",
    "loss": "preference loss",
    "perplexity": "perplexity of the data's answers",
    "kl": "KL to the reference, nats a token",
    "entropy": "entropy, nats a token",
    "score": "score of its answers",
    "answers/tokens": "tokens of its answers",
    "answers/cut_off": "answers cut off",
    "answers/distinct_1": "different words (distinct-1)",
    "answers/distinct_2": "different pairs of words (distinct-2)",
    "answers/repetition": "4-grams said again",
    "answers/refusals": "refusals",
    "answers/bleu-4": "BLEU-4 of characters",
    "answers/rouge-1": "ROUGE-1",
    "answers/rouge-2": "ROUGE-2",
    "answers/rouge-l": "ROUGE-L",
}


@dataclass
class Measured:
    """One model's figures; `rows`: the values behind them, row by row, where the rows are all there.

    `groups`: preference accuracy by the values of a column; `tasks`: metrics of lm-evaluation-harness.
    """

    name: str
    identity: dict[str, Any]
    figures: dict[str, Estimate] = field(default_factory=dict)
    rows: dict[str, np.ndarray] = field(default_factory=dict)
    ids: dict[str, Sequence[str]] = field(default_factory=dict)  # figure → the rows that it is of
    groups: dict[str, Estimate] = field(default_factory=dict)
    tasks: dict[str, Estimate] = field(default_factory=dict)
    template: dict[str, str] = field(default_factory=dict)
    data_fingerprint: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            **self.identity,
            "figures": {name: value.to_dict() for name, value in ordered(self.figures)},
            "groups": {name: value.to_dict() for name, value in self.groups.items()},
            "tasks": {name: value.to_dict() for name, value in self.tasks.items()},
            "template": self.template,
            "data_fingerprint": self.data_fingerprint,
        }


def ordered(figures: dict[str, Estimate]) -> list[tuple[str, Estimate]]:
    """Figures in the order of `LABELS`."""
    places = {name: place for place, name in enumerate(LABELS)}
    last = len(places)
    return sorted(figures.items(), key=lambda item: places.get(item[0], places.get(item[0].partition("/")[0], last)))


@dataclass
class EvaluationReport:
    """All that was found. `duels`: model → how it did against the first. Printed, and written as three files."""

    output: str
    models: list[Measured]
    reference: str | None
    data: dict[str, Any]
    settings: dict[str, Any]
    duels: dict[str, dict[str, Any]] = field(default_factory=dict)
    judged_by: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    differences: dict[str, dict[str, Estimate]] = field(default_factory=dict)

    def compare(self, boot: Bootstrap) -> None:
        """Each model less the first, row by row, where both were measured on the same rows."""
        first, *others = self.models
        for other in others:
            found = {}
            for name, values in other.rows.items():
                if name in first.rows and list(first.ids.get(name, ())) == list(other.ids.get(name, ())):
                    found[name] = boot.mean(values - first.rows[name])
            self.differences[other.name] = found

    def to_dict(self) -> dict[str, Any]:
        return {
            "trueup": __version__,
            "output": self.output,
            "reference": self.reference,
            "data": self.data,
            "settings": self.settings,
            "models": [model.to_dict() for model in self.models],
            "differences_to_the_first": {
                name: {key: value.to_dict() for key, value in ordered(figures)}
                for name, figures in self.differences.items()
            },
            "against_the_first": {name: _plain(duel) for name, duel in self.duels.items()},
            "judged_by": self.judged_by,
            "notes": self.notes,
        }

    # --- as tables: (title, header, rows) --------------------------------------------------------

    def tables(self) -> Iterator[tuple[str, list[str], list[list[str]]]]:
        """Everything as tables of text, for the terminal, Markdown and HTML alike."""
        names = [model.name for model in self.models]
        yield "Figures", ["", *names], self._rows([model.figures for model in self.models])
        if any(self.differences.values()):
            rows = [
                [label_of(key), other, _signed(value), _verdict(value)]
                for other, figures in self.differences.items()
                for key, value in ordered(figures)
            ]
            yield f"Less {names[0]}, row by row", ["", "model", "difference [95 %]", ""], rows
        if self.duels:
            rows = [
                [name, str(d["win_rate"]), str(d["win_rate_equal_length"]),
                 f"{d['wins']} / {d['ties']} / {d['losses']}", str(d["undecided"])]
                for name, d in self.duels.items()
            ]  # fmt: skip
            head = ["model", "win rate [95 %]", "with length taken out", "won / tied / lost", "undecided"]
            yield f"Answers against those of {names[0]}", head, rows
        for title, part in (("By group", "groups"), ("Tasks", "tasks")):
            values = [getattr(model, part) for model in self.models]
            if any(values):
                yield title, ["", *names], self._rows(values, plain=True)

    def _rows(self, figures: Sequence[dict[str, Estimate]], plain: bool = False) -> list[list[str]]:
        every = dict.fromkeys(name for part in figures for name in part)
        keys = list(every) if plain else [name for name, _ in ordered({k: _NONE for k in every})]
        return [
            [key if plain else label_of(key), *(str(part[key]) if key in part else "–" for part in figures)]
            for key in keys
        ]

    def facts(self) -> list[str]:
        """What every figure stands on."""
        rows = ", ".join(f"{name} {count:,}" for name, count in self.data.get("rows", {}).items())
        facts = [f"data: {', '.join(self.data.get('datasets', [])) or 'none'}" + (f" ({rows} rows)" if rows else "")]
        if self.reference:
            facts.append(f"reference: {self.reference}")
        facts += [f"{name}: {_word(value)}" for name, value in self.settings.items()]
        if self.judged_by:
            facts.append("judged by: " + ", ".join(f"{k} {_word(v)}" for k, v in self.judged_by.items()))
        return facts + self.notes

    def markdown(self) -> str:
        """The report as Markdown."""
        parts = ["# Evaluation", "", *(f"- {fact}" for fact in self.facts())]
        for title, head, rows in self.tables():
            parts += ["", f"## {title}", "", _line(head), _line(["---"] * len(head)), *map(_line, rows)]
        return "\n".join([*parts, "", INTERVALS, ""])

    def render(self, width: int | None = None) -> str:
        """The report for a terminal; models that do not fit beside each other follow below each other."""
        width = width or shutil.get_terminal_size((100, 24)).columns
        names = [model.name for model in self.models]
        parts = []
        for title, head, rows in self.tables():
            cells = [[title, *head[1:]], *rows]
            parts += map(aligned, folded(cells, width) if head[1:] == names else [cells])
        parts.append(f"wrote {self.output}")
        return "\n\n".join(parts)


INTERVALS = (
    "In brackets: 95 % intervals by the bootstrap over rows (percentiles; Wilson's where all rows agree): how "
    "much the figure depends on the rows that were drawn, not on a judge's or the data's own faults."
)
_NONE = Estimate(math.nan, None, None, 0)


def label_of(key: str) -> str:
    """A figure in words."""
    return LABELS.get(key) or (f"score by {key.removeprefix('score/')}" if key.startswith("score/") else key)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def folded(rows: Sequence[Sequence[str]], width: int) -> list[list[list[str]]]:
    """A table as several of the width, or of one column beside the first."""
    widths = [max(len(row[i]) for row in rows) + 2 for i in range(len(rows[0]))]
    groups: list[list[int]] = []
    for i in range(1, len(widths)):
        fits = groups and widths[0] + sum(widths[j] for j in [*groups[-1], i]) - 2 <= width
        if fits:
            groups[-1].append(i)
        else:
            groups.append([i])
    return [[[row[0], *(row[i] for i in group)] for row in rows] for group in groups]


def _signed(value: Estimate) -> str:
    ends = f" [{shown(value.low)}, {shown(value.high)}]" if value.low is not None else ""
    return f"{value.value:+.4g}{ends}"


def _verdict(value: Estimate) -> str:
    if value.low is None or value.high is None:
        return ""
    return "higher" if value.low > 0 else "lower" if value.high < 0 else "no difference seen"


def _plain(duel: dict[str, Any]) -> dict[str, Any]:
    return {key: value.to_dict() if isinstance(value, Estimate) else value for key, value in duel.items()}


def _word(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
