"""Which data a name stands for: `dataset_info.json` (or .yaml), the built-in samples, a path, a
well-known set, or a hub id.

The registry's format is LLaMA-Factory's, so that a registry people already have is read as it
stands. One deviation, on purpose: a `columns` or `tags` block that names only some entries leaves
the others at their defaults (there, they become None and the first row fails with `KeyError:
None`). Write `"query": null` to leave a column out.
"""

from __future__ import annotations

import difflib
import glob
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from trueup import memory
from trueup.data import catalog
from trueup.data.given import GivenRows
from trueup.data.jsontext import JsonFault, caret, line_and_column, object_members
from trueup.data.store import find_copy
from trueup.errors import ConfigError, DataError, Problem

BUILTIN_DIR = Path(__file__).resolve().parent.parent / "builtin" / "data"
REGISTRY_NAMES = ("dataset_info.json", "dataset_info.yaml", "dataset_info.yml")
FILE_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
FORMATS = ("alpaca", "sharegpt", "openai", "trl")

#: `type:` of an entry → the kind of example its rows are.
TYPES = {
    "pretrain": "text",
    "pt": "text",
    "sft": "chat",
    "rm": "ranking",
    "dpo": "pair",
    "kto": "feedback",
}

#: Roles a column can play, and other names under which a registry may give them.
COLUMN_ROLES = (
    "prompt",
    "query",
    "response",
    "history",
    "messages",
    "system",
    "tools",
    "chosen",
    "rejected",
    "kto_tag",
    "text",
    "answers",
    "score",
    "scores",
    "ranks",
    "margin",
)
COLUMN_ALIASES = {
    "instruction": "prompt",
    "input": "query",
    "output": "response",
    "completion": "response",
    "conversations": "messages",
    "label": "kto_tag",
    "responses": "answers",
    "rank": "ranks",
}
MEDIA_ROLES = ("images", "videos", "audios")
TAG_NAMES = (
    "role_tag",
    "content_tag",
    "user_tag",
    "assistant_tag",
    "observation_tag",
    "function_tag",
    "system_tag",
)
_HUB_KEYS = catalog.HUB_KEYS
_ENTRY_KEYS = (
    *_HUB_KEYS.values(),
    "script_url",
    "cloud_file_name",
    "file_name",
    "formatting",
    "type",
    "ranking",
    "subset",
    "split",
    "folder",
    "num_samples",
    "columns",
    "tags",
)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+").fullmatch
_URL = re.compile(r"\w+://").match


@dataclass(frozen=True, slots=True)
class DatasetSpec:
    """Where a dataset's rows are and what its owner said about them; nothing has been read yet.

    Exactly one of `source` (file, folder or glob pattern on this machine), `hub_id`, `url` and
    `rows` (in memory) is set. `columns` maps roles to column names, as far as given (None: leave that role out); `tags`
    likewise. `kind` is what `type` says, `ranking` as written or None. `origin` is the
    registry's "file:line", or the path, or how it was named.
    """

    name: str
    origin: str
    source: Path | None = None
    hub_id: str | None = None
    hub: str = "huggingface"
    url: str | None = None
    formatting: str = "auto"
    kind: str | None = None
    ranking: bool | None = None
    columns: Mapping[str, str | None] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    subset: str | None = None
    split: str = "train"
    folder: str | None = None
    num_samples: int | None = None
    registered: bool = False  # whether `origin` is an entry of a registry
    catalogue: str | None = None  # its name among the well-known sets, if it is one of those
    rows: Sequence[Mapping[str, Any]] | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class _Entry:
    value: Any
    origin: str
    base: Path


