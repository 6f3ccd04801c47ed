"""New data files, whole or not at all: JSON, JSON lines, parquet, CSV, chosen by the name's ending."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trueup.errors import ConfigError, DataError, ResourceError

WRITTEN_SUFFIXES = (".json", ".jsonl", ".parquet", ".csv")
_TABLE_ROWS = 4096  # turned into a table at a time


def check_target(path: Path, force: bool, key: str = "--output") -> None:
    """Refuse a name that cannot be written, before any work is done. Raises ConfigError."""
    if path.suffix.lower() not in WRITTEN_SUFFIXES:
        raise ConfigError(f"{path} has no ending that tells its type", where=key, expected=" | ".join(WRITTEN_SUFFIXES))
    check_free(path, force, key)


def check_free(path: Path, force: bool, key: str = "--output") -> None:
    """Refuse a file that is there, unless it may be replaced. Raises ConfigError."""
    if path.is_dir():
        raise ConfigError(f"{path} is a folder", where=key, expected="the name of a file")
    if path.exists() and not force:
        raise ConfigError(f"{path} exists already", where=key, fix="name another file, or add --force")


Add = Callable[[dict[str, Any]], None]


@contextmanager
def new_rows(path: Path) -> Iterator[Add]:
    """Rows added one after another, as the ending of `path` says; the file is there when the block ends well. Raises
    DataError for rows that the type cannot hold, ResourceError.
    """
    writer = {".json": _json, ".parquet": _parquet, ".csv": _csv}.get(path.suffix.lower(), _jsonl)
    with _staged(path) as stage, writer(stage, path) as add:
        yield add


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as `new_rows` does."""
    with new_rows(path) as add:
        for row in rows:
            add(row)


def write_text(path: Path, text: str) -> None:
    """Write a text file."""
    write_whole(path, lambda stage: stage.write_text(text, encoding="utf-8", newline="\n"))


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a file beside `path`, then put it in its place in one step."""
    with _staged(path) as stage:
        write(stage)


@contextmanager
def _staged(path: Path) -> Iterator[Path]:
    stage = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield stage
        with open(stage, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(stage, path)
    except OSError as error:
        raise ResourceError(f"cannot write {path}: {error.strerror or error}", fix="name a place with room") from error
    finally:
        stage.unlink(missing_ok=True)


@contextmanager
def _jsonl(stage: Path, path: Path) -> Iterator[Add]:
    with open(stage, "w", encoding="utf-8", newline="\n") as file:

        def add(row: dict[str, Any]) -> None:
            file.write(_text(row, path) + "\n")

        yield add


@contextmanager
def _json(stage: Path, path: Path) -> Iterator[Add]:
    with open(stage, "w", encoding="utf-8", newline="\n") as file:
        between = "[\n"

        def add(row: dict[str, Any]) -> None:
            nonlocal between
            file.write(between + _text(row, path))
            between = ",\n"

        yield add
        file.write("\n]\n" if between == ",\n" else "[\n\n]\n")


def _text(row: dict[str, Any], path: Path) -> str:
    try:
        return json.dumps(row, ensure_ascii=False)
    except (TypeError, ValueError) as error:  # dates and bytes of a table
        raise DataError(f"a row cannot be written as JSON: {error}", where=str(path), fix="write .parquet") from None


@contextmanager
def _csv(stage: Path, path: Path) -> Iterator[Add]:
    with open(stage, "w", encoding="utf-8", newline="") as file:
        writer: csv.DictWriter | None = None

        def add(row: dict[str, Any]) -> None:
            nonlocal writer
            if writer is None:
                writer = csv.DictWriter(file, list(row))
                writer.writeheader()
            # A row without a column, or with one more than others, is no text there either.
            for name in (*writer.fieldnames, *(row.keys() - set(writer.fieldnames))):
                if not isinstance(row.get(name), str) or name not in writer.fieldnames:
                    what = f"column `{name}` holds more than text, which a CSV file cannot"
                    raise DataError(what, where=str(path), fix="write .jsonl")
            writer.writerow(row)

        yield add


@contextmanager
def _parquet(stage: Path, path: Path) -> Iterator[Add]:
    import pyarrow as pa

    table = _Table(stage)
    try:
        yield table.add
        table.finish()
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        what = f"these rows are no table: {str(error).splitlines()[0]}"
        raise DataError(what, where=str(path), fix="write .jsonl") from None
    finally:
        table.remove()


class _Table:
    """A parquet file of rows whose types come out as they come: a part for each schema on the way, then one file."""

    def __init__(self, stage: Path) -> None:
        self._stage, self._parts = stage, list[Path]()
        self._rows: list[dict[str, Any]] = []
        self._schema: Any = None
        self._writer: Any = None

    def add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        if len(self._rows) == _TABLE_ROWS:
            self._flush()

    def finish(self) -> None:
        import pyarrow.parquet as pq

        if self._rows or not self._parts:
            self._flush()
        self._close()
        if len(self._parts) == 1:
            os.replace(self._parts[0], self._stage)
            return
        with pq.ParquetWriter(self._stage, self._schema) as whole:
            for part in self._parts:
                with pq.ParquetFile(part) as file:
                    for batch in file.iter_batches(_TABLE_ROWS):
                        whole.write_table(self._table(batch.to_pylist()))

    def remove(self) -> None:
        self._close()
        for part in self._parts:
            part.unlink(missing_ok=True)

    def _flush(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        names = dict.fromkeys(name for row in self._rows for name in row)
        found = pa.schema([(name, pa.array([row.get(name) for row in self._rows]).type) for name in names])
        schema = pa.unify_schemas([self._schema or found, found], promote_options="permissive")
        if self._writer is None or schema != self._schema:
            self._close()
            self._schema = schema
            self._parts.append(self._stage.with_name(f"{self._stage.name}-{len(self._parts)}"))
            self._writer = pq.ParquetWriter(self._parts[-1], schema)
        self._writer.write_table(self._table(self._rows))
        self._rows = []

    def _table(self, rows: list[dict[str, Any]]) -> Any:
        import pyarrow as pa

        columns = [pa.array([row.get(field.name) for row in rows], field.type) for field in self._schema]
        return pa.Table.from_arrays(columns, schema=self._schema)

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
