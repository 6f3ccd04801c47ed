"""Checkpoints as transactions. Torch-free: what is inside is `state.py`'s business.

Commit: stage `.checkpoint-N.tmp-<pid>` in the run's own directory → write the files → fsync them →
write `manifest.json` last (name, size, sha256 of each file, format version, config hash, data
fingerprint) → fsync the directory → rename to `checkpoint-N` → fsync the parent. A reader trusts
only a manifest that verifies; what does not verify is reported and passed over, never deleted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trueup.errors import CorruptStateError, ResourceError
from trueup.training import durable
from trueup.training.durable import boundary

FORMAT = "trueup-checkpoint"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
STATE_FILE = "trainer_state.json"

_NAME = re.compile(r"checkpoint-(\d+)")
_STAGE = re.compile(r"\..+\.tmp-\d+")
POINT = "checkpoint:write"  # see `durable.boundary`
_log = logging.getLogger("trueup")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose manifest verified."""

    path: Path
    step: int
    manifest: Mapping[str, Any] = field(repr=False)

    @property
    def resumable(self) -> bool:
        """False for one saved with `save_only_model`."""
        return bool(self.manifest["resumable"])

    @property
    def reason(self) -> str:
        """Why it was saved: "schedule", "best", "stop"."""
        return str(self.manifest["reason"])


