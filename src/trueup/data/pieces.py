"""Token ids as text that can be shown piece by piece, each piece with the tokens it consists of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

#: Format characters that belong to ordinary text: joiners of emoji and Indic scripts, spaces of typography.
_ORDINARY = "\u200c\u200d\u3000\u00a0\u00ad\ufeff"
_MOST = 8  # tokens that may share one character (a byte-level emoji takes four)


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that some tokens, mostly one, stand for."""

    text: str
    ids: tuple[int, ...]


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[Piece]:
    """The text of each token, joined where several make one character.

    Each is decoded behind the one before it, because a token at the start of a text may lose its space.
    """
    found: list[Piece] = []
    before: list[int] = []
    pending: list[int] = []
    for token in ids:
        pending.append(int(token))
        head = _decode(tokenizer, before)
        text = _decode(tokenizer, before + pending)[len(head) :]
        if text.endswith("\ufffd") and len(pending) < _MOST:
            continue
        found.append(Piece(text, tuple(pending)))
        before, pending = pending, []
    if pending:
        found.append(Piece(_decode(tokenizer, before + pending)[len(_decode(tokenizer, before)) :], tuple(pending)))
    return found


def visible(text: str) -> str:
    """A text whose line ends can be seen, and which can do nothing to a terminal."""
    return "".join(_visible(character) for character in text)


def _visible(character: str) -> str:
    if character == "\n":
        return "↵\n"
    if character.isprintable() or character in _ORDINARY:
        return character
    code = ord(character)
    return chr(0x2400 + code) if code < 0x20 else f"\\u{code:04x}"


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) if ids else ""
