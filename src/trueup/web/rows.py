"""A dataset's rows a window at a time, however large its files are: as they stand, and as what they are read as.

Torch-free, and flat in memory: files are read on from the nearest place that an earlier look has noted.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trueup.data.catalog import CATALOG
from trueup.data.examples import Chat, Example, Feedback, Kind, Messages, Pair, Prompt, Ranking, Text
from trueup.data.files import DataFile
from trueup.data.formats import RowProblem, ShapeProblem, parse_with
from trueup.data.layout import PEEKED, Layout, choose_layout, kind_of
from trueup.data.registry import DatasetSpec, known_names, resolve_datasets
from trueup.data.row_files import Place, RowFile
from trueup.data.sources import files_of
from trueup.errors import ConfigError, DataError, Problem, UserError

_NOTED_EVERY = 500  # rows between two places that are noted
_MOST_TABLES = 16
_EXCERPT = 160
_SPEAKERS = ("from", "role")


@dataclass(frozen=True, slots=True)
class SeenRow:
    """A row: `example` is what it is read as, `problem` why it is left out. `line` is its place in its file."""

    index: int
    raw: Mapping[str, Any]
    line: int | None = None
    example: Example | None = None
    problem: str = ""

    @property
    def excerpt(self) -> str:
        """How the row begins, on a line."""
        text = opening(self.example) if self.example else " · ".join(_texts(self.raw))
        return " ".join(text[: 2 * _EXCERPT].split())[:_EXCERPT]


def _texts(value: Any) -> Iterator[str]:
    """What is written in a value, without who speaks."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            if key not in _SPEAKERS:
                yield from _texts(part)
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)
    elif value not in (None, ""):
        yield str(value)


@dataclass(frozen=True, slots=True)
class Window:
    """Some rows on end. `more`: whether there are further ones; `problems`: what ended the reading."""

    rows: list[SeenRow]
    more: bool
    problems: list[Problem] = field(default_factory=list)


class Table:
    """A dataset's files, and how their rows are read."""

    def __init__(self, spec: DatasetSpec, files: list[DataFile]) -> None:
        """Raises DataError for rows that nothing can be made of; `layout` is None then only if `problems` says why."""
        self.spec, self.files = spec, files
        self.kind: Kind | None = None
        self.layout: Layout | None = None
        self.columns: list[str] = []
        self.problems: list[Problem] = []
        self._places: list[tuple[int, int, Place | None]] = [(0, 0, None)]  # (row, file, place), by row
        self._look()

    def _look(self) -> None:
        """The first rows tell what columns are there, and what they are for."""
        first: list[Mapping[str, Any]] = []
        try:
            for _, row, _ in self._read(0):
                first.append(row)
                if len(first) == PEEKED:
                    break
        except DataError as error:
            self.problems = error.problems
        self.columns = list(dict.fromkeys(name for row in first for name in row))
        if not first:
            return
        try:
            self.kind = kind_of(self.spec, first)
            self.layout = choose_layout(self.spec, first, self.kind)
        except UserError as error:
            self.problems = self.problems or error.problems

    def window(self, start: int, count: int) -> Window:
        """Rows from `start` on. A fault in a file's syntax ends them, and is told."""
        rows: list[SeenRow] = []
        try:
            for index, row, line in self._read(start):
                if len(rows) == count:
                    return Window(rows, more=True)
                rows.append(self._seen(index, row, line))
        except DataError as error:
            return Window(rows, more=False, problems=error.problems)
        return Window(rows, more=False)

    def _seen(self, index: int, row: Mapping[str, Any], line: int | None) -> SeenRow:
        if self.layout is None:
            return SeenRow(index, row, line)
        try:
            return SeenRow(index, row, line, parse_with(self.layout, f"{self.spec.name}:{index}", row))
        except RowProblem as problem:
            what = f"{problem.reason} ({problem.detail})" if problem.detail else problem.reason
            return SeenRow(index, row, line, problem=what)
        except ShapeProblem as problem:
            what = f"column `{problem.column}` holds {problem.found}, expected {problem.expected}"
            return SeenRow(index, row, line, problem=what)

    def _read(self, start: int) -> Iterator[tuple[int, Mapping[str, Any], int | None]]:
        """(index, row, line) from row `start` on, noting places on the way."""
        index, number, place = max((each for each in self._places if each[0] <= start), key=lambda each: each[0])
        for position in range(number, len(self.files)):
            with closing(RowFile(self.files[position], place)) as opened:
                place = None
                while True:
                    if index % _NOTED_EVERY == 0 and index > self._places[-1][0]:
                        self._places.append((index, position, opened.place))
                    found = next(opened, None)
                    if found is None:
                        break
                    if index >= start:
                        yield index, found[0], found[1]
                    index += 1


_tables: OrderedDict[Any, Table] = OrderedDict()


def spec_of(root: Path, name: str) -> DatasetSpec:
    """The dataset of a name: of the registry, a bundled sample, or a well-known set. Raises ConfigError."""
    directory = root / "data"
    if name not in CATALOG and name not in known_names(directory):
        raise ConfigError(f"there is no dataset {name[:80]!r} here", fix="upload a file, or choose one of the list")
    (spec,) = resolve_datasets([name], directory)
    return spec


def open_table(spec: DatasetSpec) -> Table:
    """A dataset's rows, as its files are now.

    Raises:
        ConfigError: it is on a hub, and has not been fetched. DataError: there are no such files.
    """
    files = [] if spec.url else files_of(spec)
    if spec.url:
        raise ConfigError(
            f"{spec.name} lies behind a URL, from which no page reads", fix="train on it, or fetch the file"
        )
    if not files:
        raise ConfigError(f"{spec.name} is on {spec.hub} and not here yet", fix="get it first")
    key = (repr(spec), signature(files))
    with suppress(KeyError):
        _tables.move_to_end(key)
        return _tables[key]
    table = Table(spec, files)
    _tables[key] = table
    while len(_tables) > _MOST_TABLES:
        _tables.popitem(last=False)
    return table


def signature(files: list[DataFile]) -> tuple[Any, ...]:
    """What changes when a file does."""
    found: list[Any] = []
    for file in files:
        found.append(file.label)
        with suppress(OSError):  # gone meanwhile
            if file.path:
                facts = file.path.stat()
                found += [facts.st_mtime_ns, facts.st_size]
    return tuple(found)


def opening(example: Example) -> str:
    """The text by which people know an example: its question."""
    match example:
        case Text(text):
            return text
        case Chat(messages) | Prompt(messages):
            asked = messages
        case Pair(prompt, chosen):
            asked = prompt or chosen
        case Ranking(prompt) | Feedback(prompt):
            asked = prompt
    said = [message.content for message in asked if message.role == "user"]
    return (said or [message.content for message in asked] or [""])[-1 if isinstance(example, Prompt) else 0]


def parts(example: Example) -> list[tuple[str, Messages | str]]:
    """An example as named parts, in their order: documents, questions, answers."""
    match example:
        case Text(text):
            return [("text", text)]
        case Chat(messages):
            return [("prompt", messages[:-1]), ("answer", messages[-1:])]
        case Prompt(messages):
            return [("prompt", messages)]
        case Pair(prompt, chosen, rejected):
            return [("prompt", prompt), ("chosen", chosen), ("rejected", rejected)]
        case Ranking(prompt, answers):
            return [("prompt", prompt), *((f"answer {n}", answer) for n, answer in enumerate(answers, 1))]
        case Feedback(prompt, answer, desirable):
            return [("prompt", prompt), ("desirable" if desirable else "undesirable", answer)]
