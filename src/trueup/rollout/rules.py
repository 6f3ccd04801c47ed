"""Rules that an answer keeps or breaks: length, words, patterns, format. A point for each kept. Standard library only.

The patterns and the schema are the operator's; what they are tried on is a model's, and is never run: SQL is prepared
by SQLite, not executed.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from trueup.rollout.verify import unfenced

_COMMENT = re.compile(r"--[^\n]*|/\*.*?\*/", re.DOTALL)
_UNKNOWN_NAMES = ("no such table", "no such column", "no such function", "no such module")


@dataclass(frozen=True)
class Rules:
    """What is asked of an answer; None and empty ask for nothing.

    `schema`: CREATE statements that SQL has to fit; without any, only its grammar counts.
    """

    min_chars: int | None = None
    max_chars: int | None = None
    keywords: tuple[str, ...] = ()
    forbidden: tuple[str, ...] = ()
    regex: tuple[str, ...] = ()
    not_regex: tuple[str, ...] = ()
    format: str | None = None  # json | sql
    schema: str | None = None

    @property
    def identity(self) -> dict[str, Any]:
        return asdict(self)

    def __bool__(self) -> bool:
        return bool(self._checks)

    def score(self, answers: Sequence[str]) -> list[float]:
        """Points of each answer."""
        return [float(sum(check(text) for check in self._checks)) for text in answers]

    @cached_property
    def _checks(self) -> list[Callable[[str], float]]:
        checks: list[Callable[[str], float]] = []
        if (least := self.min_chars) is not None:
            checks.append(lambda text: len(text.strip()) >= least)
        if (most := self.max_chars) is not None:
            checks.append(lambda text: len(text.strip()) <= most)
        if self.keywords:
            checks.append(lambda text: _share(text, self.keywords))
        if self.forbidden:
            checks.append(lambda text: _share(text, self.forbidden) == 0)
        checks += [_finds(pattern, True) for pattern in self.regex]
        checks += [_finds(pattern, False) for pattern in self.not_regex]
        if self.format == "json":
            checks.append(is_json)
        elif self.format == "sql":
            checks.append(lambda text: is_sql(text, self.schema))
        return checks


def _finds(pattern: str, wanted: bool) -> Callable[[str], float]:
    compiled = re.compile(pattern, re.DOTALL)
    return lambda text: (compiled.search(text) is not None) == wanted


def _share(text: str, words: Sequence[str]) -> float:
    lower = text.lower()
    return sum(word.lower() in lower for word in words) / len(words)


def is_json(text: str) -> bool:
    """Whether a text, or its last code fence, is a JSON value."""
    try:
        json.loads(unfenced(text))
    except (ValueError, RecursionError):
        return False
    return True


def _goes_on(sql: str) -> bool:
    """Whether there is more than one statement; a name that is unknown in the first hides the others."""
    ends = (i + 1 for i, letter in enumerate(sql) if letter == ";" and sqlite3.complete_statement(sql[: i + 1]))
    return bool(_COMMENT.sub("", sql[next(ends, len(sql)) :]).strip(" \n\t\r;"))


def _allow(action: int, argument: str | None, *_: Any) -> int:
    """Statements, but nothing that acts while it is prepared (PRAGMA) or reaches a file (ATTACH)."""
    refused = (sqlite3.SQLITE_PRAGMA, sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_DETACH)
    return sqlite3.SQLITE_DENY if action in refused else sqlite3.SQLITE_OK


def is_sql(text: str, schema: str | None = None) -> bool:
    """Whether a text, or its last code fence, is one SQL statement that SQLite can prepare.

    Raises sqlite3.Error if the schema itself does not run.
    """
    sql = unfenced(text)
    connection = sqlite3.connect(":memory:")
    connection.executescript(schema or "")
    connection.set_authorizer(_allow)
    try:
        connection.execute("EXPLAIN " + sql).close()  # prepared, not run
    except sqlite3.Warning:  # several statements, before Python 3.12
        return False
    except (sqlite3.Error, ValueError) as error:
        return schema is None and str(error).startswith(_UNKNOWN_NAMES) and not _goes_on(sql)
    finally:
        connection.close()
    return True
