"""Objects of a Python program under names that a config can hold: `memory:NAME`.

A config says everything in words. What a program hands over itself (rows, a model, a function) gets such a name while
its run lasts, and whoever turns names into things looks here first. So a run that a program starts takes the same way
as one of the command line, and its run.yaml says what it cannot hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from trueup.errors import ConfigError

PREFIX = "memory:"

_held: ContextVar[Mapping[str, Any]] = ContextVar("held")


@contextmanager
def holding(objects: Mapping[str, Any]) -> Iterator[None]:
    """While open, the objects are there, each under its label (`train` for `memory:train`)."""
    token = _held.set({**_held.get({}), **objects})
    try:
        yield
    finally:
        _held.reset(token)


def is_name(name: object) -> bool:
    """Whether this is the name of an object of a program."""
    return isinstance(name, str) and name.startswith(PREFIX)


def find(label: str) -> Any:
    """The object of this label; None if there is none."""
    return _held.get({}).get(label)


def held(name: str, key: str) -> Any:
    """The object of a name that `key` gave. Raises ConfigError if there is none here."""
    found = find(name.removeprefix(PREFIX))
    if found is None:
        raise ConfigError(
            f"{name} was an object of the Python program that started this run", where=key,
            expected="a name, a file or a directory",
            fix="start that program again (with resume_from_checkpoint to go on), or name what it stood for",
        )  # fmt: skip
    return found
