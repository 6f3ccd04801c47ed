"""An append-only file of what was found out: a line each, under a key made of all that decided it.

So a build that is killed goes on where it was, one with another judge keeps its answers, and nothing stale is taken
for an answer to another question. A last line that a crash tore is dropped.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from trueup.errors import ResourceError
from trueup.training.durable import boundary

log = logging.getLogger("trueup")


def digest(*parts: Any) -> str:
    """128 bits of SHA-256, in hexadecimal, of values that JSON can hold."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


class Journal:
    """Values by key, read from a file and added to it. Use as a context manager; one writer at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._values: dict[str, Any] = {}
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Journal:
        self._read()
        self._file = open(self.path, "ab")  # noqa: SIM115 (closed in __exit__)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._file is not None
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError:
            if error is None:
                raise
        finally:
            self._file.close()

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def get(self, key: str) -> Any:
        """The value of a key, None if there is none."""
        return self._values.get(key)

    def put(self, key: str, value: Any, beside: Mapping[str, Any] | None = None) -> None:
        """Add a value; it survives the end of this process from now on. Raises ResourceError if the disk refuses.

        Args:
            beside: more values by key, written in the same breath.
        """
        assert self._file is not None
        values = {key: value, **(beside or {})}
        lines = [json.dumps({"key": k, "value": v}, ensure_ascii=False) + "\n" for k, v in values.items()]
        try:
            self._file.write("".join(lines).encode("utf-8", "backslashreplace"))
            self._file.flush()
        except OSError as error:
            raise ResourceError(
                f"the journal cannot be written: {error.strerror}", where=str(self.path),
                fix="make room, then run the same command again: it goes on from there",
            ) from error  # fmt: skip
        self._values |= values
        boundary("journal:put")

    def _read(self) -> None:
        if not self.path.exists():
            return
        whole, torn = self.path.read_bytes(), 0
        end = whole.rfind(b"\n") + 1
        for line in whole[:end].splitlines():
            try:
                found = json.loads(line)
                self._values[found["key"]] = found["value"]
            except (ValueError, KeyError, TypeError):
                torn += 1
        if torn:
            log.warning("%d lines of %s cannot be read; what they held is found out again", torn, self.path)
        if end < len(whole):
            with open(self.path, "rb+") as file:
                file.truncate(end)
