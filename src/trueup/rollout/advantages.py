"""From rewards to advantages. Plain functions on the whole rollout, in float64: every process has it whole.

A missing reward (NaN: no function had an opinion, or it ran out of time) counts for nothing and has advantage 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

EPSILON = 1e-4  # TRL's: a group whose rewards hardly differ teaches hardly anything
Array = np.ndarray


def group_relative(rewards_PG: Array, scale: Literal["group", "batch", "no"]) -> Array:
    """(R − mean of its group) / (deviation + 1e-4), [P, G] → [P, G] (GRPO, arXiv 2402.03300, §4.1.2).

    scale: the unbiased deviation of the group or of the whole batch; "no" divides by nothing (Dr. GRPO, 2503.20783).
    """
    centred = rewards_PG - _mean(rewards_PG)
    if scale == "group":
        centred /= _deviation(rewards_PG) + EPSILON
    elif scale == "batch":
        centred /= _deviation(rewards_PG.reshape(1, -1)) + EPSILON
    return np.nan_to_num(centred)


def leave_one_out(rewards_PG: Array) -> Array:
    """R − mean of the other answers' rewards, [P, G] → [P, G] (RLOO, arXiv 2402.14740, eq. 7)."""
    known = np.isfinite(rewards_PG)
    others = known.sum(axis=1, keepdims=True) - 1
    rest = np.nansum(rewards_PG, axis=1, keepdims=True) - rewards_PG
    return np.nan_to_num(np.where(others > 0, rewards_PG - rest / np.maximum(others, 1), 0.0))


def gae(rewards: Sequence[Array], values: Sequence[Array], gamma: float, lam: float) -> tuple[list[Array], list[Array]]:
    """Advantages and returns of each token of each answer (arXiv 1506.02438, eq. 16).

    δ_t = r_t + γ V_{t+1} − V_t, A_t = Σ_l (γλ)^l δ_{t+l}, R_t = A_t + V_t; nothing comes after an answer's last token.
    """
    advantages = []
    for reward, value in zip(rewards, values, strict=True):
        deltas = reward + gamma * np.append(value[1:], 0.0) - value
        found, running = np.empty_like(deltas), 0.0
        for t in range(len(deltas) - 1, -1, -1):
            running = deltas[t] + gamma * lam * running
            found[t] = running
        advantages.append(found)
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


def whiten(parts: Sequence[Array], *, shift: bool = True) -> list[Array]:
    """All numbers of `parts` together with deviation 1 and mean 0 (or, without `shift`, the mean they had)."""
    together = np.concatenate(parts) if parts else np.zeros(0)
    mean, variance = (together.mean(), together.var()) if together.size else (0.0, 1.0)
    scale = 1.0 / np.sqrt(variance + 1e-8)
    return [(part - mean) * scale + (0.0 if shift else mean) for part in parts]


def _mean(rewards_PG: Array) -> Array:
    known = np.isfinite(rewards_PG)
    return np.nansum(rewards_PG, axis=1, keepdims=True) / np.maximum(known.sum(axis=1, keepdims=True), 1)


def _deviation(rewards_PG: Array) -> Array:
    """Unbiased; 0 for fewer than two known rewards."""
    known = np.isfinite(rewards_PG).sum(axis=1, keepdims=True)
    squares = np.nansum((rewards_PG - _mean(rewards_PG)) ** 2, axis=1, keepdims=True)
    return np.sqrt(squares / np.maximum(known - 1, 1))
