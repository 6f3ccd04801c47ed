"""The data report on a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text as RichText

from trueup.data.counts import largest, number, some_indices, sparkline, statistics

if TYPE_CHECKING:
    from trueup.data.report import DataReport, DatasetReport


def report_text(report: DataReport) -> RenderableType:
    """Tables of rows, losses and lengths, then what is worth a sentence."""
    datasets = list(report.datasets.values())
    parts: list[RenderableType] = [_datasets(report)]
    if any(d.dropped for d in datasets):
        parts.append(_losses(datasets))
    if any(d.truncated for d in datasets):
        parts.append(_cuts(datasets))
    if any(d.lengths for d in datasets):
        parts.append(_lengths(report))
    remarks = [RichText(f"• {line}") for line in _facts(report)]
    remarks += [RichText(f"• {line}", style="yellow") for line in _findings(report) if not report.was_heard(line)]
    remarks += [RichText(f"• {note}", style="dim") for note in report.notes if not report.was_heard(note)]
    if remarks:
        parts.append(Group(*remarks))
    return Group(*(Padding(part, (0, 0, 1, 0)) for part in parts))


def _datasets(report: DataReport) -> Table:
    table = _table("dataset", *(">" + h for h in ("rows", "read", "kept", "dropped", "cut")))
    for d in report.datasets.values():
        table.add_row(
            RichText(d.name),
            *(number(n) for n in (d.available, d.read, d.kept)),
            _flag(d.num_dropped),
            _flag(d.cut),
        )
    if report.splits:
        table.caption = "  ".join(f"{name} {number(n)}" for name, n in report.splits.items())
        table.caption_justify = "left"
    return table


def _losses(datasets: list[DatasetReport]) -> Table:
    table = _table("dropped", ">rows", "which", "first")
    for d in datasets:
        for reason, rows in largest(d.dropped):
            # As Text, because what data say is never markup.
            cells = (_of(d, reason, datasets), number(rows.count), some_indices(rows), rows.excerpt)
            table.add_row(*map(RichText, cells))
    which, first = table.columns[2:]
    which.no_wrap = first.no_wrap = True
    first.overflow, first.ratio, table.expand = "ellipsis", 1, True
    return table


def _cuts(datasets: list[DatasetReport]) -> Table:
    table = _table("cut to cutoff_len", ">rows", "which")
    for d in datasets:
        for part, rows in largest(d.truncated):
            table.add_row(*map(RichText, (_of(d, part, datasets), number(rows.count), some_indices(rows))))
    table.caption, table.caption_justify = "no question is ever cut", "left"
    return table


def _lengths(report: DataReport) -> RenderableType:
    table = _table("tokens", ">p50", ">p95", ">max", ">mean", "")
    measured = [d for d in report.datasets.values() if d.lengths]
    for d in measured:
        for part, counts in d.lengths.items():
            cells = (number(round(value)) for value in statistics(counts).values())
            table.add_row(RichText(_of(d, part, measured)), *cells, sparkline(counts))
    return Group(table, RichText(_epoch(report.epoch_tokens))) if report.epoch_tokens else table


def _epoch(tokens: dict[str, int]) -> str:
    """The layouts from the best to the worst, where they differ."""
    padded, separate, shared = (tokens[layout] for layout in ("padded", "separate", "shared"))
    unshared = f"{number(separate)} without shared prompts, " if separate > shared else ""
    return f"an epoch: {number(shared)} tokens ({unshared}{number(padded)} padded)"


def _of(d: DatasetReport, what: str, among: list[DatasetReport]) -> str:
    return what if len(among) == 1 else f"{d.name}: {what}"


def _facts(report: DataReport) -> Iterator[str]:
    for d in report.datasets.values():
        if d.labels:
            yield f"{d.name}: " + ", ".join(f"{number(n)} {label}" for label, n in d.labels.most_common())
        if d.sides.pairs and not any(d.sides.findings()):
            yield f"{d.name}: {d.sides.in_words()}"


def _findings(report: DataReport) -> Iterator[str]:
    yield from report.repetitions()
    for d in report.datasets.values():
        yield from (f"{d.name}: {finding}" for finding in d.findings())


def _table(*headers: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", show_edge=False)
    for header in headers:
        right = header.startswith(">")
        table.add_column(header.lstrip(">"), justify="right" if right else "left", no_wrap=right, overflow="fold")
    return table


def _flag(count: int) -> RichText:
    return RichText(number(count), style="yellow" if count else "dim")
