"""Whether a process that answers keeps something of every answer."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from statistics import median

import psutil

KIB_PER_ANSWER = 2.0  # at which something leaks
WARM = 0.4  # share of the time in which all sizes of batches have come


@contextlib.contextmanager
def watched(process: psutil.Process, answers: Callable[[], int], every: float = 5.0) -> Iterator[list[tuple[int, int]]]:
    """(answers so far, resident bytes), again and again."""
    seen: list[tuple[int, int]] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(every):
            seen.append((answers(), process.memory_info().rss))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


def leaked(seen: list[tuple[int, int]]) -> float:
    """KiB that each answer left behind, once it was warm: between the medians of the first and of the last fifth."""
    warm = seen[int(WARM * len(seen)) :]
    fifth = max(1, len(warm) // 5)
    (answers, before), (more, after) = (
        (median(n for n, _ in part), median(size for _, size in part)) for part in (warm[:fifth], warm[-fifth:])
    )
    return (after - before) / 1024 / max(more - answers, 1)


def told(seen: list[tuple[int, int]]) -> str:
    """For who reads the proof: memory at ten times, and what leaked."""
    steps = ", ".join(f"{size / 2**20:.0f}" for _, size in seen[:: max(1, len(seen) // 10)])
    return f"memory {steps}, at last {seen[-1][1] / 2**20:.0f} MiB; {leaked(seen):.2f} KiB an answer once warm"
