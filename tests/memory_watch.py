"""Whether a process that answers keeps something of every answer."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from itertools import combinations
from statistics import median

import psutil

KIB_PER_ANSWER = 1.5  # at which something leaks
STANDING = 24 << 20  # bytes by which one that stands still may move
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
    """KiB that each answer left behind, in the middle one of the three thirds of the warm time.

    What is kept of every answer shows in each of them; a step to a new plateau, from a batch larger than all before,
    in one. Within a third it is the median slope between any two looks (Theil and Sen).
    """
    warm = seen[int(WARM * len(seen)) :]
    third = max(2, len(warm) // 3)
    return median(_slope(warm[start : start + third]) for start in (0, third, 2 * third)) / 1024


def grown(seen: list[tuple[int, int]]) -> int:
    """Bytes between the most of the second fifth of the time and the most of the last."""
    fifth = max(1, len(seen) // 5)
    return max(size for _, size in seen[-fifth:]) - max(size for _, size in seen[fifth : 2 * fifth])


def _slope(seen: list[tuple[int, int]]) -> float:
    slopes = [(after - before) / (more - few) for (few, before), (more, after) in combinations(seen, 2) if more > few]
    return median(slopes) if slopes else 0.0


def told(seen: list[tuple[int, int]]) -> str:
    """For who reads the proof: memory at ten times, and what leaked."""
    steps = ", ".join(f"{size / 2**20:.0f}" for _, size in seen[:: max(1, len(seen) // 10)])
    return f"memory {steps}, at last {seen[-1][1] / 2**20:.0f} MiB; {leaked(seen):.2f} KiB an answer once warm"
