"""A dataset's rows read from the first to the last as often as one likes, in flat memory.

Files are read anew each time, a hub's dataset is mapped from its cache. What can be read only once (files behind a URL)
or only as a whole (compressed tables) is held in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import Any

from trueup.data.files import DataFile
from trueup.data.hubs import load_from_hub
from trueup.data.readers import Row
from trueup.data.registry import DatasetSpec
from trueup.data.row_files import RowFile
from trueup.data.sources import Rows, files_of, read_rows
from trueup.errors import DataError

log = logging.getLogger("trueup")

_LONG_MEGABYTES = 200  # files whose reading takes long enough to be said
_WHOLE_MEGABYTES = 1000  # files with a fault are read at once up to here, to list all that is wrong with them


class Passes:
    """Iterate for (index, row, "file:line"), again and again."""

    def __init__(self, spec: DatasetSpec) -> None:
        """Raises DataError, or ModelError if a hub is out of reach."""
        self._spec = spec
        self._files = files_of(spec)
        self._held: Rows | Any = None  # a `Rows`, or a hub's mapped dataset
        if spec.rows is not None or not all(map(_reopens, self._files)):
            self._held = read_rows(spec)
        elif not self._files:
            self._held = load_from_hub(spec)
        self._began = self._state()
        self._told: set[str] = set()

    def __iter__(self) -> Iterator[tuple[int, Row, str]]:
        if isinstance(self._held, Rows):
            return ((index, row, self._held.where(index)) for index, row in enumerate(self._held))
        if self._held is not None:
            where = f"{self._spec.hub}: {self._spec.hub_id}"
            return ((index, dict(row), f"{where} row {index}") for index, row in enumerate(self._held))
        return self._read()

    def _read(self) -> Iterator[tuple[int, Row, str]]:
        index = 0
        try:
            for file in self._files:
                with closing(RowFile(file)) as opened:
                    for row, line in opened:
                        yield index, row, f"{file.label} row {index}" if line is None else f"{file.label}:{line}"
                        index += 1
                    self._tell(opened.notes)
        except DataError:
            self._list_all_faults()
            raise
        if self._state() != self._began:
            labels = ", ".join(file.label for file in self._files)
            raise DataError("a data file changed while it was read", where=labels, fix="run it again when it rests")

    def _tell(self, notes: list[str]) -> None:
        for note in notes:
            if note not in self._told:
                log.info("dataset %s: %s", self._spec.name, note)
        self._told.update(notes)

    def _list_all_faults(self) -> None:
        """The first fault ends a reading in flat memory; reading all at once tells of all of them."""
        if self.megabytes <= _WHOLE_MEGABYTES:
            read_rows(self._spec)

    @property
    def megabytes(self) -> int:
        """Of files that are read anew."""
        return sum(size for size, _ in self._began) >> 20

    def _state(self) -> list[tuple[int, int]]:
        found = [file.path.stat() for file in self._files if file.path] if self._held is None else []
        return [(stat.st_size, stat.st_mtime_ns) for stat in found]

    def tell_if_long(self) -> None:
        """Say that much is going to be read."""
        if self.megabytes > _LONG_MEGABYTES:
            log.info("reading %s (%s MB)", ", ".join(file.label for file in self._files), f"{self.megabytes:,}")


def _reopens(file: DataFile) -> bool:
    with suppress(DataError):  # of a type that is unknown, which reading it tells
        return file.path is not None and not (file.compression and file.type in (".parquet", ".arrow"))
    return False
