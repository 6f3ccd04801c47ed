"""Files of JSON lines that grow, read once: only what is new is read again. Torch-free.

What is kept of them is kept in memory, as a cache by file: whatever is in it can be read again.
"""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic_core import from_json

_CHUNK_BYTES = 8 * 2**20
_MOST_FILES = 32


class Followed(ABC):
    """A file, and what its lines said so far. Whoever looks at several things of it holds `lock`."""

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, threading.RLock()
        self._restart((0, 0))

    def _restart(self, file: tuple[int, int]) -> None:
        self.offset, self._file = 0, file
        self.forget()

    @abstractmethod
    def forget(self) -> None:
        """Begin anew."""

    @abstractmethod
    def take(self, lines: list[bytes]) -> None:
        """Whole lines with their ends, of which the first begins at byte `offset`."""

    def refresh(self) -> None:
        """Take what was appended since; everything again if the file was replaced or cut."""
        with self.lock:
            self._refresh()

    def _refresh(self) -> None:
        try:
            with open(self.path, "rb") as file:
                found = os.fstat(file.fileno())
                if (found.st_dev, found.st_ino) != self._file or found.st_size < self.offset:
                    self._restart((found.st_dev, found.st_ino))
                file.seek(self.offset)
                while chunk := file.read(_CHUNK_BYTES):
                    whole = chunk[: chunk.rfind(b"\n") + 1]
                    if not whole:  # a line that is being written
                        break
                    self.take(whole.splitlines(keepends=True))
                    self.offset += len(whole)
                    file.seek(self.offset)
        except OSError:
            self._restart((0, 0))


T = TypeVar("T", bound=Followed)


class Shelf(Generic[T]):
    """The files that were looked at last, each current whenever it is asked for."""

    def __init__(self, kind: type[T]) -> None:
        self._kind = kind
        self._found: OrderedDict[Path, T] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, path: Path) -> T:
        with self._lock:
            found = self._found.pop(path, None) or self._kind(path)
            self._found[path] = found
            while len(self._found) > _MOST_FILES:
                self._found.popitem(last=False)
        found.refresh()
        return found


def row_of(line: bytes) -> dict[str, Any]:
    """The object of a line; empty if there is none."""
    try:
        row = from_json(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}
