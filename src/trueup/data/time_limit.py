"""A time limit for Python code that is not ours: chat templates come with models, and one of them may loop for ever.

One sleeping thread looks at the clock and raises `OutOfTime` in the thread that is late, between two bytecodes. It does
not reach into a single long operation in C: `rendering.py` refuses the one that templates have (a power of integers).
"""

from __future__ import annotations

import ctypes
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_LOOK_SECONDS = 0.25
_CAN_RAISE = platform.python_implementation() == "CPython"  # elsewhere there is no way in, and no limit


class OutOfTime(Exception):
    """The time of a `time_limit` is over."""


class _Clock:
    """Who has to be done when, by thread. A set is cheap: a chat template renders in microseconds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._until: dict[int, float] = {}
        self._thread: threading.Thread | None = None

    def start(self, thread: int, seconds: float) -> None:
        with self._lock:
            self._until[thread] = time.monotonic() + seconds
            if self._thread is None or not self._thread.is_alive():  # a forked process has lost it
                self._thread = threading.Thread(target=self._watch, name="time limit", daemon=True)
                self._thread.start()

    def stop(self, thread: int) -> None:
        with self._lock:
            if self._until.pop(thread, None) is None:  # it was late: what is still to be raised is not
                _raise_in(thread, None)

    def _watch(self) -> None:
        while True:
            time.sleep(_LOOK_SECONDS)
            with self._lock:
                now = time.monotonic()
                for thread in [thread for thread, until in self._until.items() if now > until]:
                    del self._until[thread]
                    _raise_in(thread, OutOfTime)

    def forget(self) -> None:
        """Begin anew: a forked process has neither the thread nor a lock that it may hold."""
        self.__init__()


_clock = _Clock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_clock.forget)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the block when it takes longer. Not to be nested."""
    thread = threading.get_ident()
    if _CAN_RAISE:
        _clock.start(thread, seconds)
    try:
        yield
    finally:
        if _CAN_RAISE:
            _clock.stop(thread)


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    # https://docs.python.org/3/c-api/threads.html#c.PyThreadState_SetAsyncExc; NULL takes back what is pending.
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(error) if error else None)
