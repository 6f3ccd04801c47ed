"""Config files and command-line words → (key, value, where) entries. No key is looked up here.

YAML is read as its 1.2 core schema: `5e-7` is a number; `no`, `on`, `off` and `1:30` are words,
whose meaning the key decides. Only the node graph of the safe loader is used: no object is ever
constructed from a tag.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from trueup.errors import Problem

Takes = Literal["flag", "value", "unknown"]
MAX_BYTES = 1_000_000
MAX_NODES = 20_000
MAX_DEPTH = 20
_BOOLEAN_WORDS = {
    "true",
    "false",
    "yes",
    "no",
    "on",
    "off",
    "1",
    "0",
    "y",
    "n",
    "t",
    "f",
    "auto",
    "none",
    "null",
}
_ASSIGNMENT = re.compile(r"^([A-Za-z_<][\w.<-]*)=(.*)$", re.DOTALL)


@dataclass(frozen=True)
class Entry:
    """One key as the user gave it. `where` is `file:line` or the word of the command line."""

    key: str
    value: Any
    where: str


class _CoreLoader(yaml.SafeLoader):
    """The safe loader with YAML 1.2's few implicit types."""

    yaml_implicit_resolvers: dict = {}


for _tag, _pattern, _first in [
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?[0-9]+$", list("-+0123456789")),
    (
        "float",
        r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$",
        list("-+.0123456789"),
    ),
    ("float", r"^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$", list("-+.")),
]:
    _CoreLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


class _Refusal(Exception):
    """A node that is not read, with its line (from 0)."""

    def __init__(self, line: int, what: str, fix: str | None = None):
        super().__init__(what)
        self.line, self.what, self.fix = line, what, fix


def read_file(path: Path) -> tuple[list[Entry], list[Problem]]:
    """The keys of a YAML or JSON file, with what is wrong with it as a file."""
    name = str(path)
    if not path.is_file():
        near = ", ".join(sorted(str(p) for p in path.parent.glob("*.y*ml"))[:5]) if path.parent.is_dir() else ""
        return [], [
            Problem(
                f"no such config file ({path.absolute()})",
                name,
                fix=f"there is: {near}" if near else None,
            )
        ]
    if path.stat().st_size > MAX_BYTES:
        return [], [
            Problem(
                f"{path.stat().st_size:,} bytes is no config file",
                name,
                f"at most {MAX_BYTES:,} bytes",
            )
        ]
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return [], [Problem(f"not UTF-8 at byte {error.start}", name, fix="save the file as UTF-8")]
    return _read_json(text, name) if path.suffix.lower() == ".json" else _read_yaml(text, name)


def _read_yaml(text: str, name: str) -> tuple[list[Entry], list[Problem]]:
    for number, line in enumerate(text.splitlines(), 1):
        if re.match(r" *\t", line) and line.strip():
            return [], [
                Problem(
                    "tab used for indentation",
                    f"{name}:{number}",
                    "spaces",
                    "replace the tab by spaces",
                )
            ]
    try:
        root = yaml.compose(text, Loader=_CoreLoader)
        return _entries(root, name)
    except _Refusal as error:
        return [], [Problem(error.what, f"{name}:{error.line + 1}", fix=error.fix)]
    except RecursionError:
        return [], [Problem("nested too deeply", name, f"at most {MAX_DEPTH} levels")]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        return [], [Problem(f"not YAML: {getattr(error, 'problem', None) or error}", place)]


def _entries(root: yaml.Node | None, name: str) -> tuple[list[Entry], list[Problem]]:
    if root is None:
        return [], []
    if not isinstance(root, yaml.MappingNode):
        raise _Refusal(root.start_mark.line, "a config file is a list of `key: value` lines")
    entries: list[Entry] = []
    problems: list[Problem] = []
    seen: dict[str, int] = {}
    read = _Reader()
    for key_node, value_node in root.value:
        line = key_node.start_mark.line
        key = read.key(key_node)
        if key in seen:
            problems.append(
                Problem(
                    f"`{key}` is given twice; line {seen[key]} has it already",
                    f"{name}:{line + 1}",
                    fix="keep one",
                )
            )
            continue
        seen[key] = line + 1
        entries.append(Entry(key, read.value(value_node), f"{name}:{line + 1}"))
    return entries, problems


class _Reader:
    """Nodes → values, counting them, so that aliases of aliases cannot grow without end."""

    def __init__(self) -> None:
        self.nodes = 0

    def key(self, node: yaml.Node) -> str:
        if not isinstance(node, yaml.ScalarNode):
            raise _Refusal(node.start_mark.line, "a key is one word")
        return node.value

    def value(self, node: yaml.Node) -> Any:
        """A top-level value. Plain scalars stay text: the key knows what type they have."""
        return self._text(node) if isinstance(node, yaml.ScalarNode) else self.nested(node)

    def _text(self, node: yaml.ScalarNode) -> Any:
        self._check_tag(node)
        return None if node.tag.endswith(":null") else node.value

    def nested(self, node: yaml.Node, depth: int = 1) -> Any:
        """A value whose scalars have the types YAML gives them."""
        self.nodes += 1
        if self.nodes > MAX_NODES or depth > MAX_DEPTH:
            raise _Refusal(
                node.start_mark.line,
                f"more than {MAX_NODES:,} values or {MAX_DEPTH} levels, aliases written out",
                "write the values out without aliases",
            )
        self._check_tag(node)
        if isinstance(node, yaml.SequenceNode):
            return [self.nested(item, depth + 1) for item in node.value]
        if isinstance(node, yaml.MappingNode):
            result: dict[str, Any] = {}
            for key_node, item in node.value:
                key = self.key(key_node)
                if key in result:
                    raise _Refusal(key_node.start_mark.line, f"`{key}` is given twice", "keep one")
                result[key] = self.nested(item, depth + 1)
            return result
        return _scalar(node)

    @staticmethod
    def _check_tag(node: yaml.Node) -> None:
        if not node.tag.startswith("tag:yaml.org,2002:") or "python" in node.tag:
            raise _Refusal(node.start_mark.line, f"tag {node.tag} is not read", "write a plain value")


