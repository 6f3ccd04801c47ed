"""Which rows of each dataset are used, and in what order datasets mix."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from trueup.errors import ConfigError

STRATEGIES = ("concat", "interleave_under", "interleave_over", "interleave_once")
_DRAWS = 1024  # of datasets by their weights, made at a time


def sample_indices(rows: int, num_samples: int | None, seed: int) -> np.ndarray:
    """Which rows to use, in order: all, or a random draw of `num_samples` (with repeats beyond
    `rows`).
    """
    if num_samples is None or rows == 0:
        return np.arange(rows)
    random = np.random.default_rng(seed)
    drawn = random.permutation(rows)[:num_samples]
    if num_samples > rows:
        drawn = np.concatenate([drawn, random.integers(rows, size=num_samples - rows)])
    return drawn


def mix(
    sizes: Sequence[int],
    strategy: str = "concat",
    probs: Sequence[float] | None = None,
    seed: int = 42,
) -> list[tuple[int, int]]:
    """(dataset, index) in training order. Deterministic: the same arguments give the same mix.

    concat: one after another. interleave_under: in turn (or drawn by `probs`), until the first
    dataset is used up. interleave_over: until every dataset has been used up once, starting over
    with short ones. interleave_once: until all are used up, each row once. Raises ConfigError.
    """
    if strategy == "concat":
        return [(d, i) for d, size in enumerate(sizes) for i in range(size)]
    turns = Turns(len(sizes), strategy, probs, seed)
    taken, order = [0] * len(sizes), []
    for d, size in enumerate(sizes):
        if size == 0:
            turns.empty(d)
    while (d := turns.next()) is not None:
        order.append((d, taken[d] % sizes[d]))
        taken[d] += 1
        if taken[d] >= sizes[d]:
            turns.ended(d)
    return order


class Turns:
    """Which dataset the next row is of, for datasets whose sizes show only at their ends.

    `draws` and `exhausted` (datasets used up once) are where a mix is; a mix begun with them goes on from there.
    """

    def __init__(
        self,
        count: int,
        strategy: str,
        probs: Sequence[float] | None = None,
        seed: int = 42,
        draws: int = 0,
        exhausted: Iterable[int] = (),
    ) -> None:
        if strategy not in STRATEGIES:
            raise ConfigError(f"unknown mix_strategy {strategy!r}", expected=" | ".join(STRATEGIES))
        self.count, self.strategy, self.draws = count, strategy, draws
        self.exhausted, self._empty = set(exhausted), set()
        self._weights = _weights(probs, count)
        self._random = np.random.default_rng(seed)
        self._drawn: list[int] = []
        if self._weights is not None:
            for _ in range(draws // _DRAWS + bool(draws % _DRAWS)):
                self._drawn = _draws(self._weights, self._random)

    def empty(self, dataset: int) -> None:
        """A dataset without rows gets no turns."""
        self._empty.add(dataset)
        self.exhausted.add(dataset)

    def ended(self, dataset: int) -> None:
        """The row just taken was the dataset's last."""
        self.exhausted.add(dataset)

    def next(self) -> int | None:
        """The dataset of the next row; None when the mix is over."""
        if self.strategy == "concat":
            return next((d for d in range(self.count) if d not in self.exhausted), None)
        while True:
            # In turn: each dataset once, and a turn begun is finished. By weight: stop at the very draw.
            if (self._weights is not None or self.draws % self.count == 0) and self._over():
                return None
            dataset = self._draw()
            if dataset not in self._empty and not (self.strategy == "interleave_once" and dataset in self.exhausted):
                return dataset

    def _over(self) -> bool:
        return len(self.exhausted) == self.count or (self.strategy == "interleave_under" and bool(self.exhausted))

    def _draw(self) -> int:
        position = self.draws % _DRAWS
        self.draws += 1
        if self._weights is None:
            return (self.draws - 1) % self.count
        if position == 0:
            self._drawn = _draws(self._weights, self._random)
        return self._drawn[position]


def _draws(weights: np.ndarray, random: np.random.Generator) -> list[int]:
    return random.choice(len(weights), size=_DRAWS, p=weights).tolist()


def _weights(probs: Sequence[float] | None, count: int) -> np.ndarray | None:
    if probs is None:
        return None
    weights = np.asarray(probs, dtype=np.float64)
    if len(weights) != count or not np.isfinite(weights).all() or (weights <= 0).any():
        raise ConfigError(
            f"interleave_probs is {list(probs)}",
            expected=f"{count} positive numbers, one for each dataset",
        )
    return weights / weights.sum()