def resolve_datasets(
    names: Sequence[str], dataset_dir: str | Path = "data", hub: str = "huggingface"
) -> list[DatasetSpec]:
    """What each of `names` stands for, in order: a registered name, a built-in sample, a path, a
    well-known set or a hub id.

    A `dataset_dir` without a registry is fine as long as nothing asks for it; "ONLINE" makes every
    name a hub id. Raises ConfigError (unknown name, bad registry) or DataError (a path that is not
    there), each with every problem of its kind.
    """
    if str(dataset_dir) == "ONLINE":
        return [_from_memory(n) if memory.is_name(n) else DatasetSpec(n, "hub id", hub_id=n, hub=hub) for n in names]
    directory = Path(dataset_dir).expanduser()
    registry = registered(directory)
    builtin = registered(BUILTIN_DIR)
    specs: list[DatasetSpec] = []
    config_problems: list[Problem] = []
    data_problems: list[Problem] = []
    for name in names:
        entry = registry.get(name) or builtin.get(name)
        try:
            if memory.is_name(name):
                specs.append(_from_memory(name))
            elif entry:
                specs.append(_from_entry(name, entry, hub))
            else:
                specs.append(_unregistered(name, directory, hub, registry, builtin))
        except ConfigError as error:
            config_problems += error.problems
        except DataError as error:
            data_problems += error.problems
    if config_problems:
        raise ConfigError(_unique(config_problems + data_problems))
    if data_problems:
        raise DataError(_unique(data_problems))
    return _distinct(names, specs)


def _distinct(names: Sequence[str], specs: list[DatasetSpec]) -> list[DatasetSpec]:
    """The specs; where two paths have the same last part, both are called as they were given."""
    given: dict[str, set[str]] = {}
    for name, spec in zip(names, specs, strict=True):
        given.setdefault(spec.name, set()).add(name)
    return [
        replace(spec, name=name) if len(given[spec.name]) > 1 else spec for name, spec in zip(names, specs, strict=True)
    ]


def registered(directory: str | Path) -> dict[str, _Entry]:
    """Every entry of the registry in `directory`, unchecked; {} without one. Raises ConfigError."""
    directory = Path(directory)
    for name in REGISTRY_NAMES:
        path = directory / name
        if path.is_file():
            return {key: _Entry(value, f"{path}:{line}", directory) for key, value, line in _read_registry(path)}
    return {}


def known_names(dataset_dir: str | Path = "data") -> list[str]:
    """Names that `dataset:` accepts here: the user's registry first, then the built-in samples."""
    return list({**registered(dataset_dir), **registered(BUILTIN_DIR)})


def spec_of(name: str, entry: Mapping[str, Any], origin: str) -> DatasetSpec:
    """The spec that an entry describes which stands in no registry yet. Raises ConfigError."""
    return _from_entry(name, _Entry(dict(entry), origin, Path()), "huggingface")


def well_known(name: str, hub: str = "huggingface") -> DatasetSpec:
    """A dataset of the catalogue: the copy on this machine, else on `hub` or the first that has it."""
    found = catalog.find(name)
    if found is None:
        near = difflib.get_close_matches(name, [*catalog.CATALOG, *catalog.ALIASES], n=3, cutoff=0.5)
        raise ConfigError(
            f"{name!r} is no well-known dataset",
            expected="a name of `trueup data list`, or a hub id like owner/name",
            fix=f"did you mean {' or '.join(near)}?" if near else None,
        )
    key, known = found

    def on(hub: str) -> DatasetSpec:
        entry = _Entry(known.entry_on(hub), "the catalogue", Path())
        return replace(_from_entry(key, entry, hub), name=name, registered=False, catalogue=key)

    specs = [on(hub) for hub in dict.fromkeys([hub, *known.hubs])]
    return next((spec for spec in specs if find_copy(spec)), specs[0])


def missing_path(path: str | Path, directory: Path | None = None) -> Problem:
    """A file or folder that is not there: the absolute path tried, and what is there instead."""
    tried = Path(path).expanduser().absolute()
    parent = next(p for p in tried.parents if p.is_dir())
    wanted = tried.relative_to(parent).parts[0]
    present = sorted(p.name for p in parent.iterdir() if not p.name.startswith("."))
    near = difflib.get_close_matches(wanted, present, n=3, cutoff=0.5)
    if near:
        fix = f"did you mean {' or '.join(str(parent / n) for n in near)}?"
    elif present:
        fix = f"in {parent} there is: {_some(present)}"
    else:
        fix = f"{parent} is empty"
    also = f" (nor in {directory.absolute()})" if directory else ""
    return Problem(f"no such file or folder: {tried}{also}", fix=fix)


