"""A run that is being put together: what was chosen so far, as the words of a command line. Torch-free.

A draft is a mapping from keys to words, no more: the form shows it, the address keeps it, the command and the YAML
file are ways to write it down, and `load_config` says what is wrong with it, as on the command line.
"""

from __future__ import annotations

import json
import logging
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from trueup.config.checks import derive
from trueup.config.load import file_keys, load_config
from trueup.config.methods import missing_condition
from trueup.config.schema import FIELDS, SECRETS, SECTIONS, RunConfig
from trueup.config.starter import starter
from trueup.errors import ConfigError, Problem
from trueup.web.workspace import Workspace

#: keys whose values name Python code: only files that lie in the studio's directory already (security: S28).
CODE_KEYS = ("reward_funcs", "custom_objective")
_OF_THE_STAGE = ("stage", "dataset", "eval_dataset", "output_dir")
Read = Callable[[Sequence[str]], RunConfig]
_TICKED = re.compile(r"`(?:--)?(\w+)[`:]")


@dataclass(frozen=True)
class Checked:
    """What the checker of the command line says: a config, or problems; and notices."""

    cfg: RunConfig | None
    problems: list[Problem] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def of(self, key: str, said: Callable[[str], str] = str) -> str:
        """What is wrong with one key; `said`: each sentence in the reader's language."""
        return "\n".join(
            said(problem.what) + (f" → {said(problem.expected)}" if problem.expected else "")
            for problem in self.problems
            if key in keys_of(problem)
        )


