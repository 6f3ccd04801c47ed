"""JSON with positions: what the standard parser knows about faults, said as line, column and a
caret.

The standard library parses (`raw_decode`); this file only walks from value to value, so that a
fault in element 512 of an array, or a key given twice, has a place in the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from rich.cells import cell_len

_space = re.compile(r"[ \t\n\r]*")
_cut_literal = re.compile(r"[\w.+-]*\s*").fullmatch
_EXCERPT = 60  # characters of a line shown around a fault


class JsonFault(Exception):
    """`message` at `offset` characters.

    `truncated`: the text ends inside a value. `complete`: sound, but a key is given twice.
    """

    def __init__(self, message: str, offset: int, *, truncated: bool = False, complete: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.offset = offset
        self.truncated = truncated
        self.complete = complete


class _DuplicateKey(Exception):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # The standard parser silently keeps the last of two equal keys: half of such a row would
    # vanish.
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _DuplicateKey(next(key for i, key in enumerate(keys) if key in keys[:i]))
    return result


_decoder = json.JSONDecoder(object_pairs_hook=_reject_duplicates)


def decode(text: str, start: int = 0) -> tuple[Any, int]:
    """The value that begins at `start`, and the offset just behind it. Raises JsonFault."""
    try:
        return _decoder.raw_decode(text, start)
    except json.JSONDecodeError as error:
        message = re.sub(r"( starting)? at$", "", error.msg)
        raise JsonFault(message[0].lower() + message[1:], error.pos, truncated=_ends_at(text, error)) from None
    except _DuplicateKey as error:
        raise JsonFault(
            f"key {json.dumps(error.key, ensure_ascii=False)} is given twice in one object",
            _second_occurrence(text, start, error.key),
            complete=True,
        ) from None
    except RecursionError:
        raise JsonFault("nested too deeply", start) from None


def decode_all(text: str) -> Any:
    """The one value that `text` holds. Raises JsonFault."""
    value, end = decode(text, _skip_space(text))
    _expect_end(text, end)
    return value


def array_elements(text: str, start: int) -> Iterator[tuple[Any, int]]:
    """(element, offset) of the array whose `[` stands at `start`. Raises JsonFault."""
    position = _skip_space(text, start + 1)
    if text[position : position + 1] == "]":
        _expect_end(text, position + 1)
        return
    while True:
        value, end = decode(text, position)
        yield value, position
        end = _skip_space(text, end)
        mark = text[end : end + 1]
        if mark == "]":
            _expect_end(text, end + 1)
            return
        if mark != ",":
            raise JsonFault("expecting ',' or ']' between elements", end, truncated=not mark)
        position = _skip_space(text, end + 1)


def successive_values(text: str, start: int = 0) -> Iterator[tuple[Any, int]]:
    """(value, offset) of values one after another, separated by white space or commas. Raises
    JsonFault.
    """
    position = _skip_space(text, start)
    while position < len(text):
        value, end = decode(text, position)
        yield value, position
        position = _skip_space(text, end)
        if text[position : position + 1] == ",":
            position = _skip_space(text, position + 1)


def object_members(text: str) -> Iterator[tuple[str, Any, int]]:
    """(key, value, offset of the key) of the object that `text` holds. Raises JsonFault."""
    position = _skip_space(text)
    if text[position : position + 1] != "{":
        raise JsonFault("expecting an object", position)
    position = _skip_space(text, position + 1)
    while text[position : position + 1] != "}":
        key, end = decode(text, position)
        if not isinstance(key, str):
            raise JsonFault("expecting a name in double quotes", position)
        end = _skip_space(text, end)
        if text[end : end + 1] != ":":
            raise JsonFault("expecting ':' after the name", end)
        value, after = decode(text, _skip_space(text, end + 1))
        yield key, value, position
        after = _skip_space(text, after)
        if text[after : after + 1] == "}":
            position = after
            break
        if text[after : after + 1] != ",":
            raise JsonFault("expecting ',' or '}' between members", after)
        position = _skip_space(text, after + 1)
    _expect_end(text, position + 1)


def _skip_space(text: str, position: int = 0) -> int:
    found = _space.match(text, position)
    return found.end() if found else position


def line_and_column(text: str, offset: int) -> tuple[int, int]:
    """1-based line and column of a character offset."""
    return text.count("\n", 0, offset) + 1, offset - text.rfind("\n", 0, offset)


def caret(text: str, offset: int) -> str:
    """Two lines: the text around `offset`, within its line, and a caret below it."""
    first = text.rfind("\n", 0, offset) + 1
    last = text.find("\n", offset)
    last = len(text) if last < 0 else last
    start = max(first, offset - _EXCERPT * 2 // 3)
    shown = text[start : min(last, start + _EXCERPT)].rstrip().replace("\t", " ")
    lead = "…" if start > first else ""
    tail = "…" if start + _EXCERPT < last else ""
    indent = " " * cell_len(lead + shown[: offset - start])
    return f"    {lead}{shown}{tail}\n    {indent}^"


def _expect_end(text: str, position: int) -> None:
    position = _skip_space(text, position)
    if position != len(text):
        raise JsonFault("extra data after the end", position)


def _ends_at(text: str, error: json.JSONDecodeError) -> bool:
    # A string that never ends, or a fault at the very end: the text stops short rather than being
    # wrong.
    if error.msg.startswith("Unterminated string"):
        return True
    return _cut_literal(text, error.pos) is not None


def _second_occurrence(text: str, start: int, key: str) -> int:
    name = re.escape(json.dumps(key, ensure_ascii=False))
    found = [m.start() for m in re.finditer(name + r"\s*:", text[start : start + 1_000_000])]
    return start + (found[1] if len(found) > 1 else 0)
