"""Compressed files as readable ones: gzip, bzip2, xz and Zstandard, by the end of their name.

What is cut off is a fault here, never a shorter file.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO, cast

from trueup.errors import DataError, ModelError

_CHUNK = 128 * 1024


def opened(raw: BinaryIO, suffix: str) -> BinaryIO:
    """What a compressed file holds. Raises ModelError if the library for it is missing."""
    return _OPENERS[suffix](raw)


@contextmanager
def readable(label: str) -> Iterator[None]:
    """Faults of compressed bytes as DataError, wherever in the file they are met."""
    try:
        yield
    except (EOFError, OSError, zlib.error, lzma.LZMAError, _CutOff) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's; the formats' own have no number
        raise DataError(
            f"not a whole compressed file: {error}", where=label, fix="fetch or write the file again"
        ) from None


def _zstd(raw: BinaryIO) -> BinaryIO:
    try:
        import zstandard  # noqa: F401
    except ImportError:
        raise ModelError(
            "reading .zst files needs the library zstandard",
            fix="pip install 'trueup[files]', or unpack the file: zstd -d",
        ) from None
    return cast(BinaryIO, io.BufferedReader(_Frames(raw), _CHUNK))


class _CutOff(Exception):
    """A frame that does not end, or is none."""


class _Frames(io.RawIOBase):
    """The contents of all Zstandard frames of a file; the library's own reader takes a cut frame for a whole one."""

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        # Frames written with --long ask for more memory than the default allows.
        self._make = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj
        self._error = zstandard.ZstdError
        self._raw, self._frame, self._ready, self._position = raw, None, b"", 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready:
            if not self._advance():
                return 0
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size

    def _advance(self) -> bool:
        """Decompress some more; False at the end of the file."""
        rest = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
        data = rest or self._raw.read(_CHUNK)
        if not data:
            if self._frame is not None and not self._frame.eof:
                raise _CutOff("it ends inside a frame; truncated download?")
            return False
        if self._frame is None or self._frame.eof:
            self._frame = self._make()
        try:
            self._ready = self._frame.decompress(data)
        except self._error as error:
            raise _CutOff(str(error)) from None
        return True

    def close(self) -> None:
        self._raw.close()
        super().close()


_OPENERS: dict[str, Callable[[BinaryIO], BinaryIO]] = {
    ".gz": lambda raw: cast(BinaryIO, gzip.GzipFile(fileobj=raw, mode="rb")),
    ".bz2": lambda raw: cast(BinaryIO, bz2.BZ2File(raw)),
    ".xz": lambda raw: cast(BinaryIO, lzma.LZMAFile(raw)),  # noqa: SIM115
    ".zst": _zstd,
}
