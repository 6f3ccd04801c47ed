"""An engine that says what a test tells it to: for what no small model says by itself, such as calls of tools."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from trueup.rollout.engines import Sampling, Stats
from trueup.rollout.generation import Generation
from trueup.rollout.sampling import Piece


class Scripted:
    """Every request gets the same answer, a few characters a piece; `prompts` are those it was asked.

    Attributes:
        error: raised behind the first piece, if not None.
    """

    context, stop_ids, adapters = 4096, [0], ()

    def __init__(self, text: str = "", size: int = 3) -> None:
        self.text, self.size = text, size
        self.error: Exception | None = None
        self.prompts: list[list[int]] = []

    @property
    def stats(self) -> Stats:
        return Stats(0, 0, 1, 0, 0, len(self.prompts), len(self.prompts), 0)

    def compile(self, grammar: str) -> None:
        """Keeps to none."""

    def submit(
        self, prompt_ids: Sequence[int], sampling: Sampling, adapter: str | None = None, *, on_piece: Any = None
    ) -> Generation:
        self.prompts.append(list(prompt_ids))
        generation = Generation(prompt_ids, sampling, adapter, 0, on_piece)
        threading.Thread(target=self._say, args=[generation], daemon=True).start()
        return generation

    def _say(self, generation: Generation) -> None:
        for at in range(0, len(self.text), self.size):
            generation.emit(Piece(self.text[at : at + self.size], (1,)))
            if self.error is not None:
                generation.emit(Piece("", finish_reason="error", error=self.error))
                return
        generation.emit(Piece("", finish_reason="stop"))

    def close(self, drain: bool = True, timeout: float | None = None) -> None:
        """Nothing is under way for long."""