def compression_of(name: str) -> str | None:
    """ ".gz" of "rows.jsonl.gz"; None for a file that is not compressed."""
    suffix = Path(name).suffix.lower()
    return suffix if suffix in COMPRESSIONS else None


def type_of(name: str) -> str:
    """The suffix that tells what a file holds: ".jsonl" of "rows.jsonl.gz" and of "rows.JSONL"."""
    compression = compression_of(name)
    return Path(name[: -len(compression)] if compression else name).suffix.lower()


# ---- registry files ------------------------------------------------------------------------------


def _read_registry(path: Path) -> Iterable[tuple[str, Any, int]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"the registry is not UTF-8 (byte {error.start})",
            where=str(path),
            fix=f"save {path} as UTF-8",
        ) from None
    members = _json_members(path, text) if path.suffix == ".json" else _yaml_members(path, text)
    seen: dict[str, int] = {}
    for name, _, line in members:
        if name in seen:
            raise ConfigError(
                f"dataset {name!r} is registered twice (first in line {seen[name]})",
                where=f"{path}:{line}",
                fix="remove or rename one of the two",
            )
        seen[name] = line
    return members


def _json_members(path: Path, text: str) -> list[tuple[str, Any, int]]:
    try:
        return [(name, value, line_and_column(text, offset)[0]) for name, value, offset in object_members(text)]
    except JsonFault as fault:
        line, column = line_and_column(text, fault.offset)
        raise ConfigError(
            f"{fault.message}\n{caret(text, fault.offset)}",
            where=f"{path}:{line}:{column}",
            expected='a JSON object of {"name": {"file_name": …}, …}',
        ) from None


def _yaml_members(path: Path, text: str) -> list[tuple[str, Any, int]]:
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return []
        _refuse_yaml_surprises(path, node)
        return [
            (
                str(loader.construct_object(key, deep=True)),
                loader.construct_object(value, deep=True),
                key.start_mark.line + 1,
            )
            for key, value in node.value
        ]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise ConfigError(getattr(error, "problem", None) or str(error), where=f"{path}{line}") from None
    finally:
        loader.dispose()


def _refuse_yaml_surprises(path: Path, root: yaml.Node) -> None:
    """A registry is a plain mapping: no key twice, no anchors (a few lines of them can fill the
    memory).
    """
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(
            "the registry is not a mapping of names",
            where=f"{path}:{root.start_mark.line + 1}",
            expected="name: {file_name: …}",
        )
    nodes, visited = [root], set()
    while nodes:
        node = nodes.pop()
        if id(node) in visited:
            raise ConfigError("anchors are not allowed in a registry", where=f"{path}:{node.start_mark.line + 1}")
        visited.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif isinstance(node, yaml.MappingNode):
            keys: set[str] = set()
            for key, value in node.value:
                if key.value in keys:
                    raise ConfigError(
                        f"key {key.value!r} is given twice",
                        where=f"{path}:{key.start_mark.line + 1}",
                    )
                keys.add(key.value)
                nodes.append(value)


# ---- entries -------------------------------------------------------------------------------------


