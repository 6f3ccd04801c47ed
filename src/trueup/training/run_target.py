"""Where a run may write, and what it goes on from: the answer to `output_dir`, `resume_from_checkpoint`,
`overwrite_output_dir` and `new_run` together. Torch-free.

Nothing is ever deleted: what has to make room is renamed. Only what is left of a run that did no step is written over.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from trueup.errors import ConfigError, CorruptStateError, ResourceError
from trueup.training import checkpoint as checkpoints
from trueup.training import durable
from trueup.training.checkpoint import Checkpoint
from trueup.training.compatibility import check_resumable
from trueup.training.run_files import describe, is_failed_attempt, is_occupied, names_in, read_metrics, read_status
from trueup.training.run_lock import check_free, ensure_unlocked

_log = logging.getLogger("trueup")

Resume = str | Path | bool | None  # "auto" or True, a checkpoint's path, or nothing


def check_target(
    path: str | Path,
    *,
    resume: Resume = None,
    overwrite: bool = False,
    new_run: bool = False,
    join: bool = False,
) -> None:
    """Whether a run may use this directory; reads only. Raises ConfigError (exit code 2) if not,
    ResourceError (4) when another process trains there.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path} is a file", where="output_dir", expected="a directory")
    if resume and not is_auto(resume) and not Path(str(resume)).is_dir():
        raise ConfigError(
            f"there is no checkpoint {Path(str(resume)).absolute()}",
            where="resume_from_checkpoint",
            expected="auto, or the path of a checkpoint-N directory",
            fix=f"checkpoints here: {names_in(path)}",
        )
    if new_run and not is_auto(resume) or not is_occupied(path):
        return
    check_free(path)
    if continues(path, resume) or overwrite or join or is_failed_attempt(path):
        return
    raise ConfigError(
        f"{path} contains {describe(path)}",
        where="output_dir",
        expected="an empty or new directory",
        fix="use resume_from_checkpoint: auto, new_run: true or overwrite_output_dir: true",
    )


def make_room(path: Path, *, resume: Resume, overwrite: bool, new_run: bool, join: bool) -> Path:
    """The directory to write to, once `check_target` has allowed it, with what was there out of the way."""
    if new_run and not is_auto(resume):
        return _first_free(path)
    if join or continues(path, resume) or not is_occupied(path):
        return path
    if overwrite:
        move_aside(path, "overwrite_output_dir")
    elif read_metrics(path):
        move_aside(path, "an earlier run ended there before its first checkpoint")
    else:
        _log.info("%s: a run that %s before its first step is replaced", path, _ended(path))
    return path


def _ended(path: Path) -> str:
    return {"failed": "failed", "stopped": "was stopped"}.get(read_status(path)["state"], "died")


def is_auto(resume: Resume) -> bool:
    return resume is True or str(resume).lower() in ("auto", "true")


def continues(path: Path, resume: Resume) -> bool:
    """Whether this would go on with the run that is in `path`."""
    if not resume or is_auto(resume):
        return bool(resume)
    return Path(str(resume)).resolve().parent == path.resolve()


def find_checkpoint(path: Path, resume: Resume, config: Mapping[str, Any], allow: Collection[str]) -> Checkpoint | None:
    """The verified checkpoint to go on from; None for a fresh start. Raises CorruptStateError if the one that was
    named cannot be used, or the configuration is another experiment's.
    """
    if not resume:
        return None
    found = checkpoints.newest_valid(path) if is_auto(resume) else _named_checkpoint(Path(str(resume)))
    if found:
        stored = durable.read_json(found.path / checkpoints.STATE_FILE)["config"]
        check_resumable(stored, config, allow, where=str(found.path))
    return found


def _named_checkpoint(path: Path) -> Checkpoint:
    checkpoints.say_verifying(path)
    found = checkpoints.verify(path)
    if not found.resumable:
        raise CorruptStateError(
            "this checkpoint holds only the model (save_only_model)",
            where=str(found.path),
            fix="give it as adapter_name_or_path or model_name_or_path instead",
        )
    return found


def make_directory(path: Path) -> bool:
    """Make the directory and try to write there. Returns whether it was not there before."""
    made = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".probe.tmp-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ResourceError(
            f"the directory cannot be written: {error.strerror or error}",
            where=str(path),
            fix="choose another output_dir",
        ) from error
    return made


def move_aside(path: Path, why: str) -> None:
    """Rename a directory that nobody writes to, and say so."""
    ensure_unlocked(path)  # and with no open file in it: Windows would not rename it
    _log.warning("%s: the earlier contents of %s are now in %s", why, path, checkpoints.set_aside(path))


def _first_free(path: Path) -> Path:
    number, free = 1, path
    while is_occupied(free):
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    if free != path:
        _log.warning("new_run: this run is written to %s", free)
    return free
