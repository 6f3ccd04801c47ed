"""A dataset's rows one after another, read while they are wanted; and several datasets' mixed.

A place is a JSON value that says where the next row is: opened there again, a stream gives the same rows as if it had
been read on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from trueup.data.files import DataFile
from trueup.data.hubs import stream_from_hub
from trueup.data.mixing import Turns
from trueup.data.readers import Row
from trueup.data.registry import DatasetSpec
from trueup.data.row_files import Place, RowFile
from trueup.data.sources import files_of
from trueup.errors import ConfigError, DataError

_EDGE = 1024 * 1024  # bytes at either end of a file that enter its fingerprint


class StreamedRow(NamedTuple):
    """A row: its dataset's place among those listed, its index in the dataset, and "file:line" where that is known."""

    dataset: int
    index: int
    row: Row
    where: str


@dataclass(frozen=True)
class Source:
    """Where a dataset's rows come from: files, or a hub if there are none."""

    spec: DatasetSpec
    files: list[DataFile]
    token: str | None = None
    cache_dir: str | Path | None = None
    limit: int | None = None  # rows used, from the first

    @classmethod
    def of(
        cls, spec: DatasetSpec, token: str | None = None, cache_dir: str | Path | None = None, limit: int | None = None
    ) -> Source:
        """Raises ConfigError, DataError or ModelError."""
        if spec.num_samples:
            raise ConfigError(
                f"dataset {spec.name!r}: `num_samples` draws from all over a dataset, and a stream is read in order",
                where=spec.origin, fix="set max_samples, which takes the first rows, or streaming: false",
            )  # fmt: skip
        if spec.rows is not None:
            raise ConfigError(
                f"dataset {spec.name!r} is in memory already: there is nothing to stream", where="streaming",
                fix="drop streaming: true, or name the files or the hub that the rows come from",
            )  # fmt: skip
        return cls(spec, files_of(spec), token, cache_dir, limit)

    def fingerprint(self) -> str:
        """Of the files' names, sizes and edges: a change that leaves all these is seen when a resume reads it again."""
        digest = hashlib.sha256(repr((self.spec, self.limit)).encode())
        for file in self.files:
            digest.update(f"\0{file.label}\0{file.size}\0".encode())
            if file.path:
                with file.path.open("rb") as raw:
                    digest.update(raw.read(_EDGE))
                    raw.seek(max(0, file.path.stat().st_size - _EDGE))
                    digest.update(raw.read())
        return digest.hexdigest()


class RowStream:
    """The rows of one dataset, in order, once; it knows when it has given the last."""

    def __init__(self, source: Source, place: Place | None = None) -> None:
        place = place or {"file": 0, "at": None, "row": 0}
        self._source, self._file, self.row = source, place["file"], place["row"]
        self._reader: Any = None
        self._place = place
        self._next: tuple[Row, str] | None = None
        self._open(place["at"])
        self._advance()

    @property
    def ended(self) -> bool:
        return self._next is None

    @property
    def place(self) -> Place:
        """Where the next row begins."""
        return self._place

    def take(self) -> tuple[int, Row, str]:
        """The next row with its index and its "file:line"; there must be one."""
        assert self._next is not None
        index, (row, where) = self.row, self._next
        self.row += 1
        self._advance()
        return index, row, where

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _open(self, at: Any) -> None:
        self.close()
        source = self._source
        if source.files:
            self._reader = RowFile(source.files[self._file], at) if self._file < len(source.files) else None
        elif self._file == 0:
            self._reader = stream_from_hub(source.spec, source.token, source.cache_dir, at)

    def _advance(self) -> None:
        """Look at the next row, in the next file if need be."""
        self._next = None
        while self._reader is not None and self.row != self._source.limit:
            place = {"file": self._file, "at": self._reader.place, "row": self.row}
            found = next(self._reader, None)
            if found is not None:
                row, line = found
                self._place, self._next = place, (row, self._reader.where(line))
                return
            self._file += 1
            if not self._source.files:
                break
            self._open(None)
        self._place = {"file": self._file, "at": None, "row": self.row}
        self.close()


class MixedStream:
    """The rows of several datasets, mixed and without end: after the last row comes the first again.

    Args:
        sources: one a listed dataset; one that is listed twice is read twice.
        first: where each dataset's training rows begin (those before it are held out).
    """

    def __init__(
        self, sources: Sequence[Source], first: Sequence[Place | None], strategy: str, probs: Sequence[float] | None,
        seed: int, place: Place | None = None,
    ) -> None:  # fmt: skip
        self._sources, self._first = sources, first
        self._mix = strategy, probs, seed
        self.passes = place["pass"] if place else 0  # through all the data, so far
        self._begin(place)

    @property
    def place(self) -> Place:
        return {
            "pass": self.passes,
            "draws": self._turns.draws,
            "exhausted": sorted(self._turns.exhausted),
            "streams": [stream.place for stream in self._streams],
        }

    def one_pass(self) -> Iterator[StreamedRow]:
        """What is left of this pass; then the next one begins."""
        while (dataset := self._turns.next()) is not None:
            stream = self._streams[dataset]
            index, row, where = stream.take()
            if stream.ended:
                self._turns.ended(dataset)
                if self._mix[0] == "interleave_over":
                    self._streams[dataset] = RowStream(self._sources[dataset], self._first[dataset])
            yield StreamedRow(dataset, index, row, where)
        self.close()
        self.passes += 1
        self._begin(None)

    def close(self) -> None:
        for stream in self._streams:
            stream.close()

    def _begin(self, place: Place | None) -> None:
        strategy, probs, seed = self._mix
        places = place["streams"] if place else self._first
        self._streams = [RowStream(source, at) for source, at in zip(self._sources, places, strict=True)]
        went_on = (place["draws"], place["exhausted"]) if place else (0, ())
        self._turns = Turns(len(self._sources), strategy, probs, seed, *went_on)
        for dataset, stream in enumerate(self._streams):
            # One that is used up has begun again where that is the strategy: if it is at its end, it is empty.
            if stream.ended and (dataset not in self._turns.exhausted or strategy == "interleave_over"):
                self._turns.empty(dataset)
        if all(stream.ended for stream in self._streams):
            raise DataError("there is no row to train on", where=", ".join(s.spec.name for s in self._sources))
