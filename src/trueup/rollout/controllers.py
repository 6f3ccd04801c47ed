"""What PPO steers by beside the loss: the price of the KL, and the scale of the rewards. Both return on a resume."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


class KlController:
    """The KL's price: fixed, or steered so that the KL per answer meets a target.

    β ← β · (1 + clip(KL / target − 1, ±0.2) · answers / horizon) after every rollout (arXiv 1909.08593, §2.2).
    """

    HORIZON = 10_000  # answers, as in the paper's code

    def __init__(self, price: float, target: float | None) -> None:
        self.price = price
        self.target = target

    def see(self, kl: float, answers: int) -> None:
        if self.target is not None:
            error = min(max(kl / self.target - 1.0, -0.2), 0.2)
            self.price *= 1.0 + error * answers / self.HORIZON

    def state_dict(self) -> dict[str, Any]:
        return {"price": self.price}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.price = state["price"]


class RunningNorm:
    """Mean and deviation of all rewards so far (Chan et al. 1979), to normalise those of a rollout."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def normalise(self, rewards: np.ndarray) -> np.ndarray:
        """Take these rewards in, then return them with the mean and deviation of all. NaN stays NaN."""
        new = rewards[np.isfinite(rewards)]
        if len(new):
            mean, total = float(new.mean()), self.count + len(new)
            gap = mean - self.mean
            self.squares += float(((new - mean) ** 2).sum()) + gap**2 * self.count * len(new) / total
            self.mean += gap * len(new) / total
            self.count = total
        return (rewards - self.mean) / max(self.deviation, 1e-8) if self.deviation else rewards - self.mean

    @property
    def deviation(self) -> float:
        return math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.mean, self.squares = state["count"], state["mean"], state["squares"]
