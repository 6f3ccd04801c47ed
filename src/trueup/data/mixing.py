"""Which rows of each dataset are used, and in what order datasets mix."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trueup.errors import ConfigError


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
    if strategy not in ("interleave_under", "interleave_over", "interleave_once"):
        raise ConfigError(
            f"unknown mix_strategy {strategy!r}",
            expected="concat | interleave_under | interleave_over | interleave_once",
        )
    weights = _weights(probs, len(sizes))
    random = np.random.default_rng(seed)
    exhausted = {d for d, size in enumerate(sizes) if size == 0}
    taken, order = [0] * len(sizes), []

    def done() -> bool:
        return len(exhausted) == len(sizes) or (strategy == "interleave_under" and bool(exhausted))

    while not done():
        # In turn: each dataset once, and a turn begun is finished. By weight: stop at the very
        # draw.
        for d in range(len(sizes)) if weights is None else _draws(weights, random):
            if sizes[d] == 0 or (strategy == "interleave_once" and d in exhausted):
                continue
            order.append((d, taken[d] % sizes[d]))
            taken[d] += 1
            if taken[d] >= sizes[d]:
                exhausted.add(d)
            if weights is not None and done():
                break
    return order


def _draws(weights: np.ndarray, random: np.random.Generator) -> list[int]:
    return random.choice(len(weights), size=1024, p=weights).tolist()


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
