"""Histograms of lengths as SVG that grows and shrinks with the page; several drawn over each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from trueup.data.counts import percentile

_MOST_BINS = 40
_ROUND = (1, 2, 5)
_TOP = 100  # of the drawing's own units; CSS says how high it is


@dataclass(frozen=True, slots=True)
class Histogram:
    """Rows by length in bins of a round width; what is longer than nearly all others is in the last bin."""

    width: int  # tokens of a bin
    counts: np.ndarray  # [series, bins]
    has_longer: bool  # the last bin holds rows beyond its end

    @classmethod
    def of(cls, series: Sequence[Mapping[int, int]]) -> Histogram:
        """Of each series, how many rows have so many tokens. The 99.5th percentile is still inside."""
        top = max(1, *(int(percentile(counts, 0.995)) for counts in series))
        width = next(w for w in _round_numbers() if top < w * _MOST_BINS)
        bins = top // width + 1
        counts = np.zeros((len(series), bins), dtype=np.int64)
        for row, lengths in enumerate(series):
            for length, rows in lengths.items():
                counts[row, min(length // width, bins - 1)] += rows
        return cls(width, counts, max(map(max, series)) >= bins * width)

    def svg(self, names: Sequence[str], colours: Sequence[str], limit: int | None = None) -> str:
        """The drawing with its axis; `limit` is marked by a line where it lies inside."""
        bins = self.counts.shape[1]
        heights = self.counts / max(int(self.counts.max()), 1) * (_TOP - 2)
        areas = "".join(
            f'<path d="{_steps(row)}" fill="{colour}" fill-opacity="{0.85 if len(names) == 1 else 0.5}"/>'
            for row, colour in zip(heights, colours, strict=True)
        )
        hits = "".join(
            f'<rect class="hit" x="{i}" y="0" width="1" height="{_TOP}"><title>{self._words(i, names)}</title></rect>'
            for i in range(bins)
        )
        line = ""
        if limit is not None and limit <= bins * self.width:
            x = limit / self.width
            line = f'<line x1="{x:.2f}" x2="{x:.2f}" y1="0" y2="{_TOP}"><title>cutoff_len {limit:,}</title></line>'
        described = escape(f"Histogram of the tokens of {' and '.join(names)}")
        return (
            f'<svg class="plot" viewBox="0 0 {bins} {_TOP}" preserveAspectRatio="none" role="img" '
            f'aria-label="{described}">{areas}{line}{hits}</svg>{self._axis()}'
        )

    def _words(self, index: int, names: Sequence[str]) -> str:
        first, last = index * self.width, (index + 1) * self.width - 1
        is_end = self.has_longer and index == self.counts.shape[1] - 1
        span = (
            f"{first:,} tokens and more" if is_end else f"{first:,}–{last:,} tokens" if last > first else f"{first:,}"
        )
        counts = ", ".join(f"{name} {count:,}" for name, count in zip(names, self.counts[:, index], strict=True))
        return escape(f"{span}: {counts} rows")

    def _axis(self) -> str:
        """Round numbers below the drawing, some four of them."""
        end = self.counts.shape[1] * self.width
        step = next(s for s in _round_numbers() if s >= self.width and end / s <= 5)
        ticks = [tick for tick in range(0, end, step) if tick <= end - step * 0.6] + [end]
        marks = "".join(
            f'<span style="left:{100 * tick / end:.1f}%">{tick:,}{"+" * (self.has_longer and tick == end)}</span>'
            for tick in ticks
        )
        return f'<div class="axis">{marks}</div>'


def _round_numbers() -> Iterator[int]:
    """1, 2, 5, 10, 20, 50, …"""
    scale = 1
    while True:
        yield from (scale * digit for digit in _ROUND)
        scale *= 10


def _steps(heights: np.ndarray) -> str:
    """The outline of bars that touch each other."""
    steps = " ".join(f"V{_TOP - height:.1f} H{i + 1}" for i, height in enumerate(heights))
    return f"M0 {_TOP} {steps} V{_TOP} Z"
