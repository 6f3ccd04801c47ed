"""Keys about training a reward model: how the data's answers are compared."""

from __future__ import annotations

from typing import Annotated, Literal

from trueup.config.values import Lower, NonNegativeFloat, Section


class RewardSection(Section):
    reward_loss: Annotated[Literal["bradley_terry", "plackett_luce", "pointwise", "binary"], Lower] = "bradley_terry"
    """Loss of a reward model: bradley_terry (all pairs of a row), plackett_luce (its whole order), pointwise (the
    reward is the score), binary (how likely an answer is good)."""
    center_rewards_coefficient: NonNegativeFloat = 0.0
    """Holds rewards around zero: weight of the squared sum of a pair's rewards; 0.01 is usual, 0 leaves it out."""
    score_margin: NonNegativeFloat = 0.0
    """By how much rewards must differ for each point by which the data's scores differ."""
