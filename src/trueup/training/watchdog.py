"""Notices when a run no longer moves: writes every thread's stack to logs/stall.txt and says
"stalled" in status.json.

It does not end the process: a slow disk or a huge evaluation may yet come back, and then the state
is "running" again.
"""

from __future__ import annotations

import faulthandler
import threading
import time
from collections import deque
from statistics import median

from trueup.training.run_directory import RunDirectory

_LEAST_SECONDS = 60.0
_TIMES_MEDIAN = 10.0
_UNKNOWN_SECONDS = 600.0  # before there is a median


class Watchdog:
    """While open, a thread compares the time since the last `beat` with ten times the median."""

    def __init__(self, run: RunDirectory, check_seconds: float = 5.0) -> None:
        self.run = run
        self.stalled = False
        self._check_seconds = check_seconds
        self._last = time.monotonic()
        self._intervals: deque[float] = deque(maxlen=50)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self) -> None:
        """Something moved."""
        now = time.monotonic()
        self._intervals.append(now - self._last)
        self._last = now
        if self.stalled:
            self.stalled = False
            self.run.status(state="running")

    def patience(self) -> float:
        """Seconds without a beat that count as a stall."""
        if len(self._intervals) < 3:
            return _UNKNOWN_SECONDS
        return max(_LEAST_SECONDS, _TIMES_MEDIAN * median(self._intervals))

    def __enter__(self) -> Watchdog:
        if self.run.writer:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(self._check_seconds):
            if not self.stalled and time.monotonic() - self._last > self.patience():
                self.stalled = True
                self._report()

    def _report(self) -> None:
        path = self.run.path / "logs" / "stall.txt"
        path.parent.mkdir(exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        self.run.status(state="stalled")
        seconds = self.patience()
        self.run.warn(f"no progress for {seconds:.0f} s; the stacks of all threads are in {path}")
