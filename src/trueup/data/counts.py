"""Rows counted with the first of their ids, lengths counted with their percentiles, and both in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

KEPT_IDS = 20  # row ids kept per reason; the count is exact
_SHOWN_IDS = 4
_EXCERPT = 60
_BARS = "▁▂▃▄▅▆▇█"


@dataclass(slots=True)
class Rows:
    """A count of rows, the first of their ids, and an excerpt of the first."""

    count: int = 0
    ids: list[str] = field(default_factory=list)
    excerpt: str = ""

    def add(self, row: str, excerpt: str = "") -> None:
        self.count += 1
        if len(self.ids) < KEPT_IDS:
            self.ids.append(row)
        self.excerpt = self.excerpt or shorten(excerpt)

    def include(self, other: Rows) -> Rows:
        """These and the other's rows, as one count; returns itself."""
        self.count, self.ids = self.count + other.count, [*self.ids, *other.ids][:KEPT_IDS]
        self.excerpt = self.excerpt or other.excerpt
        return self

    def to_dict(self) -> dict[str, Any]:
        return {"count": self.count, "rows": self.ids, "excerpt": self.excerpt}


def largest(losses: Mapping[str, Rows]) -> list[tuple[str, Rows]]:
    """By reason, the most frequent first."""
    return sorted(losses.items(), key=lambda item: (-item[1].count, item[0]))


def some_ids(rows: Rows, limit: int = _SHOWN_IDS) -> str:
    """The first ids, and how many more there are."""
    more = f" … and {number(rows.count - limit)} more" if rows.count > limit else ""
    return ", ".join(rows.ids[:limit]) + more


def some_indices(rows: Rows) -> str:
    """The same without the dataset's name, where a heading tells it."""
    ids = ", ".join(row.rpartition(":")[2] for row in rows.ids[:_SHOWN_IDS])
    return ids + (" …" if rows.count > _SHOWN_IDS else "")


def number(value: float) -> str:
    """1 234 567: grouped by a narrow space that every terminal has."""
    return f"{value:,}".replace(",", " ")


def counted(count: int, one: str, many: str) -> str:
    """1 row is, 2 rows are."""
    return f"{number(count)} {one if count == 1 else many}"


def shorten(text: str, limit: int = _EXCERPT) -> str:
    """A text on one line, at most `limit` characters, safe to print."""
    line = " ".join(text[: 4 * limit].split())
    line = "".join(c if c.isprintable() else "�" for c in line)
    return line if len(line) <= limit else line[: limit - 1] + "…"


# ---- numbers given by how often each occurs ------------------------------------------------------


def statistics(counts: Mapping[int, int]) -> dict[str, float]:
    """p50, p95, max and mean."""
    return {
        "p50": percentile(counts, 0.5),
        "p95": percentile(counts, 0.95),
        "max": max(counts),
        "mean": sum(value * count for value, count in counts.items()) / sum(counts.values()),
    }


def percentile(counts: Mapping[int, int], share: float) -> float:
    """Between two of the numbers as numpy does it."""
    values = np.array(sorted(counts), dtype=np.float64)
    ends = np.cumsum([counts[value] for value in sorted(counts)])
    place = share * (int(ends[-1]) - 1)
    below, above = (values[np.searchsorted(ends, rank, side="right")] for rank in (int(place), int(np.ceil(place))))
    return float(below + (above - below) * (place - int(place)))


def sparkline(counts: Mapping[int, int], bins: int = 16) -> str:
    """A histogram in a line, from the shortest to the 99th percentile; all beyond is in its last bar."""
    top = percentile(counts, 0.99)
    shown, _ = np.histogram(
        np.minimum(list(counts), top), bins=min(bins, len(counts)), weights=np.array(list(counts.values()))
    )
    highest = max(int(shown.max()), 1)
    return "".join(" " if not count else _BARS[round(count / highest * (len(_BARS) - 1))] for count in shown)
