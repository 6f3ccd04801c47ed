"""A directory that is there whole or not at all: written beside its place, and renamed into it.

What has to make room is renamed too: nothing is deleted but what an export itself left half-written.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trueup.errors import Problem, ResourceError
from trueup.training import durable
from trueup.training.durable import boundary
from trueup.training.run_files import names_in
from trueup.training.run_target import move_aside

log = logging.getLogger("trueup")

POINT = "export:write"  # see `durable.boundary`
_SPARE = 16 * 2**20  # tokenizer, card, and what a file system needs for itself


def check_target(target: Path, overwrite: bool) -> list[Problem]:
    """What keeps an export from going to a directory; reads only."""
    if target.exists() and not target.is_dir():
        return [Problem(f"{target} is a file", "export_dir", "a directory that is new or empty")]
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        return [
            Problem(
                f"{target} is not empty: {names_in(target)}",
                "export_dir",
                "a directory that is new or empty",
                "name another, or set overwrite_export_dir: true, which moves it aside",
            )  # fmt: skip
        ]
    parent = _first_there(target)
    if not os.access(parent, os.W_OK):
        return [Problem(f"{parent} cannot be written to", "export_dir", fix="name a directory elsewhere")]
    return []


def check_space(target: Path, needed: int) -> list[Problem]:
    """Whether the disk takes so many bytes."""
    free = shutil.disk_usage(_first_there(target)).free
    if free >= needed + _SPARE:
        return []
    return [
        Problem(
            f"the export takes {needed / 1e9:.2f} GB, and the disk has {free / 1e9:.2f} GB left",
            "export_dir",
            fix="free space, or name a directory on another disk",
        )  # fmt: skip
    ]


def _first_there(path: Path) -> Path:
    return next(folder for folder in path.absolute().parents if folder.is_dir())


@contextmanager
def staged(target: Path, overwrite: bool) -> Iterator[Path]:
    """A directory to write to, which becomes `target` when the block ends well, and is gone when it does not.

    Raises:
        ResourceError: the disk refuses.
    """
    _remove_left_over(target)
    stage = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        stage.mkdir(parents=True)
        boundary(POINT)
        yield stage
        boundary(POINT)
        for path in durable.walk_files(stage):
            durable.sync_file(path)
        durable.sync_directory(stage)
        _make_room(target, overwrite)
        boundary(POINT)
        durable.rename(stage, target)
        durable.sync_directory(target.parent)
        boundary(POINT)
    except Exception as error:
        if not durable.disk_trouble(error):
            raise
        raise ResourceError(
            f"writing {target} failed: {error}", where="export_dir", expected="a disk that takes the files",
            fix="free space, or name a directory on another disk; nothing was written to export_dir",
        ) from error  # fmt: skip
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _make_room(target: Path, overwrite: bool) -> None:
    if target.is_dir():
        if overwrite and any(target.iterdir()):
            move_aside(target, "overwrite_export_dir")
        else:
            target.rmdir()


def _remove_left_over(target: Path) -> None:
    """What an export to the same place left when it was killed."""
    prefix = f".{target.name}.tmp-"
    for path in target.parent.glob(f".{_plain(target.name)}.tmp-*"):
        pid = path.name.removeprefix(prefix)
        if pid.isdigit() and not (int(pid) != os.getpid() and durable.process_alive(int(pid))):
            log.info("%s, left by an export that was killed, is removed", path.name)
            shutil.rmtree(path, ignore_errors=True)


def _plain(name: str) -> str:
    """A name as `glob` takes it for itself."""
    return "".join(f"[{mark}]" if mark in "*?[" else mark for mark in name)
