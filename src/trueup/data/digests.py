"""Whether data are those of an earlier start, told without reading a row; and where that start's work is kept.

Imports no library that takes long.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from trueup.cache import cache_root
from trueup.config.schema import RunConfig
from trueup.data.load import load_settings
from trueup.data.registry import DatasetSpec, resolve_datasets
from trueup.data.sources import files_of

_WORTH_BYTES = 2_000_000  # of data files; fewer are tokenised about as fast as they are looked up


def local_files(cfg: RunConfig) -> list[tuple[DatasetSpec, list[Path]]] | None:
    """The files that a run's data are read from; None if some come from a hub, an address or memory."""
    names = list(dict.fromkeys([*cfg.data.dataset, *cfg.data.eval_dataset]))
    found = []
    for spec in resolve_datasets(names, cfg.data.dataset_dir, cfg.model.hub):
        if spec.url:
            return None
        paths = [file.path for file in files_of(spec) if file.path]
        if not paths:
            return None
        found.append((spec, paths))
    return found


def is_worth_keeping(files: list[tuple[DatasetSpec, list[Path]]]) -> bool:
    """Whether looking up what was made of the files is faster than making it again."""
    return sum(path.stat().st_size for _, paths in files for path in paths) >= _WORTH_BYTES


def data_digest(cfg: RunConfig, files: list[tuple[DatasetSpec, list[Path]]]) -> str:
    """sha256 of every byte of the data and of all that is said about reading, mixing and splitting them."""
    digest = hashlib.sha256(json.dumps(load_settings(cfg), sort_keys=True).encode())
    for spec, paths in files:
        digest.update(repr(spec).encode())
        for path in paths:
            digest.update(f"\0{path}\0{file_digest(path)}".encode())
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder(kind: str) -> Path:
    """Where copies of a kind are kept that nobody named a folder for."""
    return cache_root() / kind
