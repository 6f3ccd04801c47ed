"""A stream of rows cut into buffers of tokens: what a buffer holds follows from where it begins."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import islice
from typing import Any

from trueup.data.encoded import Block, EncodedDataset
from trueup.data.encoder import CHUNK, Policy, Tally, encode_block
from trueup.data.examples import Example, Kind
from trueup.data.formats import RowProblem, ShapeProblem, parse_with
from trueup.data.layout import PEEKED, Layout
from trueup.data.load import excerpt, has_placeholder, hidden_character, layout_for
from trueup.data.readers import Row
from trueup.data.row_files import Place
from trueup.data.streams import MixedStream, RowStream, Source, StreamedRow
from trueup.data.templates import ChatTemplate
from trueup.errors import DataError


@dataclass(slots=True)
class Account:
    """What became of rows that were read for the first time."""

    read: dict[str, int] = field(default_factory=dict)  # dataset → rows
    dropped: list[tuple[str, str, str]] = field(default_factory=list)  # (row, reason, detail) before encoding
    notes: list[str] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)


@dataclass(slots=True)
class Buffer:
    """Encoded rows, in the order in which they were read."""

    number: int
    dataset: EncodedDataset
    account: Account
    repeats: set[str]  # rows that were read before
    begins: dict[str, Any]  # where the stream stood before it

    @property
    def passes(self) -> int:
        """Through all the data, before it."""
        return self.begins["place"]["pass"]


@dataclass(frozen=True)
class Reading:
    """How the rows of a dataset are read, and the columns of the rows that decided it."""

    layout: Layout
    columns: frozenset[str]


@dataclass(frozen=True)
class Recipe:
    """How rows of the listed datasets become tokens."""

    sources: Sequence[Source]
    readings: Sequence[Reading]
    first: Sequence[Place | None]
    template: ChatTemplate
    policy: Policy
    kinds: tuple[Kind, Kind | None]
    buffer_size: int
    mix_strategy: str
    interleave_probs: Sequence[float] | None
    seed: int

    def fingerprint(self) -> str:
        """Of the data and all that decides the order and the tokens of its rows."""
        told = [
            [source.fingerprint() for source in self.sources], self.first, self.template.fingerprint, repr(self.policy),
            self.kinds, self.buffer_size, self.mix_strategy, self.interleave_probs, self.seed,
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()


class BufferReader:
    """The stream's rows, buffer after buffer; lives in the thread that reads ahead."""

    def __init__(self, recipe: Recipe, counted: dict[str, int], begins: dict[str, Any] | None = None) -> None:
        begins = begins or {"place": None, "counted": counted, "number": 0}
        self._recipe, self._number = recipe, begins["number"]
        self._counted: dict[str, int] = dict(begins["counted"])  # rows of each dataset that are in the report
        self._known = [set(reading.columns) for reading in recipe.readings]
        self._stream = MixedStream(
            recipe.sources, recipe.first, recipe.mix_strategy, recipe.interleave_probs, recipe.seed, begins["place"]
        )
        self._rows = self._stream.one_pass()
        self._hidden: set[str] = set()  # datasets of which it has been said
        self.told: Callable[[int], None] = lambda done: None
        self.stopped = False

    def close(self) -> None:
        self._stream.close()

    def read(self) -> Buffer:
        """The next `buffer_size` rows, or those that are left of a pass. Raises DataError."""
        begins, account, blocks = self._state(), Account(), []
        repeats: set[str] = set()
        left = self._recipe.buffer_size
        while left and not self.stopped:
            rows = list(islice(self._rows, min(CHUNK, left)))
            left -= len(rows)
            blocks.append(self._encoded(rows, account, repeats))
            self.told(self._recipe.buffer_size - left)
            if len(rows) < min(CHUNK, left + len(rows)):  # the pass is over
                self._rows = self._stream.one_pass()
                break
        self._number += 1
        return Buffer(begins["number"], EncodedDataset.joined(blocks), account, repeats, begins)

    def _state(self) -> dict[str, Any]:
        return {"place": self._stream.place, "counted": dict(self._counted), "number": self._number}

    def _encoded(self, rows: Sequence[StreamedRow], account: Account, repeats: set[str]) -> Block:
        examples = list(self._examples(rows, account, repeats))
        block, tally = encode_block(examples, self._recipe.template, self._recipe.policy)
        account.tally.add(without(tally, repeats) if repeats else tally)
        return block

    def _examples(self, rows: Sequence[StreamedRow], account: Account, repeats: set[str]) -> Iterator[Example]:
        for dataset, index, row, where in rows:
            name = self._recipe.sources[dataset].spec.name
            row_id = f"{name}:{index}"
            is_new = index >= self._counted.get(name, 0)
            if is_new:
                self._counted[name] = index + 1
                account.read[name] = account.read.get(name, 0) + 1
            else:
                repeats.add(row_id)
            self._watch_columns(dataset, row, row_id, account)
            try:
                example = parse_with(self._recipe.readings[dataset].layout, row_id, row)
            except RowProblem as problem:
                if is_new:
                    account.dropped.append((row_id, problem.reason, problem.detail or excerpt(row)))
                continue
            except ShapeProblem as problem:
                raise shape_problem(name, index, where, problem) from None
            if has_placeholder(example) and is_new:
                account.notes.append(
                    f"{name}: rows hold a placeholder such as {{{{name}}}}; replace it before training"
                )
            if name not in self._hidden and (hidden := hidden_character(example)):
                self._hidden.add(name)
                account.notes.append(f"{name}: rows hold hidden control characters (first {hidden} in {row_id})")
            yield example

    def _watch_columns(self, dataset: int, row: Row, row_id: str, account: Account) -> None:
        """A column that the first rows did not have may play a role: that cannot be seen in advance, but said."""
        unseen = row.keys() - self._known[dataset]
        if not unseen:
            return
        self._known[dataset] |= unseen
        source, layout = self._recipe.sources[dataset], self._recipe.readings[dataset].layout
        try:
            now = layout_for(source.spec, [dict.fromkeys(self._known[dataset]) | row], layout.want, None)
        except DataError:
            return
        late = {column for role, column in now.columns.items() if role not in layout.columns and column in unseen}
        if late:
            account.notes.append(
                f"{source.spec.name}: column `{min(late)}` comes up only in row {row_id}, too late to be read; "
                "put a row that has it among the first, or name it in `columns`"
            )


