"""Work on many rows shared out to forked processes, its results in order.

A fork sees all that its parent has read without a copy of it, and starts at once; only results
travel back, through a pipe each. Where forking is not safe (Windows, macOS) the work is done in
this process: no other process is ever spawned, so nothing can hang on an import or on a script
without a main guard. A worker runs neither torch nor the tokenizers' own threads, which do not
survive a fork.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from typing import TypeVar

from trueup.errors import ResourceError

T = TypeVar("T")

CAN_FORK = sys.platform.startswith("linux")


def cores() -> int:
    """How many processors this process may use, beside others of the same run."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, found // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def in_order(function: Callable[[int], T], count: int, workers: int) -> Iterator[T]:
    """function(0), function(1), … function(count - 1), computed by up to `workers` processes at a time.

    Results must not depend on which calls a process has made before: then they are the same for any number of workers.
    What a call raises is raised here. Raises ResourceError if a worker dies.
    """
    workers = min(workers, count)
    if workers <= 1 or not CAN_FORK or multiprocessing.current_process().daemon:  # a daemon may have no children
        yield from map(function, range(count))
        return
    team: list[tuple[ForkProcess, Connection]] = []
    try:
        for number in range(workers):
            team.append(_start(function, range(number, count, workers), [pipe for _, pipe in team]))
        for number in range(count):
            yield _receive(*team[number % workers])
    finally:  # also after Ctrl-C, or when nobody wants the rest
        for process, pipe in team:
            pipe.close()
            process.kill()
        for process, _ in team:
            process.join()


def _start(function: Callable[[int], T], numbers: range, others: list[Connection]) -> tuple[ForkProcess, Connection]:
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(
        target=_work, args=(function, numbers, theirs, [ours, *others]), daemon=True
    )
    with warnings.catch_warnings():  # Python warns of any fork beside threads; see above for why this one is safe
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    theirs.close()  # so that a worker's end is the end of its pipe
    return process, ours


def _work(function: Callable[[int], T], numbers: range, pipe: Connection, unused: list[Connection]) -> None:
    """A worker's life: ends with its work, or when nobody listens any more."""
    for other in unused:
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        for number in numbers:
            try:
                pipe.send((function(number), None))
            except BrokenPipeError:
                break
            except Exception as error:  # whatever it is, the parent raises it
                pipe.send((None, error))
                break
    finally:
        pipe.close()
        os._exit(0)  # nothing of the parent's is to be closed or flushed twice


def _receive(process: ForkProcess, pipe: Connection) -> T:
    try:
        result, error = pipe.recv()
    except EOFError:
        process.join()
        how = f"signal {-process.exitcode}" if (process.exitcode or 0) < 0 else f"exit code {process.exitcode}"
        raise ResourceError(
            f"a process that tokenised has died ({how}); too little memory is the usual reason",
            fix="preprocessing_num_workers: 1, which needs the least memory",
        ) from None
    if error is not None:
        raise error
    return result
