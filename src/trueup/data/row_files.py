"""Rows of one file one after another, from any place in it: memory stays flat however large the file is.

`readers.py` reads a file at once and lists all that is wrong with it; here the first fault ends the reading. A place is
a JSON value: opened there again, a file gives the same rows as if it had been read on.
"""

from __future__ import annotations

import codecs
import csv
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, BinaryIO, cast

from trueup.data import jsontext
from trueup.data.files import DataFile
from trueup.data.jsontext import JsonFault
from trueup.data.readers import (
    Faults,
    Row,
    check_header,
    is_one_object_a_line,
    kind_of_value,
    not_utf8,
    noticed,
    object_of_line,
)
from trueup.errors import DataError

Place = dict[str, Any]
_HEAD = 1024 * 1024  # bytes that show how a JSON file is laid out
_CHUNK = 256 * 1024
_BATCH = 256  # rows of a table converted at a time
_BOM = b"\xef\xbb\xbf"


class RowFile:
    """An open file: iterate for (row, line number or None); `place` is where the next row begins."""

    def __init__(self, file: DataFile, place: Place | None = None) -> None:
        self._file = file
        self._stack = ExitStack()
        if file.type in (".parquet", ".arrow"):
            reader: _Reader = _Table(file, self._stack, place or {})
        else:
            reader = _text_reader(file, self._stack, place or {})
        self._reader = reader
        self._rows = reader.rows()

    @property
    def place(self) -> Place:
        return self._reader.place()

    @property
    def notes(self) -> list[str]:
        """What was noticed so far, as `readers.read_file` says it."""
        return self._reader.notes()

    def __iter__(self) -> Iterator[tuple[Row, int | None]]:
        return self

    def __next__(self) -> tuple[Row, int | None]:
        return next(self._rows)

    def where(self, line: int | None) -> str:
        """ "file:line" of a row, as far as known."""
        return self._file.label if line is None else f"{self._file.label}:{line}"

    def close(self) -> None:
        self._stack.close()


class _Reader:
    """What all types of file have in common."""

    def rows(self) -> Iterator[tuple[Row, int | None]]:
        raise NotImplementedError

    def place(self) -> Place:
        raise NotImplementedError

    def notes(self) -> list[str]:
        return []


def _text_reader(file: DataFile, stack: ExitStack, place: Place) -> _Reader:
    raw = stack.enter_context(file.open())
    shape = {".csv": "table", ".tsv": "table", ".txt": "text"}.get(file.type) or place.get("shape")
    if shape is None:
        shape = _shape_of(file)
    if shape == "elements":
        return _Elements(file.label, raw, place)
    return {"table": _Cells, "text": _Documents, "lines": _Objects}[shape](file, raw, place)


def _shape_of(file: DataFile) -> str:
    """Whether a JSON file holds an object a line, or objects over several lines (of an array or not)."""
    with file.open() as raw:
        head = raw.read(_HEAD).removeprefix(_BOM).decode("utf-8", errors="ignore")
    is_array = head.lstrip().startswith("[")
    return "lines" if not is_array and is_one_object_a_line(head) else "elements"


def _go_to(raw: BinaryIO, offset: int) -> None:
    """Move to a byte; where a file cannot jump, what is before it is read and left."""
    if raw.seekable():
        raw.seek(offset)
        return
    while offset > 0:
        passed = len(raw.read(min(offset, _CHUNK)))
        if not passed:
            raise DataError("the file is shorter than it was")
        offset -= passed


# ---- line by line ----------------------------------------------------------------------------------


class _Lines(_Reader):
    """Text lines, decoded one at a time."""

    shape = ""

    def __init__(self, file: DataFile, raw: BinaryIO, place: Place) -> None:
        self.label, self.raw = file.label, raw
        self.offset, self.line = place.get("offset", 0), place.get("line", 0)
        self.marked, self.windows, self.blank = False, False, 0
        if self.offset:
            _go_to(raw, self.offset)

    def place(self) -> Place:
        return {"offset": self.offset, "line": self.line, "shape": self.shape}

    def notes(self) -> list[str]:
        return noticed(self.marked, self.windows, self.blank)

    def lines(self) -> Iterator[str]:
        """Each line with its end, counted as it is taken."""
        for data in self.raw:
            begin = self.offset
            self.offset += len(data)
            self.line += 1
            self.windows = self.windows or data.endswith(b"\r\n")
            self.marked = self.marked or (begin == 0 and data.startswith(_BOM))
            yield _decoded(self.label, data, begin, self.line)


