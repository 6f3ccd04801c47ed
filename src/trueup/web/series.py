"""A run's metrics.jsonl as columns, and these as curves thinned for a screen. Torch-free."""

from __future__ import annotations

import math
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import numpy as np

from trueup.training.run_files import METRICS_FILE
from trueup.web.follow import Followed, Shelf, row_of

POINTS = 800  # of a curve on a screen
_NAN = math.nan
_AXES = {"step": "step", "time": "time", "tokens": "num_tokens", "epoch": "epoch"}
AXIS_COLUMNS = frozenset(_AXES.values())  # say where a row stands, and are no curves


class Table(Followed):
    """The numbers of a log of JSON lines, column by column; NaN where a line lacks one."""

    def forget(self) -> None:
        self.length = 0
        self._columns: dict[str, np.ndarray] = {}  # each with room for more

    def take(self, lines: list[bytes]) -> None:
        """Rows of the same keys follow each other, mostly, and are taken together."""
        rows = (row for line in lines if (row := row_of(line)))
        for names, group in groupby(rows, key=tuple):
            block = np.array(
                [[v if type(v) is float else _number(v) for v in row.values()] for row in group], dtype=np.float64
            )
            end = self.length + len(block)
            for name in names:
                self._columns.setdefault(name, np.full(end, _NAN))
            for name, column in self._columns.items():
                if len(column) < end:
                    self._columns[name] = np.concatenate([column, np.full(max(end, 1024), _NAN)])
            for number, name in enumerate(names):
                self._columns[name][self.length : end] = block[:, number]
            self.length = end

    @property
    def names(self) -> list[str]:
        """Of all columns that have a number."""
        return [name for name in self._columns if self.has(name)]

    def column(self, name: str) -> np.ndarray:
        """float64 [rows]; all NaN if no row has it."""
        found = self._columns.get(name)
        return np.full(self.length, _NAN) if found is None else found[: self.length]

    def has(self, name: str) -> bool:
        """Whether any row has a number of that name."""
        return bool(np.isfinite(self.column(name)).any())

    def last(self, name: str) -> float | None:
        """The newest number of that name."""
        column = self.column(name)
        there = np.flatnonzero(np.isfinite(column[-1000:])) + max(0, len(column) - 1000)
        there = there if len(there) else np.flatnonzero(np.isfinite(column))
        return float(column[there[-1]]) if len(there) else None

    def extent(self, x: str) -> tuple[float, float]:
        """The first and the last x; (0, 0) without rows."""
        across = self.column(_AXES[x])
        there = across[np.isfinite(across)]
        if not len(there):
            return 0.0, 0.0
        origin = float(there[0]) if x == "time" else 0.0
        return float(there[0]) - origin, float(there[-1]) - origin

    def curve(
        self, name: str, *, x: str = "step", smoothing: float = 0.0, points: int = POINTS,
        span: tuple[float, float] | None = None,
    ) -> list[list[float]]:  # fmt: skip
        """[[x, y], …] of one metric, at most about `points` of them.

        Args:
            x: step, epoch, tokens, or time (seconds since the first row).
            smoothing: weight of what was before, from 0 to below 1; the mean is unbiased from its first value on.
            span: only these x.
        """
        with self.lock:
            across, values = self.column(_AXES[x]), self.column(name)
        there = np.isfinite(across) & np.isfinite(values)
        if x == "time":
            across = across - next(iter(across[np.isfinite(across)]), 0.0)
        across, values = across[there], values[there]
        if smoothing > 0:
            values = _smooth(values, smoothing)
        if span:
            inside = (across >= span[0]) & (across <= span[1])
            across, values = across[inside], values[inside]
        kept = thin(values, points)
        return np.column_stack([across[kept], values[kept]]).tolist()


_SHELF = Shelf(Table)


def read(run: Path, name: str = METRICS_FILE) -> Table:
    """The rows of a run, current."""
    return _SHELF.read(run / name)


def thin(values: np.ndarray, points: int) -> np.ndarray:
    """Which of many values to draw: lowest and highest of each stretch, so that no spike is lost; and the last."""
    count = len(values)
    if count <= points:
        return np.arange(count)
    stretch = math.ceil(2 * count / points)
    whole = count // stretch
    parts = values[: whole * stretch].reshape(whole, stretch)
    starts = np.arange(whole) * stretch
    kept = [starts + parts.argmin(1), starts + parts.argmax(1), [count - 1]]
    if rest := count - whole * stretch:
        end = values[-rest:]
        kept.append([count - rest + int(end.argmin()), count - rest + int(end.argmax())])
    return np.unique(np.concatenate(kept))


def _smooth(values: np.ndarray, weight: float) -> np.ndarray:
    """An exponential mean, each divided by the weight it has seen."""
    sums = accumulate(((1 - weight) * values).tolist(), lambda mean, value: weight * mean + value)
    return np.fromiter(sums, np.float64, len(values)) / (1 - weight ** np.arange(1, len(values) + 1))


def _number(value: Any) -> float:
    try:
        return _NAN if isinstance(value, bool) or not isinstance(value, int | float) else float(value)
    except OverflowError:
        return _NAN
