"""What people prefer, as they say it: projects of questions with answers, and every choice, in files that only grow.

A project is a directory `labels/NAME/` of the workspace:

    items.jsonl    what is judged: {"id", "prompt": [turns], "answers": [[turns], …], "tools"?, "provenance"}
    labels.jsonl   what was said: {"id", "at", "annotator", "item", "round", "choice", "order", "seconds"}, or
                   {"undo": id, …}, which takes one back
    project.json   how it is asked: which share is asked twice

Files are appended to under a lock, a line at a time, whole and on the disk before anyone is told; a line that a crash
tore is skipped and counted. A person, an item and a round have one label: of two tabs that answer the same question
the second is told. The arena's votes are items with their first label. Torch-free.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from trueup.errors import ConfigError, ResourceError
from trueup.training import durable
from trueup.web.workspace import inside

Turns = tuple[dict[str, Any], ...]  # messages: role and content
Choice = int | Literal["tie", "skip"]

AREA = "labels"
ITEMS, LABELS, SETTINGS = "items.jsonl", "labels.jsonl", "project.json"
TIE: Literal["tie"] = "tie"
SKIP: Literal["skip"] = "skip"
_LONGEST_NAME = 60
_GAP = 8  # questions between a question and its repetition, where there are so many


@dataclass(frozen=True, slots=True)
class Item:
    """A question and two or more answers to it.

    Attributes:
        id: of what is asked and answered, so that the same is there once.
        provenance: where it comes from, who answered: nothing that is shown before the choice. `chosen`, if it is
            there, is the answer that the data had as the better one.
    """

    id: str
    prompt: Turns
    answers: tuple[Turns, ...]
    tools: tuple[dict[str, Any], ...] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        prompt: str | Sequence[Mapping[str, Any]],
        answers: Sequence[str | Sequence[Mapping[str, Any]]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> Item:
        """An item of texts or turns. Raises ConfigError for fewer than two answers."""
        if len(answers) < 2:
            raise ConfigError("there is nothing to choose from", expected="two answers or more")
        asked, said = turns(prompt, "user"), tuple(turns(answer, "assistant") for answer in answers)
        return cls(_digest(asked, said, tools), asked, said, tuple(tools) if tools else None, dict(provenance or {}))

    def to_dict(self) -> dict[str, Any]:
        tools = {"tools": list(self.tools)} if self.tools else {}
        answers = [list(answer) for answer in self.answers]
        return {
            "id": self.id, "prompt": list(self.prompt), "answers": answers, **tools, "provenance": self.provenance,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Label:
    """A choice: the number of an answer of the item, a tie, or none. `order`: the answers as they were shown."""

    item: str
    choice: Choice
    annotator: str = ""
    round: int = 0
    order: tuple[int, ...] = ()
    seconds: float = 0.0
    at: float = 0.0
    id: str = ""

    @property
    def slot(self) -> tuple[str, str, int]:
        """What has one label."""
        return self.annotator, self.item, self.round


@dataclass(frozen=True, slots=True)
class Turn:
    """A question as one person is to see it: `order[0]` is the answer on the left."""

    item: Item
    round: int
    order: tuple[int, ...]


class Project:
    """A project as its files have it. `refresh` reads what has been added since."""

    def __init__(self, root: Path, name: str) -> None:
        """The project `name` of the workspace at `root`, which need not be there yet. Raises ConfigError."""
        if "/" in name:
            raise ConfigError(f"{name!r} is no name of a project", expected="a plain name")
        self.name, self.path = name, inside(root / AREA, name)
        self.items: dict[str, Item] = {}
        self.labels: dict[str, Label] = {}  # those that count, oldest first
        self.torn = 0  # lines that say nothing
        self._read = {ITEMS: 0, LABELS: 0}
        self._slots: dict[tuple[str, str, int], str] = {}
        self._plans: dict[str, tuple[int, list[tuple[str, int]]]] = {}
        self.refresh()

    # --- reading -----------------------------------------------------------------------------

    def refresh(self) -> bool:
        """Read what is new; whether there was any."""
        items, labels = self._new_lines(ITEMS), self._new_lines(LABELS)
        for line in items:
            item = Item(
                str(line["id"]), tuple(line["prompt"]), tuple(map(tuple, line["answers"])),
                tuple(line["tools"]) if line.get("tools") else None, line.get("provenance") or {},
            )  # fmt: skip
            self.items.setdefault(item.id, item)
        for line in labels:
            self._take(line)
        return bool(items or labels)

    def _new_lines(self, name: str) -> list[dict[str, Any]]:
        """Whole lines that were appended since they were last read."""
        path = self.path / name
        try:
            with open(path, "rb") as file:
                file.seek(self._read[name])
                whole, newline, _ = file.read().rpartition(b"\n")
        except OSError:
            return []
        self._read[name] += len(whole) + len(newline)
        found = []
        for line in filter(None, whole.split(b"\n")):
            try:
                value = json.loads(line)
                found.append(_checked(value, name))
            except (ValueError, KeyError, TypeError):
                self.torn += 1
        return found

    def _take(self, line: dict[str, Any]) -> None:
        if "undo" in line:
            gone = self.labels.pop(line["undo"], None)
            if gone:
                self._slots.pop(gone.slot, None)
            return
        label = Label(
            line["item"], line["choice"], line["annotator"], int(line["round"]), tuple(line["order"]),
            float(line["seconds"]), float(line["at"]), line["id"],
        )  # fmt: skip
        if label.slot not in self._slots:
            self.labels[label.id] = label
            self._slots[label.slot] = label.id

    @property
    def repeats(self) -> float:
        """The share of items that are asked twice."""
        try:
            return min(max(float(durable.read_json(self.path / SETTINGS)["repeats"]), 0.0), 1.0)
        except (OSError, ValueError, KeyError, TypeError):
            return 0.0

    # --- asking ------------------------------------------------------------------------------

    def next(self, annotator: str) -> Turn | None:
        """The first question that this person has not answered; None at the end."""
        for item, number in self.plan(annotator):
            if (annotator, item, number) not in self._slots:
                return Turn(self.items[item], number, order(self.items[item], annotator, number))
        return None

    def plan(self, annotator: str) -> list[tuple[str, int]]:
        """Everything that this person is asked, in an order of their own: (item, 0), and (item, 1) for a repetition."""
        size, found = self._plans.get(annotator, (-1, []))
        if size != len(self.items):
            found = _plan(list(self.items), annotator, self.repeats)
            self._plans[annotator] = len(self.items), found
        return found

    def progress(self, annotator: str) -> tuple[int, int]:
        """How many questions this person has answered or skipped, of how many."""
        plan = self.plan(annotator)
        return sum((annotator, *slot) in self._slots for slot in plan), len(plan)

    def is_answered(self, annotator: str, turn: Turn) -> bool:
        return (annotator, turn.item.id, turn.round) in self._slots

    # --- writing -----------------------------------------------------------------------------

    def set_up(self, repeats: float = 0.0) -> None:
        """Begin the project, or change how it is asked."""
        self.path.mkdir(parents=True, exist_ok=True)
        durable.write_json(self.path / SETTINGS, {"repeats": repeats})
        self._plans.clear()

    def add_items(self, items: Sequence[Item]) -> int:
        """Add items, each once; returns how many were new."""
        with self._locked():
            new = list({item.id: item for item in items if item.id not in self.items}.values())
            self._append(ITEMS, [item.to_dict() for item in new])
            self.refresh()
        return len(new)

    def add(self, label: Label) -> bool:
        """Keep a label, unless its person has answered that question already. Raises ConfigError, ResourceError."""
        with self._locked():
            return self._keep(label)

    def _keep(self, label: Label) -> bool:
        item = self.items.get(label.item)
        if item is None:
            raise ConfigError(f"no item {label.item!r} is in {self.name}")
        if not _is_choice(label.choice, len(item.answers)):
            raise ConfigError(
                f"{label.choice!r} is no choice", expected=f"0 to {len(item.answers) - 1}, 'tie' or 'skip'"
            )
        if label.slot in self._slots:
            return False
        line = {
            "id": label.id or uuid.uuid4().hex, "at": label.at or time.time(), "annotator": label.annotator,
            "item": label.item, "round": label.round, "choice": label.choice, "order": list(label.order),
            "seconds": round(label.seconds, 2),
        }  # fmt: skip
        self._append(LABELS, [line])
        self.refresh()
        return True

    def undo(self, annotator: str) -> Label | None:
        """Take back the newest label of a person; None if there is none."""
        with self._locked():
            newest = next((label for label in reversed(self.labels.values()) if label.annotator == annotator), None)
            self._take_back(newest)
        return newest

    def replace(self, label: Label) -> None:
        """Keep a label in place of what its person has said of that question before."""
        with self._locked():
            self._take_back(self.labels.get(self._slots.get(label.slot, "")))
            self._keep(label)

    def _take_back(self, label: Label | None) -> None:
        if label:
            self._append(LABELS, [{"undo": label.id, "annotator": label.annotator, "at": time.time()}])
            self.refresh()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Nobody else writes, and this is what the files say."""
        self.path.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path / ".lock", timeout=30):
            self.refresh()
            yield

    def _append(self, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
        """Whole lines, on the disk before this returns."""
        if not lines:
            return
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        path = self.path / name
        try:
            with open(path, "ab+") as file:
                size = file.seek(0, os.SEEK_END)
                if size:
                    file.seek(size - 1)
                    text = ("" if file.read(1) == b"\n" else "\n") + text  # after a line that a crash tore
                file.write(text.encode("utf-8"))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ResourceError(f"cannot write {path.name} of {self.name}: {error.strerror or error}") from error


def add_vote(
    root: Path,
    project: str,
    prompt: str | Sequence[Mapping[str, Any]],
    answers: Sequence[str | Sequence[Mapping[str, Any]]],
    choice: Choice,
    annotator: str = "",
    provenance: Mapping[str, Any] | None = None,
) -> str:
    """Keep one choice between answers that were just given, as an item of a project with its label.

    Args:
        root: the workspace's directory. project: a plain name; it begins with its first vote.
        prompt: the question, or all turns up to it. answers: two or more, each a text or turns.
        choice: the number of the better answer, or "tie".
        provenance: who answered, with which parameters: `{"answers": [{"model": …}, …], "seed": …}`, JSON.

    Returns:
        the label's id. The same person's second vote on the same answers takes the place of the first.

    Raises:
        ConfigError: no such choice, no such name. ResourceError: it cannot be written.
    """
    store = Project(root, project)
    item = Item.of(prompt, answers, provenance=provenance)
    store.add_items([item])
    label = Label(item.id, choice, tidy_name(annotator), order=tuple(range(len(answers))), id=uuid.uuid4().hex)
    store.replace(label)
    return label.id


def projects(root: Path) -> list[str]:
    """Names of the projects of a workspace."""
    area = root / AREA
    return sorted(path.name for path in area.glob("[!.]*") if path.is_dir()) if area.is_dir() else []


def turns(said: str | Sequence[Mapping[str, Any]], role: str) -> Turns:
    """A text as one turn of `role`, turns as they are."""
    if isinstance(said, str):
        return ({"role": role, "content": said},)
    return tuple(dict(turn) for turn in said)


def text_of(answer: Turns) -> str:
    """What turns say, as text."""
    return "\n\n".join(str(turn.get("content") or "") for turn in answer)


def tidy_name(annotator: str) -> str:
    """A person's name without blanks around it."""
    return " ".join(annotator.split())[:_LONGEST_NAME]


def order(item: Item, annotator: str, number: int) -> tuple[int, ...]:
    """How a person sees an item's answers: by chance, and the other way round when asked again."""
    shuffled = sorted(range(len(item.answers)), key=lambda index: _chance(annotator, item.id, str(index)))
    return tuple(reversed(shuffled)) if number % 2 else tuple(shuffled)


def _plan(items: Sequence[str], annotator: str, repeats: float) -> list[tuple[str, int]]:
    asked = sorted(items, key=lambda item: _chance(annotator, item))
    step = round(1 / repeats) if repeats > 0 else len(asked) + 1
    again = {position * step + _GAP: asked[position * step] for position in range(len(asked) // step)}
    plan: list[tuple[str, int]] = []
    for position, item in enumerate(asked):
        plan.append((item, 0))
        if position in again:
            plan.append((again.pop(position), 1))
    return plan + [(item, 1) for item in again.values()]


def _chance(*words: str) -> bytes:
    return blake2b("\0".join(words).encode("utf-8", "replace"), digest_size=8).digest()


def _digest(*parts: Any) -> str:
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True, default=str)
    return blake2b(text.encode("utf-8", "replace"), digest_size=10).hexdigest()


def _is_choice(choice: object, answers: int) -> bool:
    return choice in (TIE, SKIP) or (type(choice) is int and 0 <= choice < answers)


def _checked(line: Any, name: str) -> dict[str, Any]:
    """A line of that file. Raises KeyError or TypeError if it is none."""
    needed: dict[str, type | tuple[type, ...]] = {"id": str, "prompt": list, "answers": list}
    if name == LABELS:
        needed = {
            "id": str, "item": str, "annotator": str, "round": int, "choice": (int, str), "order": list,
            "seconds": (int, float), "at": (int, float),
        }  # fmt: skip
        if "undo" in line:
            needed = {"undo": str}
    for key, kind in needed.items():
        if not isinstance(line[key], kind):
            raise TypeError(key)
    return line
