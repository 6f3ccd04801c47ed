"""Entering a dataset in `dataset_info.json`, so that `dataset: NAME` finds it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from trueup.data.registry import REGISTRY_NAMES, registered
from trueup.data.write import write_text
from trueup.errors import ConfigError


def registry_file(dataset_dir: str | Path, key: str) -> Path:
    """The registry of a folder, or the one to begin there.

    Raises:
        ConfigError: only people can edit it; `key` is the option that asked for an entry.
    """
    directory = Path(dataset_dir).expanduser()
    found = next((directory / name for name in REGISTRY_NAMES if (directory / name).is_file()), None)
    if found is not None and found.suffix != ".json":
        raise ConfigError(
            f"{found} is YAML, whose comments and order a program would lose", where=key,
            fix=f"drop {key} and add the entry by hand: file_name, type and columns, as docs tell",
        )  # fmt: skip
    if found is not None:
        registered(directory)  # reads it, and refuses a broken one
    return found or directory / REGISTRY_NAMES[0]


def check_name(name: str, file: Path, dataset_dir: str | Path, key: str = "--register") -> None:
    """Whether `file` may be entered under a name. Raises ConfigError if that name is taken by other data."""
    path = registry_file(dataset_dir, key)
    taken = _entries(path).get(name)
    if taken is not None and taken.get("file_name") != _relative(file, path.parent):
        raise ConfigError(
            f"the name {name!r} is taken in {path}", where=key, fix="choose another name, or remove the entry"
        )


def enter(name: str, file: Path, entry: Mapping[str, Any], dataset_dir: str | Path, key: str = "--register") -> Path:
    """Enter `file` under `name`, in place of an earlier entry for the same file; returns the registry.

    Raises:
        ConfigError: the name is taken by other data.
    """
    path = registry_file(dataset_dir, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        check_name(name, file, dataset_dir, key)
        known = _entries(path)
        known[name] = {"file_name": _relative(file, path.parent), **entry}
        write_text(path, json.dumps(known, indent=2, ensure_ascii=False) + "\n")
    return path


def leave(name: str, dataset_dir: str | Path, key: str = "--register") -> None:
    """Take an entry out of the registry, if it is there; its data stay where they are."""
    path = registry_file(dataset_dir, key)
    with FileLock(path.with_name(f".{path.name}.lock")):
        known = _entries(path)
        if known.pop(name, None) is not None:
            write_text(path, json.dumps(known, indent=2, ensure_ascii=False) + "\n")


def _entries(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8-sig")) if path.is_file() else {}


def _relative(file: Path, directory: Path) -> str:
    """The file's name as an entry has it: relative to the registry, where there is a way."""
    try:
        return Path(os.path.relpath(file.absolute(), directory.absolute())).as_posix()
    except ValueError:  # another drive of Windows
        return file.absolute().as_posix()
