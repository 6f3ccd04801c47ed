"""Rows of a dataset for the verbs that write new files: read one after another, parsed, accounted for.

read = kept + dropped, always; a row that is dropped has its id and a reason in the outcome.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trueup.data.counts import counted, number
from trueup.data.examples import Example, Kind
from trueup.data.express import TYPE_OF
from trueup.data.formats import RowProblem, ShapeProblem, parse_with
from trueup.data.layout import PEEKED, Layout, choose_layout, kind_of
from trueup.data.passes import Passes
from trueup.data.readers import Row
from trueup.data.register import enter
from trueup.data.registry import DatasetSpec, resolve_datasets
from trueup.data.report import shorten
from trueup.data.write import write_text
from trueup.errors import DataError, Problem

_SHOWN = 10
_SHOWN_IDS = 4


@dataclass(slots=True)
class RowSet:
    """A dataset's rows, each with the example of `kind` that it is, read anew whenever they are iterated.

    columns: every name that a row has. unusable: how many rows were no example, once they have been iterated.
    """

    spec: DatasetSpec
    passes: Passes
    kind: Kind
    layout: Layout
    count: int
    columns: list[str]
    unusable: int = 0

    def row_id(self, index: int) -> str:
        return f"{self.spec.name}:{index}"

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[int, Row, Example | RowProblem]]:
        """(index, row, what it says or why it says nothing). Raises DataError at the end, for columns that hold
        something else than their role wants; and whatever is wrong with the files.
        """
        faults: dict[tuple[str, str, str], list[tuple[int, str]]] = {}
        self.unusable = 0
        for index, row, where in self.passes:
            try:
                yield index, row, parse_with(self.layout, self.row_id(index), row)
            except RowProblem as problem:
                self.unusable += 1
                yield index, row, problem
            except ShapeProblem as problem:
                faults.setdefault((problem.column, problem.found, problem.expected), []).append((index, where))
        if faults:
            raise DataError([_shape_problem(self.spec.name, *fault) for fault in [*faults.items()][:_SHOWN]])


@dataclass(slots=True)
class Outcome:
    """What a verb made of a dataset's rows.

    dropped: (row, reason, detail). notes: what else a user should know. entries: how each file is registered.
    """

    verb: str
    read: int
    kept: int
    dropped: list[tuple[str, str, str]] = field(default_factory=list)
    files: dict[str, int] = field(default_factory=dict)  # file → its rows
    notes: list[str] = field(default_factory=list)
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)  # file → registry entry
    registered: dict[str, str] = field(default_factory=dict)  # name → registry

    def __post_init__(self) -> None:
        assert self.read == self.kept + len(self.dropped), (self.read, self.kept, len(self.dropped))

    def to_dict(self) -> dict[str, Any]:
        return {
            "verb": self.verb,
            "read": self.read,
            "kept": self.kept,
            "dropped": len(self.dropped),
            "files": self.files,
            "dropped_rows": [dict(zip(("row", "reason", "detail"), row, strict=True)) for row in self.dropped],
            "notes": self.notes,
            "entries": self.entries,
            "registered": self.registered,
        }

    def render(self) -> str:
        read = counted(self.read, "row", "rows")
        lines = [f"{read} read, {number(self.kept)} kept, {number(len(self.dropped))} dropped"]
        for reason, count in Counter(reason for _, reason, _ in self.dropped).most_common():
            rows = [row for row, why, _ in self.dropped if why == reason]
            more = " …" if count > _SHOWN_IDS else ""
            lines.append(f"  {number(count)} {reason}: {', '.join(rows[:_SHOWN_IDS])}{more}")
        lines += [f"  {note}" for note in self.notes]
        lines += [f"wrote {file}: {counted(rows, 'row', 'rows')}" for file, rows in self.files.items()]
        lines += [f"registered in {registry}: dataset: {name}" for name, registry in self.registered.items()]
        if not self.registered:
            lines.append("its entry for dataset_info.json, which --register makes:")
            lines += [f"  {_entry_line(Path(file), entry)}" for file, entry in self.entries.items()]
        return "\n".join(lines)

    def register(self, names: Sequence[str], dataset_dir: str | Path) -> None:
        """Enter the files in a registry, under these names. Raises ConfigError if one is taken."""
        for name, (file, entry) in zip(names, self.entries.items(), strict=True):
            self.registered[name] = str(enter(name, Path(file), entry, dataset_dir))

    def write_report(self, path: Path) -> None:
        """All of it as JSON, every dropped row with its id."""
        write_text(path, json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n")


def _entry_line(file: Path, entry: dict[str, Any]) -> str:
    return f"{json.dumps(file.stem)}: {json.dumps({'file_name': str(file), **entry}, ensure_ascii=False)}"


def read_set(name: str, dataset_dir: str | Path = "data", hub: str = "huggingface", want: Kind | None = None) -> RowSet:
    """Read a dataset, as examples of the kind its rows are unless `want` says another.

    Raises:
        ConfigError, DataError, ModelError: as reading it for a training would.
    """
    (spec,) = resolve_datasets([name], dataset_dir, hub)
    passes = Passes(spec)
    passes.tell_if_long()
    peek = Peek()
    for _, row, _ in passes:
        peek.add(row)
    if not peek.count:
        raise DataError(f"dataset {spec.name!r} has no rows", where=spec.origin)
    kind = want or kind_of(spec, peek.rows())
    return RowSet(spec, passes, kind, choose_layout(spec, peek.rows(), kind), peek.count, list(peek.columns))


@dataclass(slots=True)
class Peek:
    """What decides how rows are read: the first of them, and the columns of all."""

    count: int = 0
    first: list[Row] = field(default_factory=list)
    columns: dict[str, None] = field(default_factory=dict)  # in the order in which they appear

    def add(self, row: Row) -> None:
        self.count += 1
        if self.count <= PEEKED:
            self.first.append(row)
        if row.keys() - self.columns.keys():
            self.columns.update(dict.fromkeys(row))

    def rows(self) -> list[Mapping[str, Any]]:
        """The first rows, and one without values that has every column."""
        return [*self.first, dict(self.columns)] if self.count > PEEKED else [*self.first]


def _shape_problem(name: str, fault: tuple[str, str, str], rows: Sequence[tuple[int, str]]) -> Problem:
    column, holds, expected = fault
    which = ", ".join(str(index) for index, _ in rows[:_SHOWN]) + (" …" if len(rows) > _SHOWN else "")
    return Problem(
        f"dataset {name!r}: column `{column}` holds {holds} in {counted(len(rows), 'row', 'rows')} (row {which})",
        rows[0][1],
        f"{expected}, in every row",
        "mend or remove these rows; nothing is converted by guessing",
    )


def entry_of(spec: DatasetSpec) -> dict[str, Any]:
    """The registry entry, without a source, of rows as `spec` describes them."""
    entry: dict[str, Any] = {"type": TYPE_OF[spec.kind]} if spec.kind in TYPE_OF else {}
    if spec.ranking is not None:
        entry["ranking"] = spec.ranking
    if spec.formatting != "auto":
        entry["formatting"] = spec.formatting
    return entry | {name: dict(value) for name, value in (("columns", spec.columns), ("tags", spec.tags)) if value}


def dropped_row(row: str, problem: RowProblem) -> tuple[str, str, str]:
    """A row that cannot be used, as an outcome tells it."""
    return row, problem.reason, shorten(problem.detail)
