"""A run's metrics.jsonl as columns, kept current by reading only what is new, and thinned for a screen. Torch-free.

Kept in memory as a cache, by file: whatever is in it can be read again.
"""

from __future__ import annotations

import json
import math
import os
import threading
from array import array
from collections import OrderedDict
from pathlib import Path

from trueup.training.run_files import METRICS_FILE

POINTS = 800  # of a curve on a screen
_MOST_FILES = 32
_NAN = math.nan
_AXES = {"step": "step", "time": "time", "tokens": "num_tokens", "epoch": "epoch"}
AXIS_COLUMNS = frozenset(_AXES.values())  # say where a row stands, and are no curves


class Table:
    """The numbers of a log of JSON lines, column by column; NaN where a line lacks one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._clear()

    def _clear(self) -> None:
        self.columns: dict[str, array[float]] = {}
        self.length = 0
        self._offset = 0
        self._file = (0, 0)

    def refresh(self) -> bool:
        """Read what was appended since; everything again if the file was replaced or cut. Whether anything is new."""
        try:
            with open(self.path, "rb") as file:
                found = os.fstat(file.fileno())
                identity = (found.st_dev, found.st_ino)
                if identity != self._file or found.st_size < self._offset:
                    self._clear()
                    self._file = identity
                if found.st_size == self._offset:
                    return False
                file.seek(self._offset)
                new = file.read()
        except OSError:
            changed = self.length > 0
            self._clear()
            return changed
        whole = new[: new.rfind(b"\n") + 1]
        self._offset += len(whole)
        before = self.length
        for line in whole.splitlines():
            self._add(line)
        return self.length > before

    def _add(self, line: bytes) -> None:
        try:
            row = json.loads(line)
        except ValueError:
            return
        if not isinstance(row, dict):
            return
        for name, value in row.items():
            if isinstance(value, bool) or not (value is None or isinstance(value, int | float)):
                continue
            column = self.columns.get(name)
            if column is None:
                column = self.columns[name] = array("d", [_NAN]) * self.length
            column.append(_NAN if value is None else value)
        self.length += 1
        for column in self.columns.values():
            if len(column) < self.length:
                column.append(_NAN)

    def has(self, name: str) -> bool:
        """Whether any row has a number of that name."""
        return any(value == value for value in self.columns.get(name, ()))

    def last(self, name: str) -> float | None:
        """The newest number of that name."""
        return next((value for value in reversed(self.columns.get(name, array("d"))) if value == value), None)

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
        across = self.columns.get(_AXES[x])
        values = self.columns.get(name)
        if across is None or values is None:
            return []
        origin = next((at for at in across if at == at), 0.0) if x == "time" else 0.0
        pairs = [(at - origin, value) for at, value in zip(across, values, strict=True) if value == value and at == at]
        if smoothing > 0:
            pairs = _smooth(pairs, smoothing)
        if span:
            pairs = [pair for pair in pairs if span[0] <= pair[0] <= span[1]]
        return thin(pairs, points)


_TABLES: OrderedDict[Path, Table] = OrderedDict()
_LOCK = threading.Lock()


def read(run: Path, name: str = METRICS_FILE) -> Table:
    """The rows of a run, current."""
    with _LOCK:
        path = run / name
        table = _TABLES.pop(path, None) or Table(path)
        _TABLES[path] = table
        while len(_TABLES) > _MOST_FILES:
            _TABLES.popitem(last=False)
        table.refresh()
        return table


def thin(pairs: list[tuple[float, float]], points: int) -> list[list[float]]:
    """Lowest and highest of each stretch, in their order: no spike is lost, and the shape stays."""
    if len(pairs) <= points:
        return [[x, y] for x, y in pairs]
    stretch = max(1, math.ceil(2 * len(pairs) / points))
    kept: list[list[float]] = []
    for start in range(0, len(pairs), stretch):
        part = pairs[start : start + stretch]
        low, high = min(part, key=lambda pair: pair[1]), max(part, key=lambda pair: pair[1])
        kept += [[x, y] for x, y in sorted({low, high})]
    if kept[-1][0] != pairs[-1][0]:
        kept.append(list(pairs[-1]))
    return kept


def _smooth(pairs: list[tuple[float, float]], weight: float) -> list[tuple[float, float]]:
    smoothed, mean, mass = [], 0.0, 0.0
    for x, y in pairs:
        mean, mass = weight * mean + (1 - weight) * y, weight * mass + (1 - weight)
        smoothed.append((x, mean / mass))
    return smoothed
