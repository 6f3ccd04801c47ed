"""Rows of one file, by its type: JSON in three shapes, CSV and TSV, lines of text, Parquet and Arrow.

A row is a dict, exactly as the file has it: nothing is coerced here. Faults in a file's syntax are
always errors, all of them at once (up to ten are shown): a file that is half read is worse than one
that is refused.
"""

from __future__ import annotations

import csv
import io
import logging
import sys
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trueup.data import jsontext
from trueup.data.files import DataFile
from trueup.data.jsontext import JsonFault
from trueup.data.registry import type_of
from trueup.errors import DataError, Problem

log = logging.getLogger("trueup")

Row = dict[str, Any]
_SHOWN = 10  # faults listed per file; the rest is counted
_IN_FULL = 3
_SAMPLE = 64 * 1024  # bytes looked at to guess an encoding
_LONG_MEGABYTES = 200  # a file whose reading takes long enough to be said


@dataclass(slots=True)
class Part:
    """What one file held."""

    values: list[Row]
    lines: array = field(default_factory=lambda: array("q"))
    notes: list[str] = field(default_factory=list)


def read_file(file: DataFile) -> Part:
    """The rows of a file. Raises DataError, or ModelError if it is out of reach."""
    if file.type in (".parquet", ".arrow"):
        return _read_table(file)
    if file.path and (megabytes := file.path.stat().st_size >> 20) > _LONG_MEGABYTES:
        log.info("reading %s (%s MB)", file.label, f"{megabytes:,}")
    text, notes = _decode(file.label, file.read())
    part = _TEXT_READERS.get(file.type, _read_json)(file.label, text)
    part.notes = notes + part.notes
    return part


# ---- text ----------------------------------------------------------------------------------------


def _decode(label: str, data: bytes) -> tuple[str, list[str]]:
    """UTF-8 text without its byte order mark, and what was noticed on the way. Raises DataError
    (D4).
    """
    marked = data.startswith(b"\xef\xbb\xbf")
    if marked:
        data = data[3:]
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError([not_utf8(label, data, 0, "UTF-16")])
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError([not_utf8(label, data, error.start)]) from None
    return text, noticed(marked, "\r\n" in text)


def noticed(marked: bool, windows: bool, blank: int = 0) -> list[str]:
    """What is said of a byte order mark, Windows line ends and blank lines (D3)."""
    notes = ["begins with a byte order mark, which is left out"] if marked else []
    if windows:
        notes.append("has Windows line ends (CRLF), which are read as line ends")
    if blank:
        notes.append(f"{blank:,} blank line{'s' * (blank > 1)} left out")
    return notes


def not_utf8(
    label: str, data: bytes, offset: int, encoding: str | None = None, line: int = 1, base: int = 0
) -> Problem:
    """The byte at `offset` of `data` is no UTF-8 (D4); `data` begins at line `line` and byte `base` of its file."""
    encoding = encoding or _guess_encoding(data, offset)
    line += data.count(b"\n", 0, offset)
    path = Path(label)
    target = path.with_name(f"{path.stem}.utf8{path.suffix}")
    return Problem(
        f"not UTF-8: byte 0x{data[offset]:02x} at offset {base + offset}"
        + (f"; it looks like {encoding}" if encoding else ""),
        where=f"{label}:{line}",
        expected="UTF-8",
        fix=f'iconv -f {encoding or "ENCODING"} -t UTF-8 "{path}" > "{target}"',
    )


