"""Who owns a run directory: one process at a time, known by pid, host and boot. Torch-free.

The lock itself decides, and the system frees it with its process. The owner's name beside it is for people, and for
file systems whose locks do not reach other machines: there an owner counts as long as its heart beats.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from trueup.errors import ResourceError
from trueup.training import durable

LOCK_FILE = ".lock"
OWNER_FILE = ".owner.json"
STATUS_FILE = "status.json"

_LOST_HEARTBEAT_SECONDS = 120.0  # an owner on another machine counts as dead after this
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # Linux


class RunLock:
    """The lock of one run directory, which must exist."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path / LOCK_FILE)

    def acquire(self) -> None:
        """Take it and leave our name. Raises ResourceError with the owner's, OSError when the disk refuses."""
        owner = read_owner(self.path)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise in_use(self.path, owner) from None
        if _lives_elsewhere(owner, self.path):
            self._lock.release()
            raise in_use(self.path, owner)
        durable.write_json(self.path / OWNER_FILE, this_process())

    def release(self) -> None:
        """Give it back, if it is ours."""
        if self._lock.is_locked:
            (self.path / OWNER_FILE).unlink(missing_ok=True)
            self._lock.release()


def check_free(path: Path) -> None:
    """Say at once, not after a model was loaded, that another process has the directory. Raises ResourceError."""
    owner = read_owner(path)
    if owner.get("host") != socket.gethostname() or not is_alive(owner):
        return
    ensure_unlocked(path)  # what decides: the number may be another process's by now


def ensure_unlocked(path: Path) -> None:
    """Raise ResourceError if a process of this machine holds the lock; leaves no open file behind."""
    lock = FileLock(path / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise in_use(path, read_owner(path)) from None
    lock.release()


def this_process() -> dict[str, Any]:
    """What tells this process from every other, now and after a reboot."""
    return {"pid": os.getpid(), "host": socket.gethostname(), "boot_id": boot_id()}


def is_alive(record: Mapping[str, Any]) -> bool:
    """Whether the process of a `this_process` record lives: on another machine, whether its `heartbeat` is recent."""
    if record.get("host") != socket.gethostname():
        return time.time() - float(record.get("heartbeat", 0.0)) <= _LOST_HEARTBEAT_SECONDS
    rebooted = record.get("boot_id", boot_id()) != boot_id()  # then its pid is another process's
    return not rebooted and durable.process_alive(int(record.get("pid", -1)))


def boot_id() -> str:
    """This machine's current boot; "" where the system has no name for it (a boot *time* moves with the clock)."""
    return _BOOT_ID.read_text(encoding="ascii").strip() if _BOOT_ID.is_file() else ""


def read_owner(path: Path) -> dict[str, Any]:
    """Who says to own the directory; empty if nobody does."""
    return _read(path / OWNER_FILE)


def in_use(path: Path, owner: Mapping[str, Any]) -> ResourceError:
    return ResourceError(
        f"another process works in this directory: pid {owner.get('pid', 'unknown')} "
        f"on {owner.get('host', 'this machine')}",
        where=str(path),
        fix="wait for it, stop it, or choose another output_dir",
    )


def _lives_elsewhere(owner: Mapping[str, Any], path: Path) -> bool:
    if not owner or owner.get("host") == socket.gethostname():
        return False  # on this machine the lock itself tells
    return is_alive({**owner, "heartbeat": _read(path / STATUS_FILE).get("heartbeat", 0.0)})


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(durable.read_json(path))
    except (OSError, ValueError):
        return {}
