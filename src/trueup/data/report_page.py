"""The data report as a page: what became of every row, and how long the rows are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from trueup.data.page import page

_BINS = 40
_WIDTH, _HEIGHT = 480, 90  # of a histogram, in pixels


def report_page(report: Mapping[str, Any], lengths: Mapping[str, Mapping[int, int]]) -> str:
    """A page of `DataReport.to_dict()`; `lengths` tells by part how many rows have how many tokens."""
    return page("Data report", "\n".join(_parts(report, lengths)))


def _parts(report: Mapping[str, Any], lengths: Mapping[str, Mapping[int, int]]) -> Iterator[str]:
    yield table(("dataset", ">rows", ">read", ">kept", ">dropped"), [_dataset(*item) for item in _datasets(report)])
    if report["splits"]:
        yield "<p>" + ", ".join(f"{escape(name)} {count:,}" for name, count in report["splits"].items()) + "</p>"
    for title, key in (("Left out", "dropped"), ("Cut", "truncated")):
        losses = [_loss(name, what, rows) for name, d in _datasets(report) for what, rows in d[key].items()]
        if losses:
            yield f"<h2>{title}</h2>" + table(("dataset", "what", ">rows", "which", "the first"), losses)
    findings = [
        _finding(words, report[key])
        for key, words in (
            ("duplicates", "duplicate rows"),
            ("reversed_pairs", "pairs whose reverse is there too"),
            ("train_eval_overlap", "evaluation rows whose prompt is trained on"),
        )
        if report[key]["count"]
    ]
    findings += [
        f"{escape(name)}: " + ", ".join(f"{count:,} {escape(label)}" for label, count in d["labels"].items())
        for name, d in _datasets(report)
        if d["labels"]
    ]
    findings += [escape(note) for note in report["notes"]]
    if findings:
        yield "<h2>Findings</h2><ul>" + "".join(f"<li>{finding}</li>" for finding in findings) + "</ul>"
    if lengths:
        yield "<h2>Tokens</h2>" + table(("part", ">p50", ">p95", ">max", ">mean"), _statistics(report["tokens"]))
        yield from (f"<h3>{escape(part)}</h3>{histogram(counts)}" for part, counts in lengths.items())


def _datasets(report: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return list(report["datasets"].items())


def _dataset(name: str, d: Mapping[str, Any]) -> tuple[Any, ...]:
    dropped = sum(rows["count"] for rows in d["dropped"].values())
    return name, d["available"], d["read"], d["kept"], dropped


def _loss(name: str, what: str, rows: Mapping[str, Any]) -> tuple[Any, ...]:
    more = " …" if rows["count"] > len(rows["rows"]) else ""
    ids = ", ".join(row.rpartition(":")[2] for row in rows["rows"]) + more
    return name, what, rows["count"], ids, rows["excerpt"]


def _finding(words: str, rows: Mapping[str, Any]) -> str:
    return escape(f"{rows['count']:,} {words}: {', '.join(rows['rows'][:8])} ({rows['excerpt']})")


def _statistics(tokens: Mapping[str, Mapping[str, float]]) -> list[tuple[Any, ...]]:
    return [(part, *(round(stats[key]) for key in ("p50", "p95", "max", "mean"))) for part, stats in tokens.items()]


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table; a header that begins with `>` stands above numbers."""
    kinds = [' class="number"' if header.startswith(">") else "" for header in headers]
    head = "".join(f"<th{k}>{escape(h.lstrip('>'))}</th>" for h, k in zip(headers, kinds, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{k}>{_cell(value)}</td>" for value, k in zip(row, kinds, strict=True)) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else escape(str(value))


def histogram(rows_of_length: Mapping[int, int]) -> str:
    """Bars of how many rows have how many tokens, as SVG."""
    counts, edges = np.histogram(
        list(rows_of_length), bins=min(_BINS, len(rows_of_length)), weights=list(rows_of_length.values())
    )
    step, top = _WIDTH / len(counts), max(int(counts.max()), 1)
    bars = "".join(
        f'<rect x="{i * step:.1f}" y="{_HEIGHT - count / top * _HEIGHT:.1f}" width="{max(step - 1, 1):.1f}" '
        f'height="{count / top * _HEIGHT:.1f}" fill="currentColor"><title>{edges[i]:.0f}–{edges[i + 1]:.0f} tokens: '
        f"{count:,.0f} rows</title></rect>"
        for i, count in enumerate(counts)
    )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT + 16}" width="{_WIDTH}" role="img">{bars}'
        f'<text x="0" y="{_HEIGHT + 13}" font-size="11" fill="currentColor">{edges[0]:,.0f}</text>'
        f'<text x="{_WIDTH}" y="{_HEIGHT + 13}" font-size="11" text-anchor="end" fill="currentColor">'
        f"{edges[-1]:,.0f} tokens</text></svg>"
    )