def _decoded(label: str, data: bytes, offset: int, line: int) -> str:
    if offset == 0:
        if data.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise DataError([not_utf8(label, data, 0, "UTF-16")])
        data = data.removeprefix(_BOM)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError([not_utf8(label, data, error.start, line=line, base=offset)]) from None


class _Objects(_Lines):
    """JSONL."""

    shape = "lines"

    def rows(self) -> Iterator[tuple[Row, int | None]]:
        for line in self.lines():
            if line.isspace() or not line:
                self.blank += 1
                continue
            faults = Faults(self.label)
            row = object_of_line(line.rstrip("\r\n"), self.line, faults)
            faults.raise_any(0)
            assert row is not None
            yield row, self.line


class _Documents(_Lines):
    """A document a line."""

    shape = "text"

    def rows(self) -> Iterator[tuple[Row, int | None]]:
        for line in self.lines():
            if line.strip():
                yield {"text": line.rstrip("\n").rstrip("\r")}, self.line
            else:
                self.blank += 1


class _Cells(_Lines):
    """CSV or TSV with a header."""

    shape = "table"

    def __init__(self, file: DataFile, raw: BinaryIO, place: Place) -> None:
        super().__init__(file, raw, place)
        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
        self.delimiter = "\t" if file.type == ".tsv" else ","
        self.header: list[str] | None = place.get("header")

    def place(self) -> Place:
        return {**super().place(), "header": self.header}

    def rows(self) -> Iterator[tuple[Row, int | None]]:
        reader = csv.reader(self.lines(), strict=True, delimiter=self.delimiter)  # takes the lines it needs, no more
        try:
            if self.header is None:
                self.header = next(reader, [])
                check_header(self.label, self.header)
            first = self.line + 1
            for cells in reader:
                if cells and len(cells) != len(self.header):
                    what = f"{len(cells)} cells, but the header has {len(self.header)}"
                    raise DataError(what, where=f"{self.label}:{first}")
                if cells:
                    yield dict(zip(self.header, cells, strict=True)), first
                first = self.line + 1
        except csv.Error as error:
            raise DataError(str(error), where=f"{self.label}:{self.line}") from None


# ---- objects over several lines --------------------------------------------------------------------


