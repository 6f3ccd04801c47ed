"""New data files, whole or not at all: JSON, JSON lines, parquet, CSV, chosen by the name's ending."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trueup.errors import ConfigError, DataError, ResourceError

WRITTEN_SUFFIXES = (".json", ".jsonl", ".parquet", ".csv")


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


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as the ending of `path` says. Raises DataError for rows that the type cannot hold."""
    writer = {".json": _json, ".parquet": _parquet, ".csv": _csv}.get(path.suffix.lower(), _jsonl)
    write_whole(path, lambda stage: writer(stage, rows, path))


def write_text(path: Path, text: str) -> None:
    """Write a text file."""
    write_whole(path, lambda stage: stage.write_text(text, encoding="utf-8", newline="\n"))


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a file beside `path`, then put it in its place in one step."""
    stage = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(stage)
        with open(stage, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(stage, path)
    except OSError as error:
        raise ResourceError(f"cannot write {path}: {error.strerror or error}", fix="name a place with room") from error
    finally:
        stage.unlink(missing_ok=True)


def _jsonl(stage: Path, rows: Sequence[dict[str, Any]], path: Path) -> None:
    with open(stage, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(_text(row, path) + "\n" for row in rows)


def _json(stage: Path, rows: Sequence[dict[str, Any]], path: Path) -> None:
    with open(stage, "w", encoding="utf-8", newline="\n") as file:
        file.write("[\n" + ",\n".join(_text(row, path) for row in rows) + "\n]\n")


def _text(row: dict[str, Any], path: Path) -> str:
    try:
        return json.dumps(row, ensure_ascii=False)
    except (TypeError, ValueError) as error:  # dates and bytes of a table
        raise DataError(f"a row cannot be written as JSON: {error}", where=str(path), fix="write .parquet") from None


def _parquet(stage: Path, rows: Sequence[dict[str, Any]], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = list(dict.fromkeys(name for row in rows for name in row))
    try:
        table = pa.table({name: pa.array([row.get(name) for row in rows]) for name in names})
        pq.write_table(table, stage)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        what = f"these rows are no table: {str(error).splitlines()[0]}"
        raise DataError(what, where=str(path), fix="write .jsonl") from None


def _csv(stage: Path, rows: Sequence[dict[str, Any]], path: Path) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    for row in rows:
        for name in names:
            if not isinstance(row.get(name), str):
                what = f"column `{name}` holds more than text, which a CSV file cannot"
                raise DataError(what, where=str(path), fix="write .jsonl")
    with open(stage, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