def _from_entry(name: str, entry: _Entry, hub: str) -> DatasetSpec:
    """The spec that a registry entry describes. Raises ConfigError with all that is wrong in it."""
    value, problems = entry.value, []

    def wrong(what: str, expected: str | None = None, fix: str | None = None) -> None:
        problems.append(Problem(f"dataset {name!r}: {what}", entry.origin, expected, fix))

    if not isinstance(value, dict):
        wrong(f"is {_article(value)}", 'an object such as {"file_name": "train.jsonl"}')
        raise ConfigError(problems)
    for key in value:
        if key not in _ENTRY_KEYS:
            wrong(f"unknown key {key!r}", fix=_did_you_mean(key, _ENTRY_KEYS))
    for key, kind, expected in (
        *((k, str, "text") for k in (*_HUB_KEYS.values(), "cloud_file_name", "file_name")),
        ("formatting", str, "text"),
        ("type", str, "text"),
        ("ranking", bool, "true or false"),
        ("subset", str, "text"),
        ("split", str, "text"),
        ("folder", str, "text"),
        ("num_samples", int, "a whole number ≥ 1"),
    ):
        given = value.get(key)
        if given is None:
            continue
        fits = isinstance(given, kind)
        if kind is int:
            fits = fits and not isinstance(given, bool) and int(given) >= 1
        if not fits:
            wrong(f"`{key}` is {given!r}", expected)
    formatting = value.get("formatting") or "auto"
    if isinstance(formatting, str) and formatting not in (*FORMATS, "auto"):
        wrong(
            f"unknown formatting {formatting!r}",
            " | ".join(FORMATS),
            _did_you_mean(formatting, FORMATS),
        )
    kind = value.get("type")
    if isinstance(kind, str) and kind not in TYPES:
        wrong(f"unknown type {kind!r}", " | ".join(TYPES), _did_you_mean(kind, tuple(TYPES)))
    columns = _columns(value.get("columns"), wrong)
    tags = _tags(value.get("tags"), wrong)
    if problems:
        raise ConfigError(problems)
    return DatasetSpec(
        name=name,
        origin=entry.origin,
        registered=True,
        **_source(value, entry, hub, wrong, problems),
        formatting=formatting,
        kind=TYPES.get(kind) if kind else None,
        ranking=value.get("ranking"),
        columns=columns,
        tags=tags,
        subset=value.get("subset"),
        split=value.get("split") or "train",
        folder=value.get("folder"),
        num_samples=value.get("num_samples"),
    )


def _columns(given: Any, wrong) -> dict[str, str | None]:
    if given is None:
        return {}
    if not isinstance(given, dict):
        wrong("`columns` is not an object", '{"prompt": "instruction", …}')
        return {}
    columns: dict[str, str | None] = {}
    for key, column in given.items():
        role = COLUMN_ALIASES.get(key, key)
        if role in MEDIA_ROLES:
            if column is not None:
                wrong(f"maps `{key}`: pictures, video and sound are not supported, only text")
        elif role not in COLUMN_ROLES:
            wrong(
                f"unknown column role {key!r}",
                fix=_did_you_mean(key, (*COLUMN_ROLES, *COLUMN_ALIASES)),
            )
        elif column is not None and not isinstance(column, str):
            wrong(f"column `{key}` is {_article(column)}", "the name of a column, or null")
        elif role in columns:
            wrong(f"`columns` gives {role!r} twice (as {key!r} and by its other name)")
        else:
            columns[role] = column
    return columns


def _tags(given: Any, wrong) -> dict[str, str]:
    if given is None:
        return {}
    if not isinstance(given, dict):
        wrong("`tags` is not an object", '{"role_tag": "from", …}')
        return {}
    for key, tag in given.items():
        if key not in TAG_NAMES:
            wrong(f"unknown tag {key!r}", fix=_did_you_mean(key, TAG_NAMES))
        elif tag is not None and not isinstance(tag, str):
            wrong(f"tag `{key}` is {_article(tag)}", "text")
    return {key: tag for key, tag in given.items() if isinstance(tag, str)}


def _source(value: dict, entry: _Entry, hub: str, wrong, problems: list[Problem]) -> dict[str, Any]:
    """The first source present, in the documented order: hub, cloud, file."""
    hubs = [h for h in _HUB_KEYS if value.get(_HUB_KEYS[h])]
    if hubs:
        chosen = hub if hub in hubs else hubs[0]
        return {"hub_id": value[_HUB_KEYS[chosen]], "hub": chosen}
    if value.get("cloud_file_name"):
        return {"url": value["cloud_file_name"]}
    if value.get("file_name"):
        # An absolute file name stays absolute: Path joins that way.
        return {"source": entry.base / Path(value["file_name"]).expanduser()}
    if value.get("script_url"):
        wrong(
            "`script_url` would run a program from the hub, which trueup does not",
            fix="load the data files it downloads: file_name or hf_hub_url",
        )
    else:
        wrong("has no source", "file_name, hf_hub_url, ms_hub_url, om_hub_url or cloud_file_name")
    raise ConfigError(problems)


