"""`trueup data stats`: how long the parts of rows are, how labels and sides are balanced."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from trueup.data.balance import Sides, label_findings
from trueup.data.counts import counted, number, sparkline
from trueup.data.examples import Chat, Example, Feedback, Messages, Pair, Prompt, Ranking, Text

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True, slots=True)
class DatasetStats:
    """One dataset's numbers; lengths are in `unit`."""

    name: str
    kind: str
    rows: int
    usable: int
    unit: str
    lengths: dict[str, list[int]]  # part → its length in each row
    turns: Counter[int] = field(default_factory=Counter)  # messages before the answer → rows
    labels: Counter[str] = field(default_factory=Counter)
    answers: Counter[int] = field(default_factory=Counter)  # answers of a ranking → rows

    def statistics(self) -> dict[str, dict[str, float]]:
        """part → mean, p5, p50, p95, max."""
        return {
            part: {
                "mean": float(np.mean(values)),
                **{f"p{q}": float(np.percentile(values, q)) for q in (5, 50, 95)},
                "max": max(values),
            }
            for part, values in self.lengths.items()
        }

    def sides(self) -> Sides | None:
        """How much longer chosen answers are: of the means, and in which share of the pairs."""
        if "chosen" not in self.lengths:
            return None
        sides = Sides()
        for chosen, rejected in zip(self.lengths["chosen"], self.lengths["rejected"], strict=True):
            sides.add(chosen, rejected)
        return sides

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": self.kind,
            "rows": self.rows,
            "usable": self.usable,
            "unit": self.unit,
            "lengths": self.statistics(),
            "sides": sides.to_dict() if (sides := self.sides()) else None,
            "labels": dict(self.labels),
            "turns": dict(sorted(self.turns.items())),
            "answers": dict(sorted(self.answers.items())),
            "findings": list(self.findings()),
        }

    def findings(self) -> Iterator[str]:
        """What a user should know before training on it, a sentence each."""
        if sides := self.sides():
            yield from sides.findings()
        if self.labels:
            yield from label_findings(self.labels)


@dataclass(frozen=True, slots=True)
class Stats:
    """The numbers of several datasets."""

    datasets: list[DatasetStats]

    def to_dict(self) -> dict[str, Any]:
        return {"datasets": [dataset.to_dict() for dataset in self.datasets]}

    def __rich__(self) -> RenderableType:
        from rich.console import Group

        return Group(*(part for dataset in self.datasets for part in _render(dataset)))


def measure(examples: Iterable[Example]) -> tuple[dict[str, list[int]], dict[str, Counter]]:
    """Characters of each part of each example, and counts of turns, labels and answers."""
    lengths: dict[str, list[int]] = defaultdict(list)
    counts: dict[str, Counter] = {"turns": Counter(), "labels": Counter(), "answers": Counter()}
    for example in examples:
        for part, text in _parts(example):
            lengths[part].append(text)
        if not isinstance(example, Text):
            counts["turns"][sum(message.role != "system" for message in _prompt(example))] += 1
        if isinstance(example, Feedback):
            counts["labels"]["desirable" if example.desirable else "undesirable"] += 1
        if isinstance(example, Ranking):
            counts["answers"][len(example.answers)] += 1
    return dict(lengths), counts


def _prompt(example: Chat | Prompt | Pair | Ranking | Feedback) -> Messages:
    if isinstance(example, Chat):
        return example.messages[:-1]
    return example.messages if isinstance(example, Prompt) else example.prompt


def _parts(example: Example) -> Iterator[tuple[str, int]]:
    match example:
        case Text():
            yield "text", len(example.text)
        case Chat(messages):
            yield "prompt", _size(messages[:-1])
            yield "answer", _size(messages[-1:])
        case Prompt(messages):
            yield "prompt", _size(messages)
        case Pair():
            yield "prompt", _size(example.prompt)
            yield "chosen", _size(example.chosen)
            yield "rejected", _size(example.rejected)
        case Ranking():
            yield "prompt", _size(example.prompt)
            yield "best", _size(example.answers[0])
            yield "worst", _size(example.answers[-1])
        case Feedback():
            yield "prompt", _size(example.prompt)
            yield "answer", _size(example.answer)


def _size(messages: Messages) -> int:
    return sum(len(message.content) for message in messages)


def _render(dataset: DatasetStats) -> Iterator[RenderableType]:
    from rich.table import Table
    from rich.text import Text as RichText

    left_out = dataset.rows - dataset.usable
    rows = counted(dataset.rows, "row", "rows") + (f", {number(left_out)} unusable" if left_out else "")
    yield RichText(f"{dataset.name}  {dataset.kind}, {rows}", style="bold")
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(dataset.unit)
    for name in ("mean", "p5", "p50", "p95", "max"):
        table.add_column(name, justify="right")
    table.add_column("")
    for part, values in dataset.statistics().items():
        cells = (number(round(values[key])) for key in ("mean", "p5", "p50", "p95", "max"))
        table.add_row(part, *cells, sparkline(Counter(dataset.lengths[part])))
    yield table
    yield from (RichText(line) for line in _balance_lines(dataset))
    yield from (RichText(f"• {finding}", style="yellow") for finding in dataset.findings())
    yield RichText()


def _balance_lines(dataset: DatasetStats) -> Iterator[str]:
    if (sides := dataset.sides()) and not any(sides.findings()):
        yield sides.in_words()
    if dataset.labels:
        yield ", ".join(f"{number(count)} {label}" for label, count in dataset.labels.most_common())
    if len(dataset.answers) > 1:
        yield "answers in a row: " + ", ".join(f"{n} × {number(count)}" for n, count in sorted(dataset.answers.items()))
    several = sum(count for turns, count in dataset.turns.items() if turns > 1)
    if several:
        yield f"{counted(several, 'row', 'rows')} of several turns, at most {max(dataset.turns)} before the answer"