class _Elements(_Reader):
    """Objects of an array, or one after another, decoded from a window of the file's text."""

    def __init__(self, label: str, raw: BinaryIO, place: Place) -> None:
        self.label, self.raw = label, raw
        self.offset, self.line = place.get("offset", 0), place.get("line", 1)  # of the character at `at`
        self.count, self.array = place.get("count", 0), place.get("array")
        self.text, self.at, self.ended = "", 0, False
        self._decode_bytes = codecs.getincrementaldecoder("utf-8")()
        self._read = self.offset  # bytes taken from the file
        self.marked, self.windows = False, False
        if self.offset:
            _go_to(raw, self.offset)

    def place(self) -> Place:
        place = {"offset": self.offset, "line": self.line, "count": self.count, "array": self.array}
        return {**place, "shape": "elements"}

    def notes(self) -> list[str]:
        return noticed(self.marked, self.windows)

    def rows(self) -> Iterator[tuple[Row, int | None]]:
        if self.array is None:
            self.array = self._next_mark() == "["
            self._move(int(self.array))
        while self._has_more():
            line = self.line
            value = self._element()
            if not isinstance(value, dict):
                what = f"element {self.count} is {kind_of_value(value)}, not an object with columns"
                raise DataError(what, where=f"{self.label}:{line}")
            self.count += 1
            yield value, line

    def _has_more(self) -> bool:
        """Go to the next element, over what stands between two."""
        mark = self._next_mark()
        if mark == "," and self.count:
            self._move(1)
            return bool(self._next_mark() or self.array)
        if self.array and mark == "]":
            self._move(1)
            if self._next_mark():
                raise self._problem("extra data after the end")
            return False
        if self.array and self.count:
            raise self._problem("expecting ',' or ']' between elements") if mark else self._cut_off()
        if self.array and not mark:
            raise self._cut_off()
        return bool(mark)

    def _element(self) -> Any:
        while True:
            try:
                value, end = jsontext.decode(self.text, self.at)
            except JsonFault as fault:
                if fault.truncated and self._fill():
                    continue
                if fault.truncated:
                    raise self._cut_off() from None
                excerpt = jsontext.caret(self.text, fault.offset)
                self._move(fault.offset - self.at)
                raise self._problem(f"{fault.message}, in element {self.count}\n{excerpt}") from None
            self._move(end - self.at)
            return value

    def _next_mark(self) -> str:
        """The next character that is no white space; "" at the end of the file."""
        while True:
            rest = self.at
            while rest < len(self.text) and self.text[rest] in " \t\n\r":
                rest += 1
            self._move(rest - self.at)
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._fill():
                return ""

    def _move(self, count: int) -> None:
        passed = self.text[self.at : self.at + count]
        self.offset += len(passed.encode("utf-8"))
        self.line += passed.count("\n")
        self.at += count

    def _fill(self) -> bool:
        """Read on; what has been passed is let go. False at the end of the file."""
        if self.ended:
            return False
        rest = self.text[self.at :]
        data = self.raw.read(max(_CHUNK, len(rest)))  # twice as much each time for a long element
        if self._read == 0:
            if data.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise DataError([not_utf8(self.label, data, 0, "UTF-16")])
            if data.startswith(_BOM):
                data, self.offset, self._read, self.marked = data[3:], 3, 3, True
        begun = self._decode_bytes.getstate()[0]  # bytes of a character that goes on in `data`
        try:
            more = self._decode_bytes.decode(data, final=not data)
        except UnicodeDecodeError as error:
            line, base = self.line + rest.count("\n"), self._read - len(begun)
            raise DataError([not_utf8(self.label, begun + data, error.start, line=line, base=base)]) from None
        self._read += len(data)
        self.windows = self.windows or b"\r\n" in data
        self.text, self.at, self.ended = rest + more, 0, not data
        return True

    def _problem(self, what: str) -> DataError:
        return DataError(what, where=f"{self.label}:{self.line}")

    def _cut_off(self) -> DataError:
        size = f"{self._read:,}".replace(",", " ")
        what = f"file ends inside element {self.count} (byte {size}); truncated download?"
        return DataError(what, where=f"{self.label}:{self.line}", fix="fetch the file again")


# ---- tables ----------------------------------------------------------------------------------------


class _Table(_Reader):
    """Parquet or Arrow (file or stream), a batch of rows in memory at a time."""

    def __init__(self, file: DataFile, stack: ExitStack, place: Place) -> None:
        self.file, self.row = file, place.get("row", 0)
        self.source = stack.enter_context(file.open())
        if not self.source.seekable():
            raise DataError("a compressed table cannot be streamed", where=file.label, fix="unpack the file")

    def place(self) -> Place:
        return {"row": self.row}

    def rows(self) -> Iterator[tuple[Row, int | None]]:
        import pyarrow as pa

        try:
            for batch in self._batches():
                for start in range(0, batch.num_rows, _BATCH):
                    for row in batch.slice(start, _BATCH).to_pylist():
                        self.row += 1
                        yield row, None
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(
                f"not a readable {self.file.type[1:]} file: {str(error).splitlines()[0]}",
                where=self.file.label,
                fix="fetch or write the file again",
            ) from None

    def _batches(self) -> Iterator[Any]:
        """Record batches from row `row` on."""
        skip = self.row
        for size, load in self._pieces():
            if size is not None and skip >= size:
                skip -= size
                continue
            for batch in load():
                if skip >= batch.num_rows:
                    skip -= batch.num_rows
                    continue
                yield batch.slice(skip)
                skip = 0

    def _pieces(self) -> Iterator[tuple[int | None, Any]]:
        """(rows if known without reading, the record batches of it) of each part that can be passed over."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self.file.type == ".parquet":
            # Without these two, a row group of gigabytes would be read at once.
            table = pq.ParquetFile(self.source, pre_buffer=False, buffer_size=_HEAD)
            for group in range(table.num_row_groups):
                rows = table.metadata.row_group(group).num_rows
                yield rows, lambda group=group: table.iter_batches(_BATCH, row_groups=[group])
            return
        try:
            reader = pa.ipc.open_file(self.source)
        except pa.ArrowInvalid:
            self.source.seek(0)
            stream = pa.ipc.open_stream(self.source)
            yield None, lambda: iter(stream)
            return
        for number in range(reader.num_record_batches):
            yield None, lambda number=number: cast(Any, [reader.get_batch(number)])
