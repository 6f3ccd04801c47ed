"""`trueup data get`: bring a hub's dataset here and keep it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trueup.data.catalog import find
from trueup.data.counts import counted
from trueup.data.hubs import load_from_hub
from trueup.data.registry import DatasetSpec, resolve_datasets
from trueup.data.store import Copy, fetch, find_copy
from trueup.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Fetched:
    """A dataset's copy; `new` if it came just now."""

    name: str
    copy: Copy
    new: bool

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "new": self.new, **self.copy.to_dict()}

    def render(self) -> str:
        copy = self.copy
        word = "fetched" if self.new else f"here since {copy.fetched}:"
        megabytes = copy.file.stat().st_size / 1e6
        return "\n".join(
            [
                f"{word} {copy.hub_id} from {copy.hub}: {counted(copy.rows, 'row', 'rows')}, {megabytes:.1f} MB",
                f"  {copy.file}",
                f"use it in any config: dataset: {self.name}",
                f"look at it: trueup data preview {self.name}",
            ]
        )


def fetch_dataset(
    name: str, hub: str, output: Path | None, dataset_dir: str | Path, force: bool, asked: bool = False
) -> Fetched:
    """Fetch the dataset `name`; a copy that is there already is kept unless `force`.

    Args:
        asked: the user named `hub`, so another that has the set will not do.

    Raises:
        ConfigError: it is on no hub, or not on this one. ModelError: the hub is out of reach (C17).
    """
    known = find(name)
    if asked and known and hub not in known[1].hubs:
        raise ConfigError(
            f"{name} is not known to be on {hub}",
            where="--hub",
            expected=" | ".join(known[1].hubs),
            fix=f"if you know its id there: trueup data get OWNER/NAME --hub {hub}",
        )
    spec = _spec(name, dataset_dir, hub)
    copy = find_copy(spec)
    here = copy is not None and (output is None or copy.file.parent == output.absolute())
    if copy and here and not force:
        return Fetched(name, copy, new=False)
    return Fetched(name, fetch(spec, lambda: load_from_hub(spec), output), new=True)


def _spec(name: str, dataset_dir: str | Path, hub: str) -> DatasetSpec:
    (spec,) = resolve_datasets([name], dataset_dir, hub)
    if spec.hub_id is None:
        raise ConfigError(
            f"{name} is on no hub: {spec.source or spec.url}", where=spec.origin, fix="use it as it is: dataset: …"
        )
    return spec
