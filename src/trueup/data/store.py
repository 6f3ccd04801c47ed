"""Datasets fetched from a hub, kept on this machine: one parquet file and a note of where it came from.

They lie below `TRUEUP_CACHE` (or ~/.cache/trueup), or where the user wanted them; reading a dataset
looks here before it asks the hub, so that what was fetched once works offline.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trueup.cache import cache_root
from trueup.data.write import write_whole

if TYPE_CHECKING:
    from trueup.data.registry import DatasetSpec

NOTE = "source.json"


@dataclass(frozen=True, slots=True)
class Copy:
    """A fetched dataset: its file, and what it is a copy of."""

    file: Path
    hub: str
    hub_id: str
    subset: str | None
    split: str
    folder: str | None
    rows: int
    fetched: str  # the day

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "file": str(self.file)}


def folder_of(spec: DatasetSpec) -> Path:
    """Where a dataset's note (and, unless another place was asked for, its copy) lies."""
    parts = [spec.hub, spec.hub_id or "", spec.subset or "", spec.folder or "", spec.split]
    return cache_root() / "datasets" / "--".join(re.sub(r"[^\w.+-]+", "--", part) for part in parts if part)


def find_copy(spec: DatasetSpec) -> Copy | None:
    """The copy of a hub's dataset on this machine, if there is one."""
    if not spec.hub_id:
        return None
    try:
        note = json.loads((folder_of(spec) / NOTE).read_text(encoding="utf-8"))
        copy = Copy(**{**note, "file": Path(note["file"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return copy if copy.file.is_file() else None


def fetch(spec: DatasetSpec, load: Callable[[], Any], output: Path | None = None) -> Copy:
    """Bring a hub's dataset here. `load` gives it as a `datasets.Dataset`; `output` is a folder for the file."""
    note = folder_of(spec)
    dataset = load()
    file = ((output or note) / f"{_file_name(spec)}.parquet").absolute()
    write_whole(file, lambda stage: dataset.to_parquet(str(stage)))
    copy = Copy(
        file, spec.hub, spec.hub_id or "", spec.subset, spec.split, spec.folder, len(dataset), time.strftime("%Y-%m-%d")
    )
    text = json.dumps(copy.to_dict(), indent=2, ensure_ascii=False) + "\n"
    write_whole(note / NOTE, lambda stage: stage.write_text(text, encoding="utf-8"))
    return copy


def _file_name(spec: DatasetSpec) -> str:
    return re.sub(r"[^\w.-]+", "_", spec.name.rpartition("/")[2]) or "data"
