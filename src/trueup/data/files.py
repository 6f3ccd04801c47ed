"""Data files on this machine or behind a URL, compressed or not: which ones a name stands for, and how they open."""

from __future__ import annotations

import glob
import io
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from trueup.data.compression import opened, readable
from trueup.data.registry import (
    COMPRESSIONS,
    FILE_SUFFIXES,
    REGISTRY_NAMES,
    DatasetSpec,
    compression_of,
    missing_path,
    type_of,
)
from trueup.errors import DataError, ModelError, Problem

log = logging.getLogger("trueup")

_REMOTE_CHUNK = 1024 * 1024
_EXPECTED = f"a name that ends in {', '.join(FILE_SUFFIXES)}, or one of these with {', '.join(COMPRESSIONS)} behind"


@dataclass(frozen=True, slots=True)
class DataFile:
    """One file: `label` as a user would type it, and where it is."""

    label: str
    path: Path | None = None
    url: str | None = None

    @property
    def type(self) -> str:
        """ ".jsonl", ".csv" …, whether or not it is compressed. Raises DataError."""
        name = self.path.name if self.path else _without_query(self.url or "")
        suffix = type_of(name)
        if suffix not in FILE_SUFFIXES:
            raise DataError("cannot tell the type of this file", where=self.label, expected=_EXPECTED)
        return suffix

    @property
    def compression(self) -> str | None:
        """ ".gz" …, if it is compressed."""
        return compression_of(self.path.name if self.path else _without_query(self.url or ""))

    @property
    def size(self) -> int | None:
        """Bytes as they lie there; None if nobody says."""
        if self.path:
            return self.path.stat().st_size
        with _reaching(self.url or ""):
            fs, path = _file_system(self.url or "")
            return fs.size(path)

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """What the file holds, decompressed. Raises DataError if it is broken or not there, ModelError if out of
        reach; also while it is read.
        """
        with readable(self.label), self._raw() as raw:
            if self.compression is None:
                yield raw
                return
            with opened(raw, self.compression) as file:
                yield file

    def _raw(self) -> BinaryIO:
        if self.path:
            with _reaching(self.label):
                return self.path.open("rb")
        with _reaching(self.url or ""):
            fs, path = _file_system(self.url or "")
            # A web server that does not speak of ranges gives a file once, from its beginning.
            jumps = not (self.url or "").startswith("http") or bool(fs.info(path).get("partial"))
            file = fs.open(path, "rb") if jumps else fs.open(path, "rb", block_size=0)
            return cast(BinaryIO, io.BufferedReader(_Remote(file, self.label, jumps), _REMOTE_CHUNK))

    def read(self) -> bytes:
        """All that the file holds, decompressed."""
        with self.open() as file:
            return file.read()


def local(path: Path) -> DataFile:
    """A file of this machine."""
    return DataFile(_label(path), path=path)


def list_files(source: Path, spec: DatasetSpec) -> list[Path]:
    """The data files a path, folder or glob stands for, sorted. Raises DataError (D19)."""
    source = source / spec.folder if spec.folder else source
    where = f"dataset {spec.name!r} ({spec.origin})"
    if source.is_file():
        _refuse_unknown_types([source.name], where)
        return [source]
    if source.is_dir():
        return _files_in(source, where)
    if glob.has_magic(str(source)):
        files = sorted(Path(p) for p in glob.glob(str(source), recursive=True))
        files = [p for p in files if p.is_file()]
        if not files:
            raise DataError(f"no file matches {source.absolute()}", where=where, fix="check the pattern")
        _refuse_unknown_types([p.name for p in files], where)
        _refuse_mixed_types([p.name for p in files], str(source.absolute()), str(source.parent), where)
        return files
    problem = missing_path(source)
    raise DataError([Problem(problem.what, where, fix=problem.fix)])


def list_urls(url: str, spec: DatasetSpec) -> list[DataFile]:
    """The data files that a URL stands for: itself, those in its folder, or those that match its pattern. Raises
    DataError, or ModelError if nothing answers.
    """
    where = f"dataset {spec.name!r} ({spec.origin})"
    with _reaching(url):
        fs, path = _file_system(url)
        if url.startswith(("http://", "https://")):
            return [DataFile(url, url=url)]  # a web server lists nothing
        if glob.has_magic(path):
            names, hint = sorted(fs.glob(path)), "check the pattern"
        elif fs.isdir(path):
            path = fs.info(path)["name"]  # as `find` writes it
            names, hint = sorted(fs.find(path)), None
            names = [name for name in names if _is_data(PurePosixPath(name.removeprefix(path).lstrip("/")))]
        else:
            return [DataFile(url, url=url)]
        if not names:
            raise DataError(f"no data file there: {url}", where=where, expected=_EXPECTED, fix=hint)
        _refuse_unknown_types(names, where)
        _refuse_mixed_types(names, url, url.rpartition("/")[0], where)
        return [DataFile(full, url=full) for full in map(fs.unstrip_protocol, names)]


