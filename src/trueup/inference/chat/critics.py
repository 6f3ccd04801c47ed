"""What an answer is worth to an aligned model: β (log π − log π_ref) (arXiv 2305.18290, eq. 5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trueup.data.chat_template import ChatTemplate
from trueup.data.examples import Message
from trueup.rollout.engines import Engine


@dataclass(frozen=True)
class Critic:
    """A voice of an engine, and the one it was aligned from.

    Attributes:
        voice, reference: of the engine.
        against: what the reference is, in words.
    """

    engine: Engine
    template: ChatTemplate
    voice: str | None
    reference: str | None
    beta: float
    against: str = "base"

    def rewards(self, prompt: Sequence[Message], answers: Sequence[tuple[str, bool]]) -> list[float]:
        """The reward of each answer (its text, and whether it came to its end).

        Summed over the tokens that a training would train; the one that ends an answer counts where it was said.

        Raises:
            TooLong: a conversation beyond the model's context.
        """
        opening = self.template.encode_prompt(prompt)
        told = [self._encoded(prompt, text, ended) for text, ended in answers]
        sequences = [[*opening, *ids.tolist()] for ids, _ in told]
        first = len(opening) - 1  # scored tokens begin with the second
        sums = []
        for voice in (self.voice, self.reference):
            scored = self.engine.score(sequences, adapter=voice)
            logps = [np.array([token.logp for token in one.tokens[first:]]) for one in scored]
            sums.append([float(values[mask].sum()) for values, (_, mask) in zip(logps, told, strict=True)])
        return [self.beta * (own - before) for own, before in zip(*sums, strict=True)]

    def _encoded(self, prompt: Sequence[Message], text: str, ended: bool) -> tuple[np.ndarray, np.ndarray]:
        ids, mask = self.template.encode_answer(prompt, (Message("assistant", text),))
        if not ended and len(ids) and int(ids[-1]) in self.template.stop_ids:
            return ids[:-1], mask[:-1]
        return ids, mask
