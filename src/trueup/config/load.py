"""A file, a dict and command-line words → one checked `RunConfig`, or every problem at once."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from trueup.config import building, evaluating, exporting, generating, names
from trueup.config.checks import check, derive, say, say_inference, with_folder, with_length, with_one_rope
from trueup.config.explain import closest_choice, describe_error, explain, known_keys, nearest
from trueup.config.read import Entry, Takes, read_file, read_words
from trueup.config.schema import (
    FIELDS,
    REDACTED,
    SECTIONS,
    RunConfig,
    dump_yaml,
    is_flag,
    is_nullable,
    json_schema,
)
from trueup.config.values import EMPTY_WORDS
from trueup.errors import ConfigError, Problem

__all__ = ["dump_yaml", "explain", "json_schema", "known_keys", "load_config"]

log = logging.getLogger("trueup")

#: environment variables of the guides that choose the hub.
HUB_SWITCHES = {"USE_MODELSCOPE_HUB": "modelscope", "USE_OPENMIND_HUB": "modelers"}
#: environment variables of LLaMA-Factory that ask for what trueup does not have.
IDLE_VARIABLES = ("USE_RAY", "USE_KT", "USE_MCA", "USE_MEGATRON_BRIDGE", "USE_V1")


#: verbs that read keys by a table of their own.
_OWN_TABLES = {"build": building, "generate": generating, "eval": evaluating, "export": exporting}


@dataclass(frozen=True)
class Setting:
    """A value under its canonical key, with the name and the place the user gave it at."""

    value: Any
    name: str
    where: str | None


def load_config(
    source: str | Path | Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
    *,
    keys: Mapping[str, Any] | None = None,
    verb: Literal["train", "infer", "build", "generate", "eval", "export"] = "train",
) -> RunConfig:
    """Read, resolve and check a config.

    Args:
        source: a YAML or JSON file, a dict of keys, or nothing.
        overrides: raw words of a command line (`key=value`, `--key value`, `--flag` …); they win.
        keys: the same from a program: keys and their values.
        verb: "infer" for chat and serve, which need a model but neither data nor a method; "build" for preference
            data; "generate" for answers to prompts; "eval" for evaluations; "export" for exports.

    Raises:
        ConfigError: with every problem found, each with its place.
    """
    entries, unreadable = _entries(source)
    if unreadable and not entries:
        raise ConfigError(unreadable)
    base, base_problems, base_unknown = _settle(entries, unreadable, words=False)
    words, unread = read_words(overrides, _takes)
    words += [Entry(key, value, "") for key, value in (keys or {}).items()]
    over, over_problems, over_unknown = _settle(words, unread, words=True, below=base)
    settings = _together(base, over)
    cfg, bad, value_problems = _validate(settings)
    own = _OWN_TABLES.get(verb)
    cfg = with_folder(with_length(own.derive(cfg) if own else derive(cfg)))
    if verb == "train":
        cfg = with_one_rope(cfg)

    def place(key: str) -> str | None:
        return settings[key].where if key in settings else None

    if own:
        problems, idle = own.check(cfg, place, bad)
    else:
        problems, idle = check(cfg, place, bad, training=verb == "train")
    unused = base_unknown + over_unknown + idle
    if cfg.train.on_unused_keys == "warn" or names.is_on(os.environ.get("ALLOW_EXTRA_ARGS", "")):
        for problem in unused:
            log.warning("%s", f"{problem.where}: {problem.what}" if problem.where else problem.what)
        unused = []
    problems = base_problems + over_problems + value_problems + problems + unused
    if problems:
        raise ConfigError(_in_order(problems))
    if not own:  # those refuse what they do not read
        say(cfg) if verb == "train" else say_inference(cfg, over.keys())
    return cfg


def _entries(source: str | Path | Mapping[str, Any] | None) -> tuple[list[Entry], list[Problem]]:
    if source is None:
        return [], []
    if isinstance(source, Mapping):
        return [Entry(str(key), value, "") for key, value in source.items()], []
    return read_file(Path(source))


def _takes(name: str) -> Takes:
    """What may follow `--name`."""
    key = names.SYNONYMS.get(name, name)
    if key in FIELDS:
        return "flag" if is_flag(key) else "value"
    return "flag" if name in names.SWITCHES else "unknown"


def _environment() -> dict[str, Setting]:
    for variable in IDLE_VARIABLES:
        if names.is_on(os.environ.get(variable, "")):
            log.warning("%s is set, but trueup has no such backend: it is ignored", variable)
    hubs = [name for name in HUB_SWITCHES if names.is_on(os.environ.get(name, ""))]
    return {"hub": Setting(HUB_SWITCHES[hubs[0]], hubs[0], hubs[0])} if hubs else {}


def file_keys(path: Path) -> dict[str, Any]:
    """What a file sets, by canonical key; no value is checked. Raises ConfigError for what is no key or not read."""
    settings, problems, unknown = _settle(*_entries(path), words=False)
    values = {key: setting.value for key, setting in settings.items()}
    problems += unknown if values.get("on_unused_keys") != "warn" else []
    if problems:
        raise ConfigError(_in_order(problems))
    return values


def given(source: str | Path | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What a file and words set, by canonical key, as far as it can be read; nothing is checked."""
    base, *_ = _settle(*_entries(source), words=False)
    over, *_ = _settle(*read_words(overrides, _takes), words=True, below=base)
    return {key: setting.value for key, setting in _together(base, over).items()}


def _together(base: Mapping[str, Setting], over: Mapping[str, Setting]) -> dict[str, Setting]:
    """All settings; a later one also wins over what an earlier value of its own key was read as."""
    kept = {key: setting for key, setting in base.items() if setting.name == key or setting.name not in over}
    return {**_environment(), **kept, **over}


