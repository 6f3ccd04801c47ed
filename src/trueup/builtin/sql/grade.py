"""Is an answer formatted, commented and the right query? The last is found out by running it.

Answers come from a language model, so they run on test data in memory, read-only, without
functions, and for a bounded number of steps and rows.
"""

from __future__ import annotations

import re
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from trueup.builtin.sql.schema import ROWS_PER_TABLE, create_database
from trueup.builtin.sql.tasks import Task

_CLAUSE = re.compile(r"\b(?:SELECT|FROM|WHERE|ORDER BY|LIMIT)\b")
_KEYWORD = re.compile(r"\b(?:select|from|where|order\s+by|limit|and|or|not|asc|desc|between|like|in)\b", re.I)
_STRING_OR_COMMENT = re.compile(r"'(?:[^']|'')*'|--[^\n]*")
_CHINESE = re.compile(r"[\u4e00-\u9fff]")
_CHECKS, _STEPS_PER_CHECK = 20, 100_000  # a right query takes well under one of these checks
_MAX_CHARACTERS = 4000


@dataclass(frozen=True)
class Verdict:
    """What was found about one answer."""

    formatted: bool
    commented: bool
    right: bool

    @property
    def all(self) -> bool:
        return self.formatted and self.commented and self.right


@dataclass(frozen=True)
class Grade:
    """Shares of `count` answers, 0 to 1, that are formatted, commented, right, and all three."""

    formatted: float
    commented: float
    right: float
    all: float
    count: int


def is_formatted(sql: str) -> bool:
    """Whether clauses start lines, keywords are capitals, columns stand indented under SELECT."""
    code = _STRING_OR_COMMENT.sub(lambda match: "''" if match.group()[0] == "'" else "", sql)
    lines = [line.rstrip() for line in code.splitlines() if line.strip()]
    clauses = [line for line in lines if not line[0].isspace()]
    return (
        len(clauses) >= 2
        and lines[0] == "SELECT"
        and lines[1][0].isspace()
        and all(_CLAUSE.match(line) and len(_CLAUSE.findall(line)) == 1 for line in clauses)
        and all(word.isupper() for word in _KEYWORD.findall(code))
    )


def is_commented(sql: str, language: str | None = None) -> bool:
    """Whether a `--` comment has words in it; in `language` ("en" or "zh") if one is named."""
    words = " ".join(part[2:].strip() for part in _STRING_OR_COMMENT.findall(sql) if part.startswith("--"))
    if not re.search(r"\w{2}", words):
        return False
    return language is None or bool(_CHINESE.search(words)) == (language == "zh")


def same_result(sql: str, reference: str) -> bool:
    """Whether both queries return the same rows, in the same order if the reference orders them.

    Raises ValueError if the reference itself does not run.
    """
    found, wanted = run_query(sql), run_query(reference)
    if wanted is None:
        raise ValueError(f"the reference query does not run: {reference}")
    if found is None:
        return False
    if re.search(r"\border\s+by\b", reference, re.I):
        return found == wanted
    return Counter(found) == Counter(wanted)


def run_query(sql: str) -> list[tuple[object, ...]] | None:
    """The rows of one SELECT on the test data; None if it fails, writes, or takes too long."""
    if len(sql) > _MAX_CHARACTERS:
        return None
    connection = _guarded_database(threading.get_ident())
    checks = iter(range(_CHECKS))
    connection.set_progress_handler(lambda: next(checks, None) is None, _STEPS_PER_CHECK)
    try:
        return connection.execute(sql).fetchmany(2 * ROWS_PER_TABLE)
    except (sqlite3.Error, ValueError):
        return None


@cache
def _guarded_database(_thread: int) -> sqlite3.Connection:
    # One a thread: sqlite3 refuses a connection that another thread opened.
    connection = create_database()
    connection.set_authorizer(_allow_reading)
    return connection


def _allow_reading(action: int, *_: object) -> int:
    readers = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ)
    return sqlite3.SQLITE_OK if action in readers else sqlite3.SQLITE_DENY


def judge(answer: str, task: Task) -> Verdict:
    """What one answer is worth."""
    right = same_result(answer, task.bare)
    return Verdict(is_formatted(answer), is_commented(answer, task.language), right)


def grade(answers: Iterable[str], tasks: Sequence[Task]) -> Grade:
    """The answers' shares of each virtue. Raises ValueError if counts differ or are zero."""
    verdicts = [judge(answer, task) for answer, task in zip(answers, tasks, strict=True)]
    if not verdicts:
        raise ValueError("no answers to grade")

    def share(name: str) -> float:
        return sum(getattr(verdict, name) for verdict in verdicts) / len(verdicts)

    return Grade(share("formatted"), share("commented"), share("right"), share("all"), len(verdicts))
