"""Texts on a page: conversations, tokens in the colours of their roles, two answers with what differs in them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from nicegui import ui
from nicegui.element import Element

from trueup.web.view import View

#: words, single characters of scripts that have no spaces, and what stands between
_WORDS = re.compile(r"[぀-ヿ㐀-鿿가-힯]|[^\W぀-ヿ㐀-鿿가-힯]+|\s+|[^\w\s]")
_LONG = 4000  # words from which on the comparison is allowed to be rough
_MOST_PIECES = 6000  # of a part on a page
_MOST_CHARACTERS = 100_000  # of a text on a page
ROLES = ("trained", "masked", "truncated")
_TURNS = ("system", "user", "assistant", "tool")

Piece = Sequence[Any]  # text, role, and the ids of tokens


class Pieces(Element, component="pieces.js"):
    """Text in pieces of (text, role) or (text, role, ids)."""

    def __init__(self, pieces: Sequence[Piece], words: Mapping[str, str] | None = None) -> None:
        """`words`: what a role is called where somebody points at a token."""
        super().__init__()
        self._props["pieces"] = [list(piece) for piece in pieces]
        self._props["words"] = dict(words or {})


def legend(view: View) -> None:
    """What the colours of tokens mean."""
    with ui.element("div").classes("toolbar legend"):
        for role in ROLES:
            ui.label(view.t(f"dataset.role_{role}")).classes(f"piece piece-{role} legend-entry")


def tokens(view: View, part: Mapping[str, Any]) -> None:
    """A part of a row as `token_worker.answer` has it."""
    words = {role: view.t(f"dataset.role_{role}") for role in ROLES}
    counts = [f"{words[role]} {count:,}" for role, count in part["tokens"].items() if count]
    with ui.element("div").classes("part"):
        with ui.element("div").classes("part-head"):
            ui.label(part_name(view, part["name"])).classes("h3")
            ui.label(" · ".join(counts)).classes("muted small number")
        Pieces(part["pieces"][:_MOST_PIECES], words).props["aria-label"] = part_name(view, part["name"])
        if len(part["pieces"]) > _MOST_PIECES:
            ui.label(view.t("dataset.more", count=f"{len(part['pieces']) - _MOST_PIECES:,}")).classes("muted small")


def conversation(view: View, turns: Sequence[Mapping[str, Any]]) -> None:
    """Turns below each other, each with who speaks."""
    with ui.element("div").classes("turns"):
        for turn in turns:
            role = str(turn.get("role") or "")
            with ui.element("div").classes(f"turn turn-{role if role in _TURNS else 'other'}"):
                ui.label(view.maybe(f"dataset.turn_{role}") or role).classes("turn-role")
                ui.label(shortened(view, said(turn))).classes("turn-text")


def shortened(view: View, text: str) -> str:
    """A text as long as a page bears, and how much of it is not shown."""
    if len(text) <= _MOST_CHARACTERS:
        return text
    left = view.t("dataset.more_text", count=f"{len(text) - _MOST_CHARACTERS:,}")
    return f"{text[:_MOST_CHARACTERS]} … {left}"


def said(turn: Mapping[str, Any]) -> str:
    """What a turn says, and which tools it calls."""
    calls = [str(call.get("function", call)) for call in turn.get("tool_calls") or []]
    return "\n".join(filter(None, [str(turn.get("content") or ""), *calls]))


def part_name(view: View, name: str) -> str:
    """ "chosen", "answer 2" … in the reader's language."""
    word, _, rest = name.partition(" ")
    return f"{view.maybe(f'dataset.part_{word}') or word} {rest}".strip()


def differences(one: str, other: str) -> tuple[list[Piece], list[Piece]]:
    """Two texts in pieces of "same", and "removed" in the first or "added" in the second."""
    left, right = _WORDS.findall(one), _WORDS.findall(other)
    matcher = difflib.SequenceMatcher(None, left, right, autojunk=max(len(left), len(right)) > _LONG)
    first: list[Piece] = []
    second: list[Piece] = []
    for kind, start, stop, begin, end in matcher.get_opcodes():
        same = kind == "equal"
        if stop > start:
            first.append(("".join(left[start:stop]), "same" if same else "removed"))
        if end > begin:
            second.append(("".join(right[begin:end]), "same" if same else "added"))
    return first, second