def json_hash(value: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON object, whatever the order of its keys and its layout."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def commit(
    parent: Path,
    step: int,
    write: Callable[[Path], None],
    *,
    resumable: bool = True,
    reason: str = "schedule",
    identity: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Save `checkpoint-<step>` under `parent`; `write` puts the files into the directory it is
    given.

    `identity` (config hash, data fingerprint …) goes into the manifest. Raises ResourceError when
    the disk refuses; then the stage is removed and every older checkpoint is as it was.
    """
    target = parent / f"checkpoint-{step}"
    stage = parent / f".{target.name}.tmp-{os.getpid()}"
    with _disk(parent, f"saving {target}"), _staged(stage):
        boundary(POINT)
        write(stage)
        boundary(POINT)
        files = _seal(stage)
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "step": step,
            "resumable": resumable,
            "reason": reason,
            **(identity or {}),
            "files": files,
        }
        manifest["manifest_sha256"] = json_hash(manifest)
        durable.write_json(stage / MANIFEST, manifest)
        boundary(POINT)
        durable.sync_directory(stage)
        if target.exists():  # a bad one of that step, or one of an abandoned continuation
            set_aside(target)
        boundary(POINT)
        durable.rename(stage, target)
        boundary(POINT)
        durable.sync_directory(parent)
        boundary(POINT)
    return Checkpoint(target, step, manifest)


def replace_files(directory: Path, write: Callable[[Path], None]) -> None:
    """Write a final model into `directory`: staged beside it, then renamed file by file.

    Weights go first and the small JSON files that point to them last. Raises ResourceError as
    `commit` does.
    """
    stage = directory / f".model.tmp-{os.getpid()}"
    with _disk(directory, f"saving the model to {directory}"), _staged(stage):
        boundary(POINT)
        write(stage)
        files = list(durable.walk_files(stage))
        for path in files:
            durable.sync_file(path)
        for path in sorted(files, key=lambda path: path.suffix == ".json"):
            boundary(POINT)
            target = directory / path.relative_to(stage)
            target.parent.mkdir(parents=True, exist_ok=True)
            durable.replace(path, target)
        durable.sync_directory(directory)
        boundary(POINT)


def verify(path: Path, contents: bool = True) -> Checkpoint:
    """Read the manifest and compare every file with it; without `contents` only names and sizes, which is quick.
    Raises CorruptStateError naming file and both hashes.
    """
    manifest = _read_manifest(path)
    for entry in manifest["files"]:
        _verify_file(path / entry["name"], entry, contents)
    return Checkpoint(path, int(manifest["step"]), manifest)


def checkpoints(parent: Path) -> list[Path]:
    """Directories named `checkpoint-N`, newest step first: by number, never by time stamp."""
    if not parent.is_dir():
        return []
    found = [path for path in parent.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """N of `checkpoint-N`, -1 for any other name."""
    match = _NAME.fullmatch(path.name)
    return int(match.group(1)) if match else -1


def newest_valid(parent: Path) -> Checkpoint | None:
    """The newest checkpoint to resume from. Bad ones on the way are reported and stay where they
    are.
    """
    for path in checkpoints(parent):
        say_verifying(path)
        try:
            checkpoint = verify(path)
        except CorruptStateError as error:
            _log.warning("%s cannot be trusted and is passed over: %s", path.name, error)
            continue
        if checkpoint.resumable:
            return checkpoint
        _log.warning("%s holds only the model (save_only_model); it is passed over", path.name)
    return None


def say_verifying(path: Path) -> None:
    """Reading many gigabytes takes a while."""
    gigabytes = sum(file.stat().st_size for file in durable.walk_files(path)) / 2**30
    if gigabytes > 1:
        _log.info("verifying %s (%.1f GB)", path.name, gigabytes)


def all_valid(parent: Path) -> list[Checkpoint]:
    """Every checkpoint that verifies, oldest first. The last two, on which a run's safety rests, by every byte; older
    ones by names and sizes: they are only counted, and removed.
    """
    found: list[Checkpoint] = []
    for path in checkpoints(parent):
        with contextlib.suppress(CorruptStateError):
            found.append(verify(path, contents=len(found) < 2))
    return found[::-1]


def set_aside(path: Path) -> Path:
    """Rename something out of the way, to the first free `<name>.set-aside-<n>`; nothing is
    deleted.
    """
    number = 1
    while (target := path.with_name(f"{path.name}.set-aside-{number}")).exists():
        number += 1
    durable.rename(path, target)
    return target


def retain(valid: Iterable[Checkpoint], limit: int | None, best_step: int | None) -> list[Checkpoint]:
    """Remove old checkpoints beyond `limit`, and superseded ones that were saved only for being
    best.

    `valid` have been verified; only these are counted and removed. The last two and the best always
    stay. Returns those that remain, oldest first.
    """
    present = sorted((c for c in valid if c.path.exists()), key=lambda c: c.step)
    kept = {c.step for c in present[-2:]} | {best_step}
    surplus = {c.step for c in present[: -max(limit, 2)]} if limit else set()
    superseded = {c.step for c in present if c.reason == "best"}
    removed = (surplus | superseded) - kept
    for checkpoint in present:
        if checkpoint.step in removed:
            _remove(checkpoint.path)
    return [checkpoint for checkpoint in present if checkpoint.step not in removed]


def _remove(path: Path) -> None:
    # Renamed first: a half-deleted directory must not bear a checkpoint's name.
    doomed = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with _disk(path.parent, f"removing {path}"), _staged(doomed, make=False):
        boundary(POINT)
        durable.rename(path, doomed)
        boundary(POINT)


def remove_stale_stages(parent: Path) -> None:
    """Remove what a dead process left half-written. Stages of living processes are not touched."""
    for path in parent.glob(".*.tmp-*"):
        pid = int(path.name.rpartition("-")[2]) if _STAGE.fullmatch(path.name) else None
        if pid is None or (pid != os.getpid() and durable.process_alive(pid)):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _staged(stage: Path, make: bool = True) -> Iterator[None]:
    """A directory that is gone afterwards, unless it was renamed."""
    shutil.rmtree(stage, ignore_errors=True)
    try:
        if make:
            stage.mkdir(parents=True)
        yield
    finally:
        shutil.rmtree(stage, ignore_errors=True)


@contextlib.contextmanager
def _disk(directory: Path, doing: str) -> Iterator[None]:
    """A disk that refuses is the user's to mend."""
    try:
        yield
    except Exception as error:
        if not durable.disk_trouble(error):
            raise
        raise ResourceError(
            f"{doing} failed: {error}",
            where=str(directory),
            expected="a disk that takes the file",
            fix="free space or lower save_total_limit, then resume_from_checkpoint: auto; "
            "earlier checkpoints are intact",
        ) from error


def _seal(stage: Path) -> list[dict[str, Any]]:
    """Push the staged files to the disk and describe them."""
    files = []
    for path in durable.walk_files(stage):
        durable.sync_file(path)
        boundary(POINT)
        name = path.relative_to(stage).as_posix()
        files.append({"name": name, "size": path.stat().st_size, "sha256": durable.sha256(path)})
    for directory in (path for path in stage.rglob("*") if path.is_dir()):
        durable.sync_directory(directory)
    return files


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = durable.read_json(path / MANIFEST)
    except FileNotFoundError:
        raise CorruptStateError(
            "there is no manifest, so this is no complete checkpoint of trueup",
            where=str(path),
            expected=f"a directory with {MANIFEST}",
            fix="give another checkpoint, or resume_from_checkpoint: auto",
        ) from None
    except (OSError, ValueError) as error:
        raise CorruptStateError(f"the manifest cannot be read: {error}", where=str(path / MANIFEST)) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CorruptStateError("this is not a manifest of trueup", where=str(path / MANIFEST))
    if manifest.get("format_version") != FORMAT_VERSION:
        raise CorruptStateError(
            f"the checkpoint has format version {manifest.get('format_version')}",
            where=str(path),
            expected=f"format version {FORMAT_VERSION}",
            fix="resume it with the version of trueup that wrote it (see environment.json)",
        )
    written = manifest.get("manifest_sha256")
    digest = json_hash({k: v for k, v in manifest.items() if k != "manifest_sha256"})
    if digest != written:
        raise CorruptStateError(
            f"the manifest is not the one that was written: its contents have sha256 {digest}",
            where=str(path / MANIFEST),
            expected=f"sha256 {written}",
            fix="resume from another checkpoint, or resume_from_checkpoint: auto",
        )
    return manifest


def _verify_file(path: Path, entry: Mapping[str, Any], contents: bool) -> None:
    if not path.is_file():
        raise CorruptStateError("the file is missing", where=str(path))
    try:
        size = path.stat().st_size
        digest = durable.sha256(path) if contents else entry["sha256"]
    except OSError as error:
        raise CorruptStateError(f"the file cannot be read: {error}", where=str(path)) from error
    if size != entry["size"] or digest != entry["sha256"]:
        raise CorruptStateError(
            f"its bytes are not the ones that were written: {size} bytes, sha256 {digest}",
            where=str(path),
            expected=f"{entry['size']} bytes, sha256 {entry['sha256']}",
            fix="resume from another checkpoint, or resume_from_checkpoint: auto",
        )