class Draft:
    """What is chosen: `values` by canonical key, each as a person would type it."""

    def __init__(self, values: Mapping[str, str] | None = None) -> None:
        self.values = dict(values or {})

    # --- where drafts come from --------------------------------------------------------------

    @classmethod
    def new(cls, stage: str, model: str) -> Draft:
        """Where `trueup init` begins."""
        return cls.of(yaml.safe_load(starter(stage, model)))

    @classmethod
    def of(cls, keys: Mapping[str, Any]) -> Draft:
        """From keys with their values, of a config file that was read. Secrets stay out."""
        kept = {key: value for key, value in keys.items() if key in FIELDS and key not in SECRETS}
        return cls({key: word_of(value) for key, value in kept.items() if value is not None and value != []})

    @classmethod
    def read(cls, path: Path, called: str = "") -> Draft:
        """From a config file, whatever names its keys have. Raises ConfigError, with `called` or the file's name in
        place of its path.
        """
        called = called or path.name
        try:
            found = file_keys(path)
        except ConfigError as error:
            raise ConfigError(
                replace(one, where=(one.where or "").replace(str(path), called)) for one in error.problems
            ) from None
        if not found:
            raise ConfigError(f"{called} sets no key", expected="a YAML file with `key: value` lines")
        return cls.of(found)

    @classmethod
    def unpack(cls, text: str) -> Draft:
        """From an address. Whatever is no key is left out."""
        try:
            found = json.loads(text)
        except ValueError:
            return cls()
        return cls.of(found) if isinstance(found, dict) else cls()

    def pack(self) -> str:
        """For an address."""
        return json.dumps(self.values, ensure_ascii=False, separators=(",", ":"))

    # --- ways to write it down ---------------------------------------------------------------

    def words(self) -> list[str]:
        """The words of a command line."""
        words: list[str] = []
        for key, value in self.values.items():
            words += [f"--{key}={value}"] if value.startswith("--") else [f"--{key}", value]
        return words

    def command(self, verb: str = "train") -> str:
        """`trueup train …` for a shell, a key a line."""
        lines = [shlex.join(["trueup", verb])]
        for key, value in self.values.items():
            one = [f"--{key}={value}"] if value.startswith("--") else [f"--{key}", value]
            lines.append("  " + shlex.join(one))
        return " \\\n".join(lines)

    def yaml(self) -> str:
        """A config file."""
        cfg = self.lenient()
        keys = {key: cfg[key] if key in cfg.explicit else value for key, value in self.values.items()}
        return yaml.safe_dump(keys, sort_keys=False, allow_unicode=True, width=1000)

    # --- what it amounts to ------------------------------------------------------------------

    def check(self, workspace: Workspace, read: Read | None = None) -> Checked:
        """By the checker of the command line, and the studio's own rules for paths and code.

        `read`: what a verb makes of its words; unset: what `trueup train` does.
        """
        heard = _Heard()
        log = logging.getLogger("trueup")
        log.addHandler(heard)
        try:
            cfg, problems = (read or partial(load_config, None))(self.words()), []
        except ConfigError as error:
            cfg, problems = None, error.problems
        finally:
            log.removeHandler(heard)
        problems = problems + self._outside(workspace)
        return Checked(None if problems else cfg, problems, heard.said)

    def _outside(self, workspace: Workspace) -> list[Problem]:
        problems = []
        for key, value in self.values.items():
            for name in value.split(","):
                if not workspace.may_read(name.strip()):
                    problems.append(
                        Problem(
                            f"`{key}` leads out of the studio's directory: {name.strip()}", f"--{key}",
                            fix="put it into that directory, or start the studio with --allow-dir DIRECTORY",
                        )
                    )  # fmt: skip
        known = workspace.code()
        problems += [
            Problem(f"`{key}`: {name} is no function of a file here", f"--{key}", _one_of(known))
            for key in CODE_KEYS
            for name in self.values.get(key, "").split(",")
            if ".py" in name and name.strip() not in known
        ]
        if "output_dir" in self.values:
            try:
                workspace.run_id(self.values["output_dir"])
            except ConfigError as error:
                problems += [Problem(p.what, "--output_dir", p.expected, p.fix) for p in error.problems]
        return problems

    def lenient(self) -> RunConfig:
        """A config of the values that can be read, unchecked as a whole."""
        sections: dict[str, Any] = {}
        good: set[str] = set()
        for name, model in SECTIONS.items():
            values: dict[str, Any] = {}
            for key in model.model_fields.keys() & self.values.keys():
                try:
                    values[key] = getattr(model(**{key: self.values[key]}), key)
                except ValidationError:
                    continue
            good |= values.keys()
            sections[name] = model.model_construct(**{**model().__dict__, **values})
        return RunConfig(**sections, explicit=frozenset(good))

    def implied(self) -> RunConfig:
        """The same with what follows from it: the stage's loss, what unset keys mean."""
        return derive(self.lenient())

    def with_stage(self, stage: str) -> Draft:
        """The same for another stage: what was changed from where it began goes along, as far as it acts there."""
        model = self.values.get("model_name_or_path", "")
        before, after = Draft.new(self.values.get("stage", "dpo"), model), Draft.new(stage, model)
        changed = {key: value for key, value in self.values.items() if before.values.get(key) != value}
        stays = {key: value for key, value in changed.items() if key not in _OF_THE_STAGE}
        whole = Draft({**after.values, **stays, "stage": stage})
        cfg = whole.implied()
        return Draft({key: value for key, value in whole.values.items() if missing_condition(key, cfg) is None})


def word_of(value: Any) -> str:
    """A value as a word of a command line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list | tuple):
        parts = [word_of(part) for part in value]
        plain = not any(mark in part for part in parts for mark in ",[]'\"")
        return ",".join(parts) if plain else json.dumps(list(value), ensure_ascii=False)
    return str(value)


def keys_of(problem: Problem) -> set[str]:
    """The keys that a problem is about: those that its place or its sentence names."""
    place = (problem.where or "").removeprefix("--")
    if place in FIELDS:
        return {place}
    return {key for key in _TICKED.findall(problem.what) if key in FIELDS}


class _Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def _one_of(functions: Sequence[str]) -> str:
    if functions:
        return "one of " + ", ".join(functions)
    return "def NAME(prompts, completions, **columns) in a Python file of the studio's directory, named as FILE.py:NAME"
