"""Files that a browser sends: safely named, never over another, entered in the registry; and lines of them mended.

Torch-free.
"""

from __future__ import annotations

import os
import re
import shutil
import time
import unicodedata
import uuid
from pathlib import Path
from typing import Any

from filelock import FileLock

from trueup.data.register import check_name, enter, leave
from trueup.data.registry import FILE_SUFFIXES, REGISTRY_NAMES, known_names, registered
from trueup.errors import ConfigError
from trueup.web.workspace import Workspace

MOST_BYTES = 2**30
_LONGEST = 100
_MENDABLE_BYTES = 32 * 2**20
_STALE_SECONDS = 86400.0


def safe_name(name: str) -> str:
    """A file's name as it may lie in `data`: its last part, in plain characters. Raises ConfigError for other types."""
    last = re.split(r"[/\\]", unicodedata.normalize("NFC", name))[-1]
    stem, suffix = os.path.splitext(last)
    suffix = suffix.lower()
    if suffix not in FILE_SUFFIXES:
        what = f"{last[-60:]!r} is no data file that can be uploaded"
        raise ConfigError(what, expected=" ".join(FILE_SUFFIXES), fix="unpack archives first")
    stem = re.sub(r"[^\w-]+", "_", stem).strip("_-")[:_LONGEST] or "data"
    if f"{stem}{suffix}" in REGISTRY_NAMES:
        raise ConfigError(f"{last} is the registry itself, not data", fix="give the file another name")
    return stem + suffix


def take(place: Workspace, staged: Path, name: str) -> str:
    """Put a file that has arrived whole under `data`, and register it; returns the dataset's name.

    Raises:
        ConfigError: not a name, or a type, of data.
    """
    wanted = safe_name(name)
    folder = place.root / "data"
    folder.mkdir(exist_ok=True)
    with FileLock(place.private() / "uploads.lock"):
        stem, suffix = os.path.splitext(wanted)
        taken, number, free = set(known_names(folder)), 1, stem
        while free in taken or (folder / f"{free}{suffix}").exists():
            number += 1
            free = f"{stem}-{number}"
        target = place.data(f"{free}{suffix}")
        check_name(free, target, folder, "upload")  # before anything is moved
        shutil.move(staged, target)
        enter(free, target, {}, folder, "upload")
    return free


def replace(place: Workspace, staged: Path, name: str, target: Path) -> None:
    """Put a file that has arrived in the place of one of the same type; that one goes to the trash."""
    if Path(safe_name(name)).suffix != target.suffix.lower():
        raise ConfigError(
            f"{name[-60:]!r} is of another type", expected=target.suffix, fix="upload it as a new dataset"
        )
    place.trash(target)
    shutil.move(staged, target)


def line_of(path: Path, number: int) -> str | None:
    """A line of a file of lines, by its number from 1; None where lines are not to be mended, or are no text."""
    if path.suffix.lower() not in (".jsonl", ".ndjson", ".json") or path.stat().st_size > _MENDABLE_BYTES:
        return None
    lines = _lines(path)
    line = lines[number - 1] if 0 < number <= len(lines) else None
    return line if line is not None and len(line) < 2**20 and _is_text(line) else None


def mend(place: Workspace, path: Path, number: int, was: str, text: str) -> None:
    """Write another text in place of a line, or take the line out if there is none. The file as it was is kept.

    Raises:
        ConfigError: the line is another by now, or the text is more than one line.
    """
    with FileLock(place.private() / "uploads.lock"):
        lines = _lines(path)
        if not 0 < number <= len(lines) or lines[number - 1] != was:
            raise ConfigError(f"line {number} of {path.name} has changed since", fix="look at the file again")
        if "\n" in text.strip():
            raise ConfigError("a line holds one object", expected="no line breaks; \\n inside texts")
        lines[number - 1 : number] = [text.strip()] if text.strip() else []
        place.trash(path)
        stage = place.private("staged") / f"{os.getpid()}-{path.name}"
        stage.write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
        shutil.move(stage, path)


def registry_entry(place: Workspace, name: str) -> dict[str, Any]:
    """What the workspace's registry says of a dataset."""
    entry = registered(place.root / "data").get(name)
    return dict(entry.value) if entry and isinstance(entry.value, dict) else {}


def _lines(path: Path) -> list[str]:
    return path.read_bytes().decode("utf-8", "surrogateescape").split("\n")


def _is_text(line: str) -> bool:
    """Whether a page can show it: bytes that are no UTF-8 cannot be."""
    return not any("\ud800" <= letter <= "\udfff" for letter in line)


def stage(place: Workspace) -> Path:
    """A new place for a file that is arriving. What lies there since yesterday came to nothing, and goes."""
    folder = place.private("staged")
    for old in folder.iterdir():
        if old.is_file() and time.time() - old.stat().st_mtime > _STALE_SECONDS:
            old.unlink(missing_ok=True)
    return folder / uuid.uuid4().hex


def remove(place: Workspace, name: str, path: Path) -> None:
    """Take a dataset out of the registry, and its file into the trash."""
    leave(name, place.root / "data")
    place.trash(path)
