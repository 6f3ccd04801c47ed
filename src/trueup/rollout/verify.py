"""Rewards that can be verified, ready to be named in `reward_funcs` or called from a file of your own.

Each takes `completions` and the columns it compares them with, one entry an answer, and returns a number for each:
1.0 right, 0.0 wrong, None for a row that lacks the column (it then counts for nothing). Standard library only.
"""

from __future__ import annotations

import json
import math
import re
import sqlite3
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_NUMBER = re.compile(r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?%?")
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}|####\s*(\S+)")
_FENCE = re.compile(r"```(?:\w+)?\s*\n(.*?)```", re.DOTALL)
_STEPS_PER_CHECK, _CHECKS, _MOST_ROWS = 100_000, 50, 10_000
_MOST_BYTES, _LONGEST_VALUE = 64_000_000, 1_000_000

Score = float | None


def exact_match(completions: Sequence[str], answer: Sequence[Any], **_: Any) -> list[Score]:
    """Whether the answer is the column `answer`, white space aside."""
    return [
        None if wanted is None else float(_spaces(text) == _spaces(str(wanted)))
        for text, wanted in zip(completions, answer, strict=True)
    ]


def numeric(completions: Sequence[str], answer: Sequence[Any], **_: Any) -> list[Score]:
    """Whether the final number (after `####`, in `\\boxed{}`, else the last) is that of the column `answer`."""
    scores: list[Score] = []
    for text, wanted in zip(completions, answer, strict=True):
        target = last_number(str(wanted)) if wanted is not None else None
        found = last_number(text)
        close = target is not None and found is not None and math.isclose(found, target, rel_tol=1e-6, abs_tol=1e-9)
        scores.append(None if target is None else float(close))
    return scores


def regex(completions: Sequence[str], pattern: Sequence[str | None], **_: Any) -> list[Score]:
    """Whether the column `pattern` is found in the answer (`re.search`, dots match line breaks)."""
    return [
        None if wanted is None else float(re.search(wanted, text, re.DOTALL) is not None)
        for text, wanted in zip(completions, pattern, strict=True)
    ]


def json_schema(completions: Sequence[str], schema: Sequence[Any], **_: Any) -> list[Score]:
    """Whether the answer is JSON (alone, or in a code fence) that the column `schema` allows."""
    import jsonschema  # of the extra `rewards`
    import referencing

    def fits(text: str, wanted: Any) -> bool:
        schema = json.loads(wanted) if isinstance(wanted, str) else wanted
        kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
        kind.check_schema(schema)
        try:  # the empty registry: a `$ref` to elsewhere fetches nothing
            return kind(schema, registry=referencing.Registry()).is_valid(json.loads(unfenced(text)))
        except (ValueError, RecursionError):
            return False

    return [
        None if wanted is None else float(fits(text, wanted)) for text, wanted in zip(completions, schema, strict=True)
    ]


def sql_result(
    completions: Sequence[str], answer: Sequence[str | None], database: Sequence[str | None], **_: Any
) -> list[Score]:
    """Whether the answer, run on the SQLite file in column `database`, returns the rows of the query in `answer`."""
    return [
        None if wanted is None or file is None else float(same_rows(unfenced(text), wanted, Path(file)))
        for text, wanted, file in zip(completions, answer, database, strict=True)
    ]


# --- parts, for files of your own ---------------------------------------------------------------


def last_number(text: str) -> float | None:
    """The number an answer ends with: after `####`, in `\\boxed{}`, else the last one in the text."""
    marked = _BOXED.findall(text)
    if marked:
        text = marked[-1][0] or marked[-1][1]
    found = _NUMBER.findall(text)
    if not found:
        return None
    word = found[-1].replace(",", "")
    try:
        return float(word[:-1]) / 100 if word.endswith("%") else float(word)
    except ValueError:
        return None


def unfenced(text: str) -> str:
    """The content of the last code fence, or the text itself."""
    blocks = _FENCE.findall(text)
    return (blocks[-1] if blocks else text).strip()


def same_rows(sql: str, reference: str, database: Path) -> bool:
    """Whether two queries return the same rows, in the same order if the reference orders them.

    Raises ValueError if the reference does not run within the limits: then the data is wrong, not the answer.
    """
    wanted, found = run_sql(reference, database), run_sql(sql, database)
    if wanted is None:
        raise ValueError(f"the reference query does not run, or returns too much: {reference}")
    if found is None:
        return False
    return found == wanted if re.search(r"\border\s+by\b", reference, re.I) else Counter(found) == Counter(wanted)


def run_sql(sql: str, database: Path) -> list[tuple[Any, ...]] | None:
    """The rows of one query on an SQLite file; None if it fails, writes, takes too long, or returns too much.

    A model wrote the query: the file is opened read-only, nothing but reading is allowed; steps, rows, the size of a
    value and of all values are limited.
    """
    connection = sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True)
    checks = iter(range(_CHECKS))
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LONGEST_VALUE)
    connection.set_authorizer(_allow_reading)
    connection.set_progress_handler(lambda: next(checks, None) is None, _STEPS_PER_CHECK)
    try:
        return _within_limits(connection.execute(sql))
    except (sqlite3.Error, ValueError):
        return None
    finally:
        connection.close()


def _within_limits(cursor: sqlite3.Cursor) -> list[tuple[Any, ...]] | None:
    rows, size = [], 0
    for row in cursor:
        size += sys.getsizeof(row) + sum(map(sys.getsizeof, row))
        if len(rows) == _MOST_ROWS or size > _MOST_BYTES:
            return None
        rows.append(row)
    return rows


def _allow_reading(action: int, argument: str | None, function: str | None, *_: Any) -> int:
    readers = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE)
    harmless = action == sqlite3.SQLITE_FUNCTION and function != "load_extension"
    return sqlite3.SQLITE_OK if action in readers or harmless else sqlite3.SQLITE_DENY


def _spaces(text: str) -> str:
    return " ".join(text.split())