def chosen_hub() -> str:
    """The hub that the environment chooses."""
    setting = _environment().get("hub")
    return setting.value if setting else "huggingface"


# Names → canonical keys


def _settle(
    entries: list[Entry],
    problems: list[Problem],
    *,
    words: bool,
    below: Mapping[str, Setting] | None = None,
) -> tuple[dict[str, Setting], list[Problem], list[Problem]]:
    """One source's entries under their canonical keys, its problems, its unknown keys."""
    settings: dict[str, Setting] = {}
    unknown: list[Problem] = []
    for entry in entries:
        where = entry.where or None
        name, _, path = entry.key.partition(".")
        if name in names.REFUSED:
            problems += _refused(name, entry.value, where)
            continue
        if name in names.IDLE:
            log.info("%s", names.idle_words(name))
            continue
        resolved = names.resolve(name, entry.value)
        if resolved.notice:
            log.info("%s", resolved.notice)
        if resolved.key is None:
            continue
        if resolved.key not in FIELDS:
            unknown.append(_unknown(entry.key, where))
            continue
        value = resolved.value
        if path:
            value = _merged(settings.get(resolved.key) or (below or {}).get(resolved.key), path, value)
        if value is None and resolved.key in settings:
            continue  # left unset under one of its names
        new = Setting(value, name, where)
        clash = None if path else _clash(resolved.key, settings.get(resolved.key), new, words)
        if clash:
            problems.append(clash)
        settings[resolved.key] = new
    return settings, problems, unknown


def _refused(name: str, value: Any, where: str | None) -> list[Problem]:
    refused = names.REFUSED[name]
    if names.asks_for_nothing(refused, value):
        log.info("`%s` has no effect here", name)
        return []
    return [Problem(f"`{name}` is not supported: {refused.reason}", where, fix="drop it")]


def _unknown(name: str, where: str | None) -> Problem:
    near = nearest(name)
    return Problem(f"unknown key '{name}'" + (f"; did you mean '{near}'?" if near else ""), where)


def _merged(below: Setting | None, path: str, value: Any) -> dict[str, Any]:
    """`key.name=value` sets one name of a mapping and leaves the others."""
    merged = dict(below.value) if below and isinstance(below.value, Mapping) else {}
    target = merged
    *parents, last = path.split(".")
    for parent in parents:
        child = target.get(parent)
        target[parent] = dict(child) if isinstance(child, Mapping) else {}
        target = target[parent]
    target[last] = value
    return merged


def _clash(key: str, old: Setting | None, new: Setting, words: bool) -> Problem | None:
    """Two names of one key with two values are an error; of one flag twice the last counts."""
    if old is None or old.value is None or _same(old.value, new.value):
        return None
    if words and old.name == new.name:
        log.info("`--%s` is given twice; the last one counts", new.name)
        return None
    places = " and ".join(dict.fromkeys(filter(None, (old.where, new.where))))
    if old.name == new.name:
        what = f"`{key}` is set twice, with different values"
    else:
        what = f"`{old.name}` and `{new.name}` are both `{key}`, with different values"
    return Problem(what, places or None, fix=f"keep `{key}`")


def _same(one: Any, other: Any) -> bool:
    try:
        return one == other or float(one) == float(other)
    except (TypeError, ValueError):
        return str(one).lower() == str(other).lower()


# Values → sections


def _validate(settings: Mapping[str, Setting]) -> tuple[RunConfig, set[str], list[Problem]]:
    """The sections with defaults in place of bad values, the keys of those, and their problems."""
    given = _given(settings)
    sections, bad, problems = {}, set(), []
    for name, model in SECTIONS.items():
        values = {key: given[key] for key in model.model_fields if key in given}
        try:
            sections[name] = model(**values)
        except ValidationError as error:
            wrong = _wrong_values(error, settings)
            problems += wrong.values()
            bad |= wrong.keys()
            sections[name] = model(**{key: value for key, value in values.items() if key not in wrong})
    return RunConfig(**sections, explicit=frozenset(given) - bad), bad, problems


def _given(settings: Mapping[str, Setting]) -> dict[str, Any]:
    """The values really given: null leaves a key unset, unless the key has a use for it."""
    given = {}
    for key, setting in settings.items():
        value = setting.value
        if isinstance(value, str) and value.strip().lower() in EMPTY_WORDS and is_nullable(key):
            value = None
        if value is None and (not is_nullable(key) or FIELDS[key].default is None):
            continue
        if value == REDACTED:
            log.info("`%s` was left out of the saved config and is unset", key)
            continue
        given[key] = value
    return given


def _wrong_values(error: ValidationError, settings: Mapping[str, Setting]) -> dict[str, Problem]:
    wrong: dict[str, Problem] = {}
    for record in error.errors():
        key = str(record["loc"][0])
        if key in wrong:  # the branches of a union say the same thing twice
            continue
        setting = settings[key]
        what, expected = describe_error(key, record, setting.value)
        if setting.name != key:
            what = what.replace(f"`{key}`", f"`{setting.name}` (`{key}`)", 1)
        near = closest_choice(key, setting.value)
        wrong[key] = Problem(what, setting.where, expected, f"did you mean {near}?" if near else None)
    return wrong


def _in_order(problems: list[Problem]) -> list[Problem]:
    """By line of the file, then the command line, then what has no place."""

    def rank(problem: Problem) -> tuple[int, str, int]:
        where = (problem.where or "").split(" and ")[0]
        path, _, line = where.rpartition(":")
        if path and line.isdigit():
            return (0, path, int(line))
        return (1 if where else 2, "", 0)

    return sorted(problems, key=rank)
