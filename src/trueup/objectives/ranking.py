"""Objectives of reward models: which answers of a prompt are better, or how good each one is.

Notation: r_i the reward of answer i, s_i what the data says of it; i ≻ j where s_i > s_j; m_ij the margin by which i
must win. A row is a prompt with its answers. Comparisons are averaged within a row, so that a row of many answers
weighs as much as a pair (InstructGPT, arXiv 2203.02155, eq. 1); equal scores are no comparison.

Rewards are only compared, so nothing says where zero is. `center` adds `center · mean (r_i + r_j)²` over the pairs of a
row (arXiv 2312.09244, eq. 4), which is TRL's `center_rewards_coefficient`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trueup.objectives.registry import objective
from trueup.types import Loss, Metrics, Rankings

_COMPARED = {"score_margin": "score_margin", "center": "center_rewards_coefficient"}


@objective("bradley_terry", takes=Rankings, denominator="rankings", parameters=_COMPARED)
def bradley_terry(rankings: Rankings, *, score_margin: float = 0.0, center: float = 0.0) -> Loss:
    """Σ_rows mean_{i ≻ j} −log σ(r_i − r_j − m_ij).

    Bradley & Terry (1952) on all pairs of a row; with margins as in Llama 2 (arXiv 2307.09288, eq. 2). All rewards
    equal and no margin: ln 2 a row.
    """
    wins = rankings.wins
    gaps = _differences(rankings.rewards)
    losses = -F.logsigmoid(gaps - _margins(rankings, score_margin))
    total = _row_means(losses, wins).sum() + center * _off_centre(rankings)
    return Loss(total, comparison_metrics(rankings))


@objective("plackett_luce", takes=Rankings, denominator="rankings", parameters=_COMPARED)
def plackett_luce(rankings: Rankings, *, score_margin: float = 0.0, center: float = 0.0) -> Loss:
    """Σ_rows Σ_i log Σ_{j: j = i or i ≻ j} exp(r_j + m_ij) − r_i: the likelihood of the whole order.

    Plackett (1975), Luce (1959): the best is drawn first, in proportion to exp(r), then the best of the rest. Of two
    answers it is Bradley–Terry; of N with equal rewards it is ln N!. Equal scores share their place: each of them is
    drawn from all that are no better (Breslow's approximation), so their order in the data does not matter.
    """
    no_better = (rankings.scores[:, :, None] >= rankings.scores[:, None, :]) & rankings.together
    rivals = rankings.rewards[:, None, :] + _margins(rankings, score_margin) * rankings.wins
    drawn_from = torch.logsumexp(rivals.masked_fill(~no_better, float("-inf")).masked_fill(~_any(no_better), 0.0), 2)
    losses = (drawn_from - rankings.rewards).masked_fill(~rankings.present, 0.0)
    return Loss(losses.sum() + center * _off_centre(rankings), comparison_metrics(rankings))


@objective("pointwise", takes=Rankings, denominator="answers")
def pointwise(rankings: Rankings) -> Loss:
    """Σ_i (r_i − s_i)²: the reward is the score."""
    errors = (rankings.rewards - rankings.scores).masked_fill(~rankings.present, 0.0)
    return Loss((errors**2).sum(), reward_metrics(rankings))


@objective("binary", takes=Rankings, denominator="answers")
def binary(rankings: Rankings) -> Loss:
    """Σ_i −s_i log σ(r_i) − (1 − s_i) log σ(−r_i): σ(r) is how likely an answer is good; s between 0 and 1."""
    losses = F.binary_cross_entropy_with_logits(rankings.rewards, rankings.scores, reduction="none")
    told = (rankings.rewards > 0) == (rankings.scores > 0.5)
    right = (told & rankings.present).float().sum(), rankings.present.float().sum()
    total = losses.masked_fill(~rankings.present, 0.0).sum()
    return Loss(total, {"accuracy": right, **reward_metrics(rankings)})


def comparison_metrics(rankings: Rankings) -> Metrics:
    """`accuracy` and `margin` (TRL's names) over all pairs of a row that are not tied, and `reward_metrics`.

    A pair of equal rewards is half right.
    """
    gaps, wins = _differences(rankings.rewards.detach()), rankings.wins
    pairs = wins.float().sum()
    right = (gaps > 0).float() + 0.5 * (gaps == 0).float()
    return {
        "accuracy": ((right * wins).sum(), pairs),
        "margin": ((gaps * wins).sum(), pairs),
        **reward_metrics(rankings),
    }


def reward_metrics(rankings: Rankings) -> Metrics:
    """The lowest, mean and highest reward of a row. TRL's `min_reward` and `max_reward` are those of a batch."""
    rewards, present = rankings.rewards.detach(), rankings.present
    rows = present.any(1).float().sum()
    lowest = rewards.masked_fill(~present, float("inf")).amin(1)
    highest = rewards.masked_fill(~present, float("-inf")).amax(1)
    return {
        "min_reward": (lowest.sum(), rows),
        "mean_reward": (rewards.masked_fill(~present, 0.0).sum(), present.float().sum()),
        "max_reward": (highest.sum(), rows),
    }


def _differences(values: Tensor) -> Tensor:
    """[B, N] → [B, N, N]: value i − value j."""
    return values[:, :, None] - values[:, None, :]


def _margins(rankings: Rankings, score_margin: float) -> Tensor:
    """m_ij [B, N, N]: the row's own margin, and `score_margin` for each point of score between the two."""
    return rankings.margin[:, None, None] + score_margin * _differences(rankings.scores)


def _off_centre(rankings: Rankings) -> Tensor:
    sums = rankings.rewards[:, :, None] + rankings.rewards[:, None, :]
    return _row_means(sums**2, rankings.together.triu(1)).sum()


def _row_means(values: Tensor, chosen: Tensor) -> Tensor:
    """Mean [B] of values [B, N, N] where `chosen`; 0 where nothing is."""
    return (values * chosen).sum((1, 2)) / chosen.sum((1, 2)).clamp_min(1)


def _any(mask: Tensor) -> Tensor:
    return mask.any(2, keepdim=True)
