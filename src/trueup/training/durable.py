"""Writing files so that a crash leaves either the old bytes or the new ones, never a mixture.

Torch-free. `boundary` is the fault-injection hook of the tests: it does nothing unless the
environment variable TRUEUP_FAULT_AT names a point, as `POINT:N` (SIGKILL itself at the N-th
boundary of that point) or `POINT:N:ENOSPC` / `POINT:N:EIO` (raise that OSError there).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_UMASK = os.umask(0)  # it can only be read by setting it
os.umask(_UMASK)

_boundaries_passed: Counter[str] = Counter()


def boundary(point: str) -> None:
    """A place where a crash must leave a usable run."""
    wanted = os.environ.get("TRUEUP_FAULT_AT")
    if not wanted or not wanted.startswith(point + ":"):
        return
    _boundaries_passed[point] += 1
    number, _, error = wanted.removeprefix(point + ":").partition(":")
    if _boundaries_passed[point] != int(number):
        return
    if not error:
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))  # Windows has no SIGKILL
    code = getattr(errno, error)
    raise OSError(code, os.strerror(code))


def sync_file(path: Path) -> None:
    """Push a file's bytes to the disk, and give it the permissions any new file has (safetensors:
    0600).
    """
    path.chmod(0o666 & ~_UMASK)
    with open(path, "rb+") as file:  # Windows flushes only handles that may write
        _flush(file.fileno())


def _flush(handle: int) -> None:
    """Push an open file to the disk. On a Mac `fsync` reaches the disk's cache only."""
    if sys.platform == "darwin":
        import fcntl

        try:
            fcntl.fcntl(handle, fcntl.F_FULLFSYNC)
            return
        except OSError:  # a file system without it: network shares, FAT
            pass
    os.fsync(handle)


def sync_directory(path: Path) -> None:
    """Push a directory's entries to the disk. Windows has no such call; there the rename itself is
    journalled.
    """
    if sys.platform == "win32":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace(source: Path, target: Path) -> None:
    """Put a file in the place of another, in one step."""
    _patiently(lambda: os.replace(source, target))


def rename(source: Path, target: Path) -> None:
    """Give a file or directory a name that nothing has."""
    _patiently(lambda: os.rename(source, target))


def _patiently(action: Callable[[], None]) -> None:
    """Windows refuses for a moment while a reader, an indexer or a virus scanner has one of the files open."""
    for attempt in range(20):
        try:
            return action()
        except PermissionError:
            if sys.platform != "win32" or attempt == 19:
                raise
            time.sleep(0.05)


def write_text(path: Path, text: str, sync: bool = True) -> None:
    """Write a whole text file atomically; durably too, unless it may be lost with the power."""
    stage = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        boundary("file:write")
        with open(stage, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            if sync:
                file.flush()
                _flush(file.fileno())
        boundary("file:write")
        replace(stage, path)
    finally:
        stage.unlink(missing_ok=True)


def write_json(path: Path, value: Any, indent: int | None = 2, sync: bool = True) -> None:
    """Write a whole JSON file, as `write_text` does."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n", sync)


def disk_trouble(error: Exception) -> bool:
    """Whether an exception says that a disk refused: Rust libraries (tokenizers, safetensors) have
    no OSError.
    """
    return isinstance(error, OSError) or "(os error " in str(error)


def read_json(path: Path) -> Any:
    """The JSON value of a file."""
    return json.loads(path.read_text(encoding="utf-8"))


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def walk_files(directory: Path) -> Iterator[Path]:
    """Every file below a directory, in a stable order."""
    return iter(sorted(path for path in directory.rglob("*") if path.is_file()))


def process_alive(pid: int) -> bool:
    """Whether a process of this machine exists (a zombie counts as dead: it writes no more)."""
    import psutil

    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
