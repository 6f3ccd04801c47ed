"""What a person sees of work that takes long before a training begins: a bar on a terminal, else a line now and then.

Work that is soon done shows nothing. Whoever reads the lines may ask for them more often: TRUEUP_LINE_SECONDS.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

log = logging.getLogger("trueup")

_BAR_AFTER_SECONDS = 1.0
_LINE_SECONDS = float(os.environ.get("TRUEUP_LINE_SECONDS", "30"))  # between two lines
_FIRST_LINE_SECONDS = min(5.0, _LINE_SECONDS)


@contextmanager
def waiting(what: str, total: int, unit: str) -> Iterator[Callable[..., None]]:
    """Show how far `what` has come: the block calls what it is given with the number of `unit` done so far, and with
    a few words more if there is something else to show.
    """
    if os.environ.get("RANK", "0") != "0":
        yield lambda done, more="": None
        return
    shown = _Bar(what, total, unit) if sys.stderr.isatty() else _Lines(what, total, unit)
    try:
        yield shown
    finally:
        shown.close()


class _Lines:
    """`tokenising: 20,000 of 60,000 rows, 0:01:20 left`, as notices, and how long it took at the end."""

    def __init__(self, what: str, total: int, unit: str) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.begun = time.monotonic()
        self.next = self.begun + _FIRST_LINE_SECONDS
        self.done = 0
        self.said = False

    def __call__(self, done: int, more: str = "") -> None:
        self.done = done
        now = time.monotonic()
        if now < self.next or done >= self.total:
            return
        left = timedelta(seconds=round((now - self.begun) / max(done, 1) * (self.total - done)))
        more = f", {more}" if more else ""
        log.info("%s: %s of %s %s, %s left%s", self.what, f"{done:,}", f"{self.total:,}", self.unit, left, more)
        self.next = now + _LINE_SECONDS
        self.said = True

    def close(self) -> None:
        if self.said and self.done >= self.total:
            seconds = round(time.monotonic() - self.begun)
            log.info("%s: %s %s in %s", self.what, f"{self.total:,}", self.unit, timedelta(seconds=seconds))


class _Bar:
    """A bar on stderr that is gone when the work is done; notices scroll by above it."""

    def __init__(self, what: str, total: int, unit: str) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.begun = time.monotonic()
        self.bar: Any = None

    def __call__(self, done: int, more: str = "") -> None:
        if self.bar is None:
            if time.monotonic() - self.begun < _BAR_AFTER_SECONDS:
                return
            self.bar = self._start()
        self.bar.update(self.task, completed=done, description=f"{self.what} {more}".rstrip())

    def _start(self) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(self.unit))
        bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
        self.task = bar.add_task(self.what, total=self.total)
        bar.start()
        return bar

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
