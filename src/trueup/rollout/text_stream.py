"""An answer's text as its tokens come: whole characters only, and nothing that may become a stop text."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from trueup.rollout.sampling import TokenLogp

UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # what decoders make of bytes that are no character (yet)
LONGEST_WINDOW, KEPT = 24, 8  # tokens decoded again with each new one, and how many of them stay when they get many
MOST_UNKNOWN = 16  # at the end of a window; more are no character's beginning

Decode = Callable[[list[int]], str]
Token = tuple[int, TokenLogp | None]


def decoder(tokenizer: Any, skip_special_tokens: bool) -> Decode:
    """The tokenizer's decoding; the library's own where there is one, which takes microseconds."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is not None and hasattr(fast, "decode"):
        return lambda ids: fast.decode(ids, skip_special_tokens=skip_special_tokens)
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


class TextStream:
    """Tokens in; text out as soon as it is certain, with the tokens it came from.

    Args:
        stops: texts that end it.
    """

    def __init__(self, decode: Decode, stops: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stops = [stop for stop in stops if stop]
        self._ids: list[int] = []  # the window: the last tokens, decoded together
        self._said = ""  # of the window's text, what is certain
        self._certain = 0  # characters in all, and of them those handed out
        self._out = 0
        self._held = ""  # certain, but perhaps the beginning of a stop text
        self._tokens: deque[tuple[Token, int, float]] = deque()  # not handed out, with where their text begins and ends

    def push(self, token: int, logp: TokenLogp | None) -> tuple[str, list[Token], bool]:
        """(text, tokens, whether a stop text ended it) that can be handed out now."""
        begin = self._certain
        new, whole = self._read(token)
        self._certain += len(new)
        self._tokens.append(((token, logp), begin, self._certain if whole else self._certain + 0.5))
        self._held += new
        if new and (cut := self._find()) is not None:
            return *self._end(cut), True
        keep = self._beginning()
        text = self._held[: len(self._held) - keep]
        self._held = self._held[len(text) :]
        self._out += len(text)
        return text, self._release(), False

    def finish(self) -> tuple[str, list[Token]]:
        """What was held back, half characters included, when nothing follows."""
        text = self._decode(self._ids)
        rest = text[len(self._said) :] if text.startswith(self._said) else ""
        tokens = [token for token, _, _ in self._tokens]
        self._tokens.clear()
        return self._held + rest, tokens

    def _read(self, token: int) -> tuple[str, bool]:
        """(new certain text, whether all of the window is certain)."""
        self._ids.append(token)
        text = self._decode(self._ids)
        certain = text.rstrip(UNKNOWN)
        if len(text) - len(certain) > MOST_UNKNOWN:
            certain = text[:-4]
        if not certain.startswith(self._said):  # some decoders unmake a character while the next is incomplete
            return "", False
        new, self._said = certain[len(self._said) :], certain
        if len(self._ids) > LONGEST_WINDOW and certain == text:
            tail = self._decode(self._ids[-KEPT:])
            if text.endswith(tail):  # else they begin within a character
                self._ids, self._said = self._ids[-KEPT:], tail
        return new, certain == text

    def _find(self) -> int | None:
        """Where in the held text the first stop text begins."""
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        return min(found, default=None)

    def _beginning(self) -> int:
        """Characters at the end of the held text that a stop text may begin with."""
        for length in range(min(len(self._held), max(map(len, self._stops), default=0)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0

    def _release(self) -> list[Token]:
        tokens = []
        while self._tokens and self._tokens[0][2] <= self._out:
            tokens.append(self._tokens.popleft()[0])
        return tokens

    def _end(self, cut: int) -> tuple[str, list[Token]]:
        text = self._held[:cut]
        self._out += cut
        tokens = [token for token, begin, _ in self._tokens if begin < self._out]
        self._tokens.clear()
        return text, tokens