def _guess_encoding(data: bytes, offset: int) -> str | None:
    from charset_normalizer import from_bytes

    # Whole lines around the fault: a window cut inside a character would mislead the guess.
    start = data.rfind(b"\n", 0, max(0, offset - _SAMPLE // 2)) + 1
    stop = data.find(b"\n", start + _SAMPLE)
    best = from_bytes(data[start : stop if stop > 0 else len(data)][: 4 * _SAMPLE]).best()
    if best is None:
        return None
    # GB18030 contains GBK contains GB2312: the largest converts whatever the smaller ones can.
    return "GB18030" if best.encoding in ("gb2312", "gbk", "gb18030") else best.encoding.upper()


def _read_lines(label: str, text: str) -> Part:
    """A document a line; blank lines are no documents."""
    lines = text.split("\n")
    part = Part([])
    for number, line in enumerate(lines, 1):
        if line.strip():
            part.values.append({"text": line.rstrip("\r")})
            part.lines.append(number)
    part.notes = noticed(False, False, sum(1 for line in lines[:-1] if not line.strip()))
    return part


def check_header(label: str, header: list[str]) -> None:
    """Raise DataError if a table gives a column twice."""
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(f"column {twice[0]!r} is there twice", where=f"{label}:1")


def _read_table_of_text(label: str, text: str) -> Part:
    """CSV or TSV with a header. Every cell is text, as written."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter="\t" if type_of(label) == ".tsv" else ",")
    faults, part = Faults(label), Part([])
    try:
        header = next(reader, [])
        check_header(label, header)
        line = reader.line_num + 1
        for cells in reader:
            if not cells:
                pass  # a blank line
            elif len(cells) == len(header):
                part.values.append(dict(zip(header, cells, strict=True)))
                part.lines.append(line)
            else:
                faults.add(line, f"{len(cells)} cells, but the header has {len(header)}")
            line = reader.line_num + 1
    except csv.Error as error:
        faults.add(reader.line_num, str(error))
    faults.raise_any(len(part.values))
    return part


# ---- JSON ----------------------------------------------------------------------------------------


@dataclass(slots=True)
class Faults:
    """Faults of one file: the first three with their text, ten with their place, all counted."""

    label: str
    problems: list[Problem] = field(default_factory=list)
    count: int = 0

    def add(self, line: int, what: str, column: int | None = None, excerpt: str = "") -> None:
        self.count += 1
        if len(self.problems) < _SHOWN:
            where = f"{self.label}:{line}" + (f":{column}" if column else "")
            shown = f"\n{excerpt}" if excerpt and len(self.problems) < _IN_FULL else ""
            self.problems.append(Problem(what + shown, where))

    def raise_any(self, good: int) -> None:
        if not self.count:
            return
        if self.count > 1:
            shown = f", the first {_SHOWN} of them" if self.count > len(self.problems) else ""
            total = f"{self.count:,} of {good + self.count:,} lines cannot be read{shown}"
            self.problems.insert(0, Problem(total, self.label))
        raise DataError(self.problems)


def _read_json(label: str, text: str) -> Part:
    """An array of objects, an object a line, or objects one after another: told apart by their
    look.
    """
    start = len(text) - len(text.lstrip())
    if text.startswith("[", start):
        return _collect(label, text, jsontext.array_elements(text, start))
    if is_one_object_a_line(text):
        return _read_jsonl(label, text)
    return _collect(label, text, jsontext.successive_values(text, start))


def is_one_object_a_line(text: str) -> bool:
    """Whether a line that begins an object also ends it; one faulty line must not decide."""
    first: list[str] = []
    position = 0
    while position < len(text) and len(first) < 5:
        end = text.find("\n", position)
        end = len(text) if end < 0 else end
        if text.startswith("{", position):
            first.append(text[position:end].rstrip())
        position = end + 1
    if any(line.endswith("},") and _is_whole(line[:-1]) for line in first):
        return False  # objects one after another, with commas between them
    # Lines that all hold more than a brace are meant as JSONL, faulty as they are.
    head = [line for line in text[:_SAMPLE].split("\n") if line.strip()]
    meant = len(head) > 1 and all(line.startswith("{") and line.rstrip()[1:] for line in head)
    return meant or any(_is_whole(line) for line in first)


def _is_whole(line: str) -> bool:
    try:
        jsontext.decode_all(line)
    except JsonFault as fault:
        return fault.complete
    return True


def _read_jsonl(label: str, text: str) -> Part:
    faults, part, blank = Faults(label), Part([]), 0
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        if not line or line.isspace():
            blank += 1
            continue
        row = object_of_line(line, number, faults)
        if row is not None:
            part.values.append(row)
            part.lines.append(number)
    faults.raise_any(len(part.values))
    part.notes = noticed(False, False, blank - (not lines[-1]))
    return part


def object_of_line(line: str, number: int, faults: Faults) -> Row | None:
    """The row that a line of JSONL holds; None, and a fault more, if it holds none."""
    try:
        value = jsontext.decode_all(line)
    except JsonFault as fault:
        faults.add(number, fault.message, fault.offset + 1, jsontext.caret(line, fault.offset))
        return None
    if not isinstance(value, dict):
        faults.add(number, f"this line holds {kind_of_value(value)}, not an object")
        return None
    return value


def _collect(label: str, text: str, elements: Iterator[tuple[Any, int]]) -> Part:
    """The objects of an array, or of a run of objects. Raises DataError (D1, D2)."""
    faults, part, line, seen = Faults(label), Part([]), 1, 0
    try:
        for value, offset in elements:
            line += text.count("\n", seen, offset)
            seen = offset
            if isinstance(value, dict):
                part.values.append(value)
                part.lines.append(line)
            else:
                faults.add(line, f"element {len(part.lines)} is {kind_of_value(value)}, not an object with columns")
    except JsonFault as fault:
        number, column = jsontext.line_and_column(text, fault.offset)
        where = f"{label}:{number}:{column}"
        if fault.truncated:
            size = f"{len(text.encode('utf-8')):,}".replace(",", " ")
            what = f"file ends inside element {len(part.values)} (byte {size}); truncated download?"
            faults.problems.insert(0, Problem(what, where, fix="fetch the file again"))
        else:
            excerpt = jsontext.caret(text, fault.offset)
            what = f"{fault.message}, in element {len(part.values)}\n{excerpt}"
            faults.problems.insert(0, Problem(what, where))
        raise DataError(faults.problems) from None
    faults.raise_any(len(part.values))
    return part


def kind_of_value(value: Any) -> str:
    """What a JSON value is, in a user's words."""
    names = {list: "a list", str: "text", bool: "true/false", type(None): "null"}
    return names.get(type(value), "a number")


_TEXT_READERS: dict[str, Callable[[str, str], Part]] = {
    ".csv": _read_table_of_text,
    ".tsv": _read_table_of_text,
    ".txt": _read_lines,
}


# ---- tables --------------------------------------------------------------------------------------


def _read_table(file: DataFile) -> Part:
    """Parquet or Arrow (file or stream), read in memory: no cache is written anywhere."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    is_here = file.path is not None and file.compression is None
    source = pa.memory_map(str(file.path)) if is_here else pa.BufferReader(file.read())
    try:
        if file.type == ".parquet":
            return Part(pq.read_table(source).to_pylist())
        try:
            table = pa.ipc.open_file(source).read_all()
        except pa.ArrowInvalid:
            source.seek(0)
            table = pa.ipc.open_stream(source).read_all()
        return Part(table.to_pylist())
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(
            f"not a readable {file.type[1:]} file: {str(error).splitlines()[0]}",
            where=file.label,
            fix="fetch or write the file again",
        ) from None
