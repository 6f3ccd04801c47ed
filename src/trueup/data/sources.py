"""Rows of a dataset, wherever they are: files, folders, globs, URLs and hubs.

Rows remember the file and line they came from, so that every later complaint can point there.
"""

from __future__ import annotations

import glob
import json
import logging
import os
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trueup.data.hubs import fetch_file, load_from_hub
from trueup.data.readers import Part, Row, read_file
from trueup.data.registry import FILE_SUFFIXES, REGISTRY_NAMES, DatasetSpec, missing_path
from trueup.data.store import find_copy
from trueup.errors import DataError, Problem

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


def read_rows(spec: DatasetSpec, *, token: str | None = None, cache_dir: str | Path | None = None) -> Rows:
    """Every row of a dataset. Raises DataError with all faults, or ModelError if a hub is out of
    reach.
    """
    has_folder = spec.hub_id and Path(spec.hub_id).is_dir()  # where a hub is out of reach, a folder of its name
    copy = None if has_folder else find_copy(spec)
    if copy:
        log.info("dataset %s: the copy fetched on %s is read", spec.name, copy.fetched)
        rows = _read_all(spec.name, [(_label(copy.file), copy.file)])
    elif spec.hub_id and not has_folder:
        rows = Rows(spec.name, load_from_hub(spec, token, cache_dir).to_list())
    elif spec.url:
        rows = _read_all(spec.name, [(spec.url, fetch_file(spec.url))])
    else:
        files = list_files(spec.source or Path(spec.hub_id or ""), spec)
        rows = _read_all(spec.name, ((_label(path), path) for path in files))
    for note in dict.fromkeys(rows.notes):
        log.info("dataset %s: %s", spec.name, note)
    return rows


def list_files(source: Path, spec: DatasetSpec) -> list[Path]:
    """The data files a path, folder or glob stands for, sorted. Raises DataError (D19)."""
    source = source / spec.folder if spec.folder else source
    where = f"dataset {spec.name!r} ({spec.origin})"
    if source.is_file():
        _refuse_unknown_types([source], where)
        return [source]
    if source.is_dir():
        return _files_in(source, where)
    if glob.has_magic(str(source)):
        files = sorted(Path(p) for p in glob.glob(str(source), recursive=True))
        files = [p for p in files if p.is_file()]
        if not files:
            raise DataError(f"no file matches {source.absolute()}", where=where, fix="check the pattern")
        _refuse_unknown_types(files, where)
        _refuse_mixed_types(files, source, where)
        return files
    problem = missing_path(source)
    raise DataError([Problem(problem.what, where, fix=problem.fix)])


def _files_in(folder: Path, where: str) -> list[Path]:
    """Data files below a folder. Hidden files and the registry are no data; other files are named
    in a note.
    """
    if (folder / "state.json").is_file() and any(folder.glob("*.arrow")):
        return _saved_to_disk(folder)
    files, others = [], []
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if any(part.startswith(".") for part in inside.parts) or not path.is_file():
            continue
        if path.name in REGISTRY_NAMES:
            continue
        (files if path.suffix.lower() in FILE_SUFFIXES else others).append(path)
    if not files:
        raise DataError(
            f"no data file in {folder.absolute()}",
            where=where,
            expected=f"files of one type: {', '.join(FILE_SUFFIXES)}",
        )
    _refuse_mixed_types(files, folder, where)
    if others:
        log.info("%s: left out %s", where, ", ".join(p.name for p in others[:5]))
    return files


def _saved_to_disk(folder: Path) -> list[Path]:
    # What `datasets.Dataset.save_to_disk` leaves: the order of its pieces stands in state.json.
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return [folder / piece["filename"] for piece in state["_data_files"]]


def _refuse_unknown_types(files: list[Path], where: str) -> None:
    unknown = [path for path in files if path.suffix.lower() not in FILE_SUFFIXES]
    if unknown:
        raise DataError(
            f"cannot tell the type of {', '.join(p.name for p in unknown[:3])}",
            where=where,
            expected=f"a name that ends in {', '.join(FILE_SUFFIXES)}",
        )


def _refuse_mixed_types(files: list[Path], source: Path, where: str) -> None:
    suffixes = sorted({_type_of(path) for path in files})
    if len(suffixes) > 1:
        raise DataError(
            f"{source.absolute()} holds files of several types: {', '.join(suffixes)}",
            where=where,
            expected="files of one type",
            fix=f"name the files of one type by a pattern, as in {source.parent}/*{suffixes[0]}",
        )


def _type_of(path: Path) -> str:
    suffix = path.suffix.lower()
    return ".jsonl" if suffix == ".ndjson" else suffix


def _label(path: Path) -> str:
    """A path as a user would type it from here."""
    relative = os.path.relpath(path) if path.anchor == Path.cwd().anchor else str(path)
    return str(path.absolute()) if relative.startswith("..") else relative


def _read_all(name: str, files) -> Rows:
    rows, problems = Rows(name), []
    for label, content in files:
        try:
            rows.add(label, read_file(label, content))
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    return rows
