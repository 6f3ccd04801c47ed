"""Ctrl-C and SIGTERM: where something can be saved, the first asks for a stop after the current step and the second
ends the process at once; elsewhere the first ends it, in an orderly way.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from trueup.errors import UserError

if TYPE_CHECKING:
    from trueup.training.backend import Backend

_log = logging.getLogger("trueup")

#: A launcher passes a signal on that the whole process group may have got as well (Slurm, systemd):
#: what comes within this time is the same one.
_ECHO_SECONDS = 3.0


class Stopped(UserError):
    """The run was asked to stop, and has saved. `exit_code`: 130 for Ctrl-C, 143 for SIGTERM."""

    def __init__(self, signum: int, what: str, *, where: str, fix: str | None) -> None:
        super().__init__(what, where=where, fix=fix)
        self.signum = signum
        self.exit_code = 128 + signum


class StopRequest:
    """While open, signals set `signum` instead of ending the process. Does nothing outside the main
    thread.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signum: int | None = None
        self._ignored_until = 0.0
        self._before: dict[int, object] = {}

    def __call__(self) -> bool:
        """Whether a stop was asked for."""
        return self.signum is not None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for signum in self._SIGNALS:
                self._before[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]
        self._before.clear()

    def stopped(self, backend: Backend, what: str, where: str, fix: str | None = None) -> Stopped:
        """The error to raise on every rank, when any of them was asked to stop."""
        return Stopped(max(backend.gather(self.signum or 0)), what, where=where, fix=fix)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is None:
            self.signum = signum
            if "TORCHELASTIC_RUN_ID" in os.environ:
                self._ignored_until = time.monotonic() + _ECHO_SECONDS
        elif time.monotonic() >= self._ignored_until:
            raise SystemExit(128 + signum)


@contextmanager
def sigterm_cleans_up() -> Iterator[None]:
    """While open, SIGTERM ends the process as Ctrl-C does: through every `finally`, with exit code 143."""

    def end(signum: int, frame: FrameType | None) -> None:
        _log.warning("ended by SIGTERM outside of the training's steps; checkpoints and caches are as they were")
        raise SystemExit(128 + signum)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