def _from_memory(name: str) -> DatasetSpec:
    """Rows that a program holds. Raises ConfigError if it is not this program."""
    given: GivenRows = memory.held(name, "dataset")
    label = name.removeprefix(memory.PREFIX)
    return DatasetSpec(label, name, rows=given.rows, formatting=given.formatting, columns=given.columns)


def _unregistered(
    name: str, directory: Path, hub: str, registry: Mapping[str, _Entry], builtin: Mapping[str, _Entry]
) -> DatasetSpec:
    """A path, URL or hub id given directly. Raises ConfigError (D20) or DataError (D19)."""
    if _URL(name):
        return DatasetSpec(name, "URL", url=name)
    is_pattern = any(mark in name for mark in "*?[")
    for path in (Path(name).expanduser(), directory / name):
        if path.exists() or (is_pattern and glob.has_magic(name) and _any_match(path)):
            return DatasetSpec(_short_name(path), str(path), source=path)
    looks_like_path = is_pattern or type_of(name) in FILE_SUFFIXES or name.startswith((".", "/", "~")) or "\\" in name
    if is_pattern:
        tried = Path(name).expanduser().absolute()
        raise DataError(
            f"no file matches {tried}",
            where=f"dataset {name!r}",
            fix="check the pattern; quote it, so that the shell does not expand it",
        )
    if looks_like_path:
        problem = missing_path(name, directory if directory.is_dir() else None)
        raise DataError([Problem(problem.what, f"dataset {name!r}", fix=problem.fix)])
    if catalog.find(name):
        return well_known(name, hub)
    if _HUB_ID(name):
        return DatasetSpec(name, "hub id", hub_id=name, hub=hub)
    raise ConfigError([_unknown_name(name, directory, registry, builtin)])


def _unknown_name(name: str, directory: Path, registry: Mapping[str, _Entry], builtin: Mapping[str, _Entry]) -> Problem:
    file = next((directory / n for n in REGISTRY_NAMES if (directory / n).is_file()), None)
    known = list(dict.fromkeys([*registry, *builtin]))
    near = difflib.get_close_matches(name, [*known, *catalog.CATALOG, *catalog.ALIASES], n=1, cutoff=0.5)
    theirs = registry.get(near[0]) if near else None  # our own samples are nothing a user would mend
    add = f'register it in {file or directory / REGISTRY_NAMES[0]}: "{name}": {{"file_name": …}}'
    return Problem(
        f"dataset {name!r} is not registered"
        + ("" if file else f", and there is no registry in {directory.absolute()}"),
        where=theirs.origin if theirs else str(file or "dataset"),
        expected=f"one of: {_some(known, 12)}; or a well-known set (`trueup data list`), a path, "
        "or a hub id like owner/name",
        fix=f"did you mean {near[0]!r}? Or {add}" if near else add,
    )


def _any_match(pattern: Path) -> bool:
    return next(glob.iglob(str(pattern), recursive=True), None) is not None


def _short_name(path: Path) -> str:
    """The name under which a path's rows are reported."""
    if path.is_dir() or glob.has_magic(path.name):
        return path.name
    name = path.name.removesuffix(path.suffix) if compression_of(path.name) else path.name
    return Path(name).stem or str(path)


def _article(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", type(None): "null"}
    return names.get(type(value), "a number")


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"


def _some(names: Sequence[str], limit: int = 8) -> str:
    more = f" … and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _unique(problems: list[Problem]) -> list[Problem]:
    return list(dict.fromkeys(problems))
