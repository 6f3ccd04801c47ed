"""Conversations with one voice or several, and the files that keep them (`.trueup/talks/`). Torch-free."""

from __future__ import annotations

import secrets
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trueup.training import durable
from trueup.web.workspace import Workspace, inside

Message = dict[str, str]
_MOST = 30  # earlier conversations that are listed


@dataclass
class Answer:
    """What a voice said.

    Attributes:
        voice: its key. name: what it was called.
        finish: stop, length, aborted, or failed, and then why.
    """

    voice: str
    name: str
    text: str = ""
    finish: str = ""
    reason: str = ""
    seed: int | None = None
    seconds: float = 0.0
    tokens: int | None = None

    @property
    def counts(self) -> bool:
        """Whether a conversation can go on from it."""
        return bool(self.text) and self.finish != "failed"

    @property
    def complete(self) -> bool:
        return self.finish == "stop"


@dataclass
class Turn:
    """A question and its answers.

    Attributes:
        chosen: the number of the better answer, "tie", or None.
        order: of the answers on the page. blind: nobody is told who answered before the choice.
    """

    question: str
    answers: list[Answer] = field(default_factory=list)
    chosen: int | str | None = None
    order: list[int] = field(default_factory=list)
    blind: bool = False

    def answer_of(self, voice: str) -> Answer | None:
        """The answer that a voice goes on from: the one that was chosen, else its newest, else anybody's."""
        if isinstance(self.chosen, int):
            return self.answers[self.chosen]
        good = [one for one in self.answers if one.counts]
        own = [one for one in good if one.voice == voice]
        return own[-1] if own else good[0] if good else None


@dataclass
class Talk:
    """A conversation. Every voice has its own, until an answer is chosen for all."""

    id: str
    system: str = ""
    turns: list[Turn] = field(default_factory=list)
    begun: float = 0.0

    @classmethod
    def new(cls) -> Talk:
        return cls(f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}", begun=time.time())

    def messages(self, voice: str, turn: int) -> list[Message]:
        """What a voice is asked at a turn: everything up to its question."""
        found = [{"role": "system", "content": self.system}] if self.system.strip() else []
        for before in self.turns[:turn]:
            answered = before.answer_of(voice)
            if answered is not None and answered.counts:
                found += [_said("user", before.question), _said("assistant", answered.text)]
        return [*found, _said("user", self.turns[turn].question)]

    def shared(self, turn: int) -> bool:
        """Whether all answers of a turn are to the same conversation: only then can they be compared."""
        asked = [self.messages(answer.voice, turn) for answer in self.turns[turn].answers if answer.counts]
        return all(one == asked[0] for one in asked)

    # --- files -------------------------------------------------------------------------------

    def save(self, place: Workspace) -> None:
        durable.write_json(_path(place, self.id), asdict(self), sync=False)

    @classmethod
    def read(cls, place: Workspace, name: str) -> Talk | None:
        """A conversation that was kept; None if there is none."""
        try:
            return cls.of(durable.read_json(_path(place, name)))
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None

    @classmethod
    def of(cls, kept: dict[str, Any]) -> Talk:
        turns = [
            Turn(
                one["question"],
                [Answer(**answer) for answer in one["answers"]],
                one["chosen"],
                list(one["order"]),
                bool(one["blind"]),
            )
            for one in kept["turns"]
        ]
        return cls(kept["id"], kept["system"], turns, kept["begun"])


def earlier(place: Workspace) -> list[Talk]:
    """The newest conversations that were kept."""
    files = sorted(place.private("talks").glob("*.json"), reverse=True)[:_MOST]
    found = [Talk.read(place, file.stem) for file in files]
    return [talk for talk in found if talk is not None and talk.turns]


def segments(text: str) -> list[tuple[str, str]]:
    """A text as (kind, text): "text", or "code" between fences of three backticks. Nothing else means anything."""
    found: list[tuple[str, str]] = []
    for number, part in enumerate(text.split("```")):
        if number % 2:
            head, newline, rest = part.partition("\n")
            part = rest if newline and " " not in head.strip() else part
        part = part.strip("\n")
        if part:
            found.append(("code" if number % 2 else "text", part))
    return found


def _said(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _path(place: Workspace, name: str) -> Path:
    return inside(place.private("talks"), f"{name}.json")
