"""`trueup data list`: every dataset that has a name here, and where it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trueup.data.catalog import CATALOG
from trueup.data.files import list_files
from trueup.data.layout import kind_of
from trueup.data.registry import (
    BUILTIN_DIR,
    TYPES,
    DatasetSpec,
    registered,
    resolve_datasets,
    well_known,
)
from trueup.data.report import number, shorten
from trueup.data.sources import read_rows
from trueup.data.store import Copy, find_copy
from trueup.errors import UserError

if TYPE_CHECKING:
    from rich.console import RenderableType

_CHEAP_BYTES = 8 << 20  # files up to this size are read to count their rows
_GROUPS = {
    "registry": "yours",
    "bundled": "bundled samples",
    "well-known": "well-known sets; `trueup data get NAME` keeps a copy",
}
_STAGES = {
    "text": "pt",
    "chat": "sft",
    "pair": "dpo, rm",
    "ranking": "rm, dpo",
    "feedback": "kto",
    "prompt": "ppo, grpo",
}


@dataclass(frozen=True, slots=True)
class Item:
    """A dataset with a name: `group` is registry, bundled or well-known."""

    name: str
    group: str
    kind: str | None
    rows: int | str | None  # counted, or about as many as its hub has
    origin: str  # file:line of its entry, or its hub id
    source: str
    about: str = ""
    copy: Copy | None = None
    problem: str | None = None

    def to_dict(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in self.__slots__ if name != "copy"}
        return values | {"copy": self.copy.to_dict() if self.copy else None}


@dataclass(frozen=True, slots=True)
class Inventory:
    """All named datasets, for a terminal or as JSON."""

    items: list[Item]

    def to_dict(self) -> dict[str, Any]:
        return {"datasets": [item.to_dict() for item in self.items]}

    def __rich__(self) -> RenderableType:
        from rich.console import Group

        return Group(*self._parts())

    def _parts(self) -> Iterator[RenderableType]:
        from rich.text import Text

        for group, title in _GROUPS.items():
            items = [item for item in self.items if item.group == group]
            yield Text(title if items else f"{title}: none; register files in dataset_info.json", style="bold")
            yield _table(items)
            yield Text()
        yield Text("`dataset: NAME` in any config uses them; `trueup data preview NAME` shows rows", style="dim")


def _table(items: list[Item]) -> RenderableType:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for item in items:
        rows = number(item.rows) if isinstance(item.rows, int) else item.rows and f"~{item.rows}"
        table.add_row(item.name, _STAGES.get(item.kind or "", "?"), rows or "", _where(item))
    return table


def _where(item: Item) -> RenderableType:
    from rich.text import Text

    if item.problem:
        return Text(f"{item.origin}: {shorten(item.problem, 200)}", style="red")
    if item.group == "well-known":
        text = Text(item.about)
        return text.append(f"; here since {item.copy.fetched}", style="green") if item.copy else text
    return Text(item.origin if item.group == "registry" else "", style="dim")


def inventory(dataset_dir: str | Path = "data", hub: str = "huggingface") -> Inventory:
    """What the registry of `dataset_dir`, the package and the catalogue name.

    Raises ConfigError for a registry that cannot be read; what is wrong with one entry is shown beside it.
    """
    yours = registered(dataset_dir)
    items = [_local(name, "registry", entry.origin, dataset_dir, hub) for name, entry in yours.items()]
    items += [
        _local(name, "bundled", entry.origin, BUILTIN_DIR, hub)
        for name, entry in registered(BUILTIN_DIR).items()
        if name not in yours
    ]
    return Inventory(items + [_known(name, hub) for name in CATALOG if name not in yours])


def _local(name: str, group: str, origin: str, directory: str | Path, hub: str) -> Item:
    try:
        (spec,) = resolve_datasets([name], directory, hub)
        copy = find_copy(spec)
        kind, rows = _look(spec, copy)
        return Item(name, group, kind, rows, origin, _source(spec), copy=copy)
    except UserError as error:
        return Item(name, group, None, None, origin, "", problem=error.problems[0].what)


def _look(spec: DatasetSpec, copy: Copy | None) -> tuple[str | None, int | None]:
    """The kind of a dataset and its number of rows, as far as they can be had at once."""
    declared = spec.kind or ("pair" if spec.ranking else None)
    if copy:
        return declared, copy.rows
    if not spec.source:
        return declared, None
    files = list_files(spec.source, spec)
    if all(file.suffix.lower() == ".parquet" for file in files):
        import pyarrow.parquet as pq

        return declared, sum(pq.read_metadata(file).num_rows for file in files)
    if sum(file.stat().st_size for file in files) > _CHEAP_BYTES:
        return declared, None
    rows = read_rows(spec)
    return declared or kind_of(spec, rows.values), len(rows)


def _source(spec: DatasetSpec) -> str:
    return str(spec.source or spec.url or f"{spec.hub}: {spec.hub_id}")


def _known(name: str, hub: str) -> Item:
    known, spec = CATALOG[name], well_known(name, hub)
    return Item(
        name, "well-known", TYPES[known.type], known.rows, "the catalogue", _source(spec), known.about, find_copy(spec)
    )