def _files_in(folder: Path, where: str) -> list[Path]:
    """Data files below a folder. Hidden files and the registry are no data; other files are named
    in a note.
    """
    if (folder / "state.json").is_file() and any(folder.glob("*.arrow")):
        return _saved_to_disk(folder)
    files, others = [], []
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if any(part.startswith(".") for part in inside.parts) or not path.is_file() or path.name in REGISTRY_NAMES:
            continue
        (files if type_of(path.name) in FILE_SUFFIXES else others).append(path)
    if not files:
        raise DataError(
            f"no data file in {folder.absolute()}",
            where=where,
            expected=f"files of one type: {', '.join(FILE_SUFFIXES)}",
        )
    _refuse_mixed_types([p.name for p in files], str(folder.absolute()), str(folder.parent), where)
    if others:
        log.info("%s: left out %s", where, ", ".join(p.name for p in others[:5]))
    return files


def _is_data(inside: PurePosixPath) -> bool:
    hidden = any(part.startswith(".") for part in inside.parts)
    return not hidden and inside.name not in REGISTRY_NAMES and type_of(inside.name) in FILE_SUFFIXES


def _saved_to_disk(folder: Path) -> list[Path]:
    # What `datasets.Dataset.save_to_disk` leaves: the order of its pieces stands in state.json.
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return [folder / piece["filename"] for piece in state["_data_files"]]


def _refuse_unknown_types(names: Sequence[str], where: str) -> None:
    unknown = [name for name in names if type_of(name) not in FILE_SUFFIXES]
    if unknown:
        raise DataError(
            f"cannot tell the type of {', '.join(name.rpartition('/')[2] for name in unknown[:3])}",
            where=where,
            expected=_EXPECTED,
        )


def _refuse_mixed_types(names: Sequence[str], source: str, parent: str, where: str) -> None:
    suffixes = sorted({".jsonl" if type_of(name) == ".ndjson" else type_of(name) for name in names})
    if len(suffixes) > 1:
        raise DataError(
            f"{source} holds files of several types: {', '.join(suffixes)}",
            where=where,
            expected="files of one type",
            fix=f"name the files of one type by a pattern, as in {parent}/*{suffixes[0]}",
        )


def _label(path: Path) -> str:
    """A path as a user would type it from here."""
    relative = os.path.relpath(path) if path.anchor == Path.cwd().anchor else str(path)
    return str(path.absolute()) if relative.startswith("..") else relative


# ---- behind URLs ---------------------------------------------------------------------------------


def _file_system(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    return url_to_fs(url)


class _Remote(io.RawIOBase):
    """A file behind a URL whose complaints, while it is read, say which file it is."""

    def __init__(self, file: Any, url: str, jumps: bool) -> None:
        self._file, self._url, self._jumps = file, url, jumps

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._jumps

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with _reaching(self._url):
            return self._file.seek(offset, whence)

    def readinto(self, buffer) -> int:
        with _reaching(self._url):
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


@contextmanager
def _reaching(place: str) -> Iterator[None]:
    """What a file system's complaint means for the user: each has errors of its own."""
    try:
        yield
    except (DataError, ModelError):
        raise
    except ImportError as error:
        raise ModelError(
            f"reading {place} needs another library: {first_line(error)}", fix="pip install 'trueup[files]'"
        ) from None
    except FileNotFoundError as error:
        if isinstance(error.__cause__, OSError):  # fsspec says so of a web server that does not answer, too
            raise ModelError(f"cannot reach {place}: {first_line(error.__cause__)}") from error
        raise DataError(f"nothing is there: {place}") from None
    except Exception as error:
        if "://" in place:
            raise ModelError(f"cannot reach {place}: {first_line(error)}") from error
        raise DataError(f"cannot read {place}: {first_line(error)}") from error


def _without_query(url: str) -> str:
    return url.partition("?")[0]


def first_line(error: Exception) -> str:
    """The first line of a complaint, or what kind of one it is."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
