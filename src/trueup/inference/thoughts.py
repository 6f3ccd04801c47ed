"""Answers that begin with a <think> block: what is thought and what is said, while they come."""

from __future__ import annotations

OPEN, CLOSE = "<think>", "</think>"


class Split:
    """Tells thought from answer in pieces of text.

    Args:
        opened: the prompt ends inside a thought already, as some templates' headers do.

    Attributes:
        thought, said: what has come so far; a tag that may be beginning is held back.
        thinking: whether more thought may come.
    """

    def __init__(self, opened: bool = False) -> None:
        self.thought = self.said = ""
        self.thinking = opened
        self._begun = opened  # it is known whether there is a thought
        self._thought_before = opened
        self._held = ""

    def push(self, text: str) -> None:
        """Some more of the answer."""
        self._held += text
        if not self._begun:
            self._begin()
        if self._begun and self.thinking:
            self._think()
        if self._begun and not self.thinking:
            self.said += self._held.lstrip("\n") if self._thought_before and not self.said else self._held
            self._held = ""

    def finish(self) -> None:
        """Nothing more comes: what was held back is text."""
        if self.thinking:
            self.thought += self._held
        else:
            self.said += self._held
        self._held, self._begun, self.thinking = "", True, False

    def _begin(self) -> None:
        start = self._held.lstrip()
        if start.startswith(OPEN):
            self._held, self._begun, self.thinking = start.removeprefix(OPEN).lstrip("\n"), True, True
            self._thought_before = True
        elif not OPEN.startswith(start):
            self._begun = True

    def _think(self) -> None:
        thought, closed, rest = self._held.partition(CLOSE)
        if closed:
            self.thought = (self.thought + thought).strip("\n")
            self._held, self.thinking = rest, False
            return
        kept = next((n for n in range(len(CLOSE) - 1, 0, -1) if self._held.endswith(CLOSE[:n])), 0)
        self.thought += self._held[: len(self._held) - kept]
        self._held = self._held[len(self._held) - kept :]


def split(text: str) -> tuple[str, str]:
    """(thought, answer) of a whole text."""
    found = Split()
    found.push(text)
    found.finish()
    return found.thought.strip("\n"), found.said