def without(tally: Tally, rows: set[str]) -> Tally:
    """What a tally says of other rows than these."""
    return Tally(
        **{
            kind.name: [entry for entry in getattr(tally, kind.name) if _row_of(entry) not in rows]
            for kind in fields(Tally)
        }
    )


def _row_of(entry: Any) -> str:
    return entry if isinstance(entry, str) else entry[0]


def peek(source: Source, kinds: tuple[Kind, Kind | None]) -> Reading:
    """How a dataset is to be read, from its first rows. Raises DataError."""
    stream = RowStream(source)
    rows: list[Row] = []
    while not stream.ended and len(rows) < PEEKED:
        rows.append(stream.take()[1])
    stream.close()
    if not rows:
        raise DataError(f"dataset {source.spec.name!r}: 0 of 0 rows usable", where=source.spec.origin)
    return Reading(layout_for(source.spec, rows, *kinds), frozenset().union(*rows))


def shape_problem(name: str, index: int, where: str, problem: ShapeProblem) -> DataError:
    """A column of a streamed row that does not hold what its role needs (D6)."""
    return DataError(
        f"dataset {name!r}: column `{problem.column}` holds {problem.found} (row {index})",
        where=where,
        expected=f"{problem.expected}, in every row",
        fix="mend or remove such rows; nothing is converted by guessing",
    )
