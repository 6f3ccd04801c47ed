"""Rows of a dataset, wherever they are: files, folders, globs, URLs and hubs.

Rows remember the file and line they came from, so that every later complaint can point there.
"""

from __future__ import annotations

import logging
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from trueup.data.files import DataFile, list_files, list_urls, local
from trueup.data.hubs import load_from_hub, stream_from_hub
from trueup.data.readers import Part, Row, read_file
from trueup.data.registry import DatasetSpec
from trueup.data.row_files import RowFile
from trueup.data.store import Copy, find_copy
from trueup.errors import DataError, ModelError

log = logging.getLogger("trueup")


@dataclass(slots=True)
class Rows(Sequence[Row]):
    """The rows of one dataset, in file order, with the place each came from.

    `lines` holds a 1-based line number per row where the file type has lines (else it is empty).
    """

    name: str
    values: list[Row] = field(default_factory=list)
    lines: array = field(default_factory=lambda: array("q"))
    starts: list[int] = field(default_factory=list)  # index of each file's first row
    labels: list[str] = field(default_factory=list)  # … and that file's name
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index):
        return self.values[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.values)

    def where(self, index: int) -> str:
        """ "file:line" of a row, as far as known."""
        if not self.labels:
            return self.name
        label = self.labels[bisect_right(self.starts, index) - 1]
        return f"{label}:{self.lines[index]}" if self.lines else f"{label} row {index}"

    def add(self, label: str, part: Part) -> None:
        """Append one file's rows."""
        self.starts.append(len(self.values))
        self.labels.append(label)
        if len(part.lines) == len(part.values):
            self.lines.extend(part.lines)
        self.values += part.values
        self.notes += part.notes


def read_rows(
    spec: DatasetSpec,
    *,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    first: int | None = None,
    tell: bool = True,
) -> Rows:
    """Every row of a dataset. Raises DataError with all faults, or ModelError if a hub is out of
    reach.

    Args:
        first: do with so many rows, and read no further in files than that.
        tell: log what was noticed; else it is in `notes` only.
    """
    if spec.rows is not None:
        return Rows(spec.name, list(spec.rows)[:first])  # type: ignore[arg-type]
    files = files_of(spec)
    if files and first is not None:
        with suppress(DataError):  # reading all of them tells all that is wrong
            return _read_first(spec.name, files, first)
    rows = _read_all(spec.name, files) if files else _from_hub(spec, token, cache_dir, first)
    for note in dict.fromkeys(rows.notes if tell else ()):
        log.info("dataset %s: %s", spec.name, note)
    return rows


def files_of(spec: DatasetSpec) -> list[DataFile]:
    """The files that a dataset's rows are in; none if they come from a hub or are in memory. Raises DataError or
    ModelError.
    """
    if spec.rows is not None:
        return []
    if copy := _copy_of(spec):
        log.info("dataset %s: the copy fetched on %s is read", spec.name, copy.fetched)
        return [local(copy.file)]
    if spec.url:
        return list_urls(spec.url, spec)
    if spec.hub_id and not _is_folder(spec):
        return []
    return [local(path) for path in list_files(spec.source or Path(spec.hub_id or ""), spec)]


def _copy_of(spec: DatasetSpec) -> Copy | None:
    return None if _is_folder(spec) else find_copy(spec)


def _is_folder(spec: DatasetSpec) -> bool:
    return bool(spec.hub_id) and Path(spec.hub_id or "").is_dir()  # where a hub is out of reach, a folder of its name


def _from_hub(spec: DatasetSpec, token: str | None, cache_dir: str | Path | None, first: int | None) -> Rows:
    if first is not None and "+" not in (spec.subset or ""):
        with suppress(ModelError):  # its library may have kept all of it, which needs no network
            rows = Rows(spec.name, [row for row, _ in islice(stream_from_hub(spec, token, cache_dir), first)])
            kept = f"`trueup data get {spec.catalogue or spec.hub_id}` keeps a copy of all"
            log.info("dataset %s: %d rows are read from the hub; %s", spec.name, len(rows), kept)
            return rows
    dataset = load_from_hub(spec, token, cache_dir)
    return Rows(spec.name, (dataset if first is None else dataset.take(first)).to_list())


def _read_first(name: str, files: Sequence[DataFile], count: int) -> Rows:
    rows = Rows(name)
    for file in files:
        part = Part([])
        with closing(RowFile(file)) as opened:
            for row, line in islice(opened, count - len(rows)):
                part.values.append(row)
                if line is not None:
                    part.lines.append(line)
        rows.add(file.label, part)
        if len(rows) == count:
            break
    return rows


def _read_all(name: str, files: Sequence[DataFile]) -> Rows:
    rows, problems = Rows(name), []
    for file in files:
        try:
            rows.add(file.label, read_file(file))
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    return rows
