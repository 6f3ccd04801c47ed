"""A rollout: answers to some prompts, with all that the steps which learn from them need. The same on every process."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from trueup.rollout.sampler import Sampled

Array = np.ndarray


@dataclass
class Rollout:
    """P prompts with G answers each; S = P · G answers, T tokens in all.

    Attributes:
        epoch, index: which rollout of the run it is.
        rows_P: rows of the training set.
        rewards_S: what each answer is worth; NaN where nobody had an opinion.
        kept_S: whether it is learnt from.
        tokens: per-token values [T], fp32, by name: `old`, `reference`, `values`, `advantages`, `returns`.
    """

    epoch: int
    index: int
    rows_P: Array
    num_answers: int
    ids_T: Array
    bounds: Array  # [S + 1]
    ended_S: Array
    rewards_S: Array
    kept_S: Array
    tokens: dict[str, Array] = field(default_factory=dict)

    @classmethod
    def of(cls, epoch: int, index: int, rows_P: Array, answers: Sequence[Sequence[Sampled]]) -> Rollout:
        """Answers in the order of `rows_P`, not yet scored."""
        flat = [answer for group in answers for answer in group]
        lengths = [len(answer.ids) for answer in flat]
        return cls(
            epoch, index, rows_P, len(answers[0]),
            np.concatenate([answer.ids for answer in flat]),
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            np.array([answer.ended for answer in flat]),
            np.full(len(flat), np.nan),
            np.ones(len(flat), dtype=bool),
        )  # fmt: skip

    @property
    def lengths_S(self) -> Array:
        return np.diff(self.bounds)

    @property
    def lengths_P(self) -> Array:
        """Tokens of the answers of each prompt that are learnt from."""
        return self.lengths_PG.sum(axis=1)

    @property
    def lengths_PG(self) -> Array:
        """Tokens of each prompt's answers; 0 for those that are not learnt from."""
        return np.where(self.kept_S, self.lengths_S, 0).reshape(-1, self.num_answers)

    def answers_of(self, prompts: Sequence[int] | Array) -> list[int]:
        """The answers of these prompts that are learnt from, prompt by prompt."""
        first = np.asarray(prompts)[:, None] * self.num_answers
        found = (first + np.arange(self.num_answers)).reshape(-1)
        return found[self.kept_S[found]].tolist()

    def ids(self, answer: int) -> Array:
        return self.ids_T[self.bounds[answer] : self.bounds[answer + 1]]

    def take(self, name: str, answers: Sequence[int]) -> Array:
        """Token values of these answers, one after the other."""
        values = self.tokens[name]
        parts = [values[self.bounds[a] : self.bounds[a + 1]] for a in answers]
        return np.concatenate(parts) if parts else values[:0]

    def put(self, name: str, answers: Sequence[int], values: Array) -> None:
        """Write token values of these answers, given one after the other."""
        whole = self.tokens.setdefault(name, np.zeros(len(self.ids_T), dtype=np.float32))
        cursor = 0
        for a in answers:
            size = self.bounds[a + 1] - self.bounds[a]
            whole[self.bounds[a] : self.bounds[a + 1]] = values[cursor : cursor + size]
            cursor += size

    def split(self, name: str) -> list[Array]:
        """Token values of every answer, float64."""
        return [part.astype(np.float64) for part in np.split(self.tokens[name], self.bounds[1:-1])]

    def join(self, name: str, parts: Sequence[Array]) -> None:
        """What `split` gave, back as fp32."""
        self.tokens[name] = np.concatenate(parts).astype(np.float32)

    # --- for checkpoints --------------------------------------------------------------------

    _ARRAYS = ("rows_P", "ids_T", "bounds", "ended_S", "rewards_S", "kept_S")

    def state_dict(self) -> dict[str, Any]:
        """JSON-able and exact: the arrays as safetensors, in base64."""
        arrays = {name: getattr(self, name) for name in self._ARRAYS}
        arrays |= {f"tokens.{name}": values for name, values in self.tokens.items()}
        blob = base64.b64encode(save({k: np.ascontiguousarray(v) for k, v in arrays.items()})).decode("ascii")
        return {"epoch": self.epoch, "index": self.index, "num_answers": self.num_answers, "arrays": blob}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Rollout:
        arrays = load(base64.b64decode(state["arrays"]))
        tokens = {name[7:]: values for name, values in arrays.items() if name.startswith("tokens.")}
        parts = {name: arrays[name] for name in cls._ARRAYS}
        return cls(state["epoch"], state["index"], num_answers=state["num_answers"], tokens=tokens, **parts)
