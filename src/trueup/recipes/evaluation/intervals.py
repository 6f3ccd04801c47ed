"""How sure a figure is: bootstrap intervals over rows, and accuracy with the length of answers taken out.

A figure is a function of rows. Its 95 % interval is between the 2.5th and the 97.5th percentile of what the function
gives for rows drawn again with replacement (Efron 1979). The draws depend on the seed and the number of rows alone, so
that two models measured on the same rows are compared draw by draw.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

LEVEL = 0.95
_Z = 1.959964  # of LEVEL
_STEPS = 25  # of Newton's method
_FARTHEST = 20.0  # log-odds that are as good as certain
_CELLS = 4_000_000  # weights held at once


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval, from `count` rows. Without an interval (one row, no draws) both ends are None."""

    value: float
    low: float | None
    high: float | None
    count: int

    def to_dict(self) -> dict[str, Any]:
        return {"value": self.value, "low": self.low, "high": self.high, "count": self.count}

    def __str__(self) -> str:
        return shown(self.value) + (f" [{shown(self.low)}, {shown(self.high)}]" if self.low is not None else "")


def shown(value: float | None) -> str:
    """A figure as people read it: four digits."""
    return "–" if value is None or math.isnan(value) else f"{value:.4g}"


#: weights [R, n] of rows → a figure for each of R draws.
Statistic = Callable[[np.ndarray], np.ndarray]


class Bootstrap:
    """Draws of rows, the same for everything that is measured on as many of them."""

    def __init__(self, draws: int = 1000, seed: int = 0) -> None:
        self.draws, self.seed = draws, seed

    def mean(self, values: np.ndarray) -> Estimate:
        """The mean of values [n]."""
        values = np.asarray(values, dtype=np.float64)
        return self.of(lambda w: w @ values / w.sum(1), len(values))

    def share(self, hits: np.ndarray) -> Estimate:
        """The mean of values [n] from 0 to 1, such as wins with ½ for ties.

        Rows that are all 0, or all 1, say nothing about their spread, and draws of them even less: there the interval
        is Wilson's (1927).
        """
        hits = np.asarray(hits, dtype=np.float64)
        found = self.mean(hits)
        if found.low is None or not (np.all(hits == 0) or np.all(hits == 1)):
            return found
        room = _Z**2 / (len(hits) + _Z**2)
        low, high = (0.0, room) if hits[0] == 0 else (1.0 - room, 1.0)
        return Estimate(found.value, low, high, len(hits))

    def ratio(self, sums: np.ndarray, counts: np.ndarray, finish: Callable[[Any], Any] = lambda x: x) -> Estimate:
        """`finish` of Σ sums / Σ counts, [n] each: a figure per token, drawn by row."""
        sums, counts = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
        return self.of(lambda w: finish(w @ sums / (w @ counts)), len(sums))

    def length_controlled(self, hits: np.ndarray, longer: np.ndarray) -> Estimate:
        """See `at_equal_length`; where all rows agree, length explains nothing."""
        if len(hits) and np.all(np.asarray(hits) == hits[0]):
            return self.share(hits)
        hits, longer = np.asarray(hits, dtype=np.float64), np.asarray(longer, dtype=np.float64)
        return self.of(lambda w: at_equal_length(hits, longer, w), len(hits))

    def of(self, statistic: Statistic, count: int) -> Estimate:
        """Any figure of `count` rows."""
        if not count:
            return Estimate(math.nan, None, None, 0)
        value = float(statistic(np.ones((1, count)))[0])
        if count == 1 or not self.draws:
            return Estimate(value, None, None, count)
        rng = np.random.default_rng([self.seed, count])
        size = max(1, _CELLS // count)
        with np.errstate(divide="ignore", invalid="ignore"):  # a draw may hold no row that counts
            found = np.concatenate([
                statistic(rng.multinomial(count, np.full(count, 1 / count), min(size, self.draws - done)).astype(float))
                for done in range(0, self.draws, size)
            ])  # fmt: skip
        found = found[np.isfinite(found)]
        if not len(found):
            return Estimate(value, None, None, count)
        low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Estimate(value, float(low), float(high), count)


def at_equal_length(hits: np.ndarray, longer: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The accuracy [R] that is left where both answers are equally long.

    P(hit) = σ(a + b tanh(d/s)), d the tokens by which the chosen answer is longer and s the standard deviation of d,
    fitted by weighed maximum likelihood with a prior ½b²; at d = 0 it is σ(a). The form is length-controlled
    AlpacaEval's (arXiv 2404.04475, eq. 2), with hits in place of a judge's preferences.

    Args:
        hits: [n] 1 where the chosen answer has the higher reward, ½ where they tie, else 0.
        longer: [n] tokens of the chosen less tokens of the rejected answer.
        weights: [R, n] how often each row counts.
    """
    x = np.tanh(longer / (longer.std() or 1.0))
    a, b = np.zeros(len(weights)), np.zeros(len(weights))
    for _ in range(_STEPS):
        p = 1.0 / (1.0 + np.exp(-(a[:, None] + b[:, None] * x)))
        miss = weights * (hits - p)
        curve = weights * p * (1 - p)
        gradient_a, gradient_b = miss.sum(1), miss @ x - b
        aa, ab, bb = curve.sum(1) + 1e-9, curve @ x, curve @ x**2 + 1.0
        determinant = aa * bb - ab**2
        step_a = (bb * gradient_a - ab * gradient_b) / determinant
        step_b = (aa * gradient_b - ab * gradient_a) / determinant
        a = np.clip(a + np.clip(step_a, -2, 2), -_FARTHEST, _FARTHEST)
        b = np.clip(b + np.clip(step_b, -2, 2), -_FARTHEST, _FARTHEST)
        if max(np.abs(step_a * (np.abs(a) < _FARTHEST)).max(), np.abs(step_b).max()) < 1e-9:
            break
    return 1.0 / (1.0 + np.exp(-a))