def _scalar(node: yaml.Node) -> Any:
    kind, text = node.tag.rsplit(":", 1)[-1], str(node.value)
    try:
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() in ("true", "yes", "on")
        if kind == "int":
            return int(text)
        if kind == "float":
            return float(text.replace(".inf", "inf").replace(".nan", "nan"))
    except ValueError:
        raise _Refusal(node.start_mark.line, f"{text!r} is no {kind}") from None
    return text


def _read_json(text: str, name: str) -> tuple[list[Entry], list[Problem]]:
    twice: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice.extend(sorted({key for key in keys if keys.count(key) > 1}))
        return dict(pairs)

    def line_of(key: str, nth: int = 0) -> int:
        hits = [m.start() for m in re.finditer(re.escape(json.dumps(key, ensure_ascii=False)) + r"\s*:", text)]
        return text.count("\n", 0, hits[min(nth, len(hits) - 1)]) + 1 if hits else 1

    try:
        content = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        return [], [Problem(f"not JSON: {error.msg}", f"{name}:{error.lineno}:{error.colno}")]
    except RecursionError:
        return [], [Problem("nested too deeply", name, f"at most {MAX_DEPTH} levels")]
    if not isinstance(content, dict):
        return [], [Problem("a config file is one JSON object", name)]
    problems = [
        Problem(
            f"`{key}` is given twice; line {line_of(key)} has it already",
            f"{name}:{line_of(key, 1)}",
            fix="keep one",
        )
        for key in twice
    ]
    return [Entry(key, value, f"{name}:{line_of(key)}") for key, value in content.items()], problems


def _stray(word: str) -> Problem:
    """A word that is neither a key nor a value: perhaps the path of a run, mistyped."""
    if "/" in word:
        return Problem(f"there is no file or directory {word}", fix="check the path; keys are key=value or --key value")
    return Problem(f"{word!r} is no key", fix="write key=value or --key value")


def read_words(words: Sequence[str], takes: Callable[[str], Takes]) -> tuple[list[Entry], list[Problem]]:
    """`key=value`, `--key value`, `--key=value`, `--flag` and `--no-flag` words, in order.

    `takes(key)` tells what may follow a key: a "flag" means true when it stands alone, and takes
    the next word only if that is a boolean.
    """
    entries: list[Entry] = []
    problems: list[Problem] = []
    queue = list(words)
    while queue:
        word = queue.pop(0)
        bare = word[2:] if word.startswith("--") else word
        assignment = _ASSIGNMENT.match(bare)
        if assignment:
            key = _snake(assignment[1])
            entries.append(Entry(key, _word_value(key, assignment[2]), f"--{assignment[1]}"))
        elif not word.startswith("--") or not bare:
            problems.append(_stray(word))
        else:
            entry = _option(bare, queue, takes)
            entries.append(entry) if isinstance(entry, Entry) else problems.append(entry)
    return entries, problems


def _option(bare: str, queue: list[str], takes: Callable[[str], Takes]) -> Entry | Problem:
    key, where = _snake(bare), f"--{bare}"
    follows = queue[0] if queue and not queue[0].startswith("--") else None
    if takes(key) == "flag":
        if follows is not None and follows.lower() in _BOOLEAN_WORDS:
            return Entry(key, _word_value(key, queue.pop(0)), where)
        return Entry(key, "true", where)
    if key.startswith("no_") and takes(key[3:]) == "flag":
        return Entry(key[3:], "false", where)
    if follows is None and takes(key) == "unknown":
        return Entry(key, "true", where)
    if follows is None:
        return Problem("a value is missing", where, fix=f"{where} VALUE, or {key}=VALUE")
    return Entry(key, _word_value(key, queue.pop(0)), where)


def _snake(key: str) -> str:
    return key.replace("-", "_")


def _word_value(key: str, text: str) -> Any:
    """Lists, mappings and parts of mappings (`key.name=1e-6`) as YAML; else the word itself."""
    if text.strip() in ("null", "Null", "NULL", "~"):
        return None  # leaves the key unset, as in a file
    if "." not in key and not text.strip().startswith(("[", "{")):
        return text
    try:
        node = yaml.compose(text, Loader=_CoreLoader)
        return text if node is None else _Reader().nested(node)
    except (yaml.YAMLError, _Refusal, RecursionError):
        return text
