"""Python's garbage collector, held back while a program only builds what it keeps.

Importing torch and transformers and reading a large tokenizer make some two million objects that stay. A collector
that looks through them again and again takes 2 of the 8 seconds before a first step (docs/log.md, 2026-11-21).
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collection() -> Iterator[None]:
    """No search for unreachable cycles while the block runs; all else is freed as ever."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextmanager
def importing() -> Iterator[None]:
    """The same for a block that imports what the process keeps to its end: no later search looks through that either.

    For a program of our own only: whatever else exists by then is kept to the end as well.
    """
    with no_collection():
        yield
    gc.freeze()
