"""Objectives on the policy's own answers: GRPO and its variants, RLOO, PPO.

Notation: r_t = π(y_t) / π_old(y_t), where π_old wrote the answers; A the advantage, constant in the gradient; ε the
clip range. Every function returns a sum over the micro-batch; what it is divided by, over the whole optimizer step, is
in `DENOMINATORS`. So neither micro-batches nor processes change a loss, where others average locally.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trueup.types import Loss, Metrics

GroupLoss = Literal["dapo", "bnpo", "grpo", "dr_grpo", "gspo", "cispo"]

#: loss → what its sum is divided by: the answers' tokens, the answers, or `answers × max_new_tokens`.
DENOMINATORS: dict[str, Literal["tokens", "answers", "budget"]] = {
    "dapo": "tokens",
    "bnpo": "tokens",
    "cispo": "tokens",
    "grpo": "answers",
    "gspo": "answers",
    "dr_grpo": "budget",
    "rloo": "answers",
    "ppo": "tokens",
}


@dataclass(frozen=True)
class AnswerLogps:
    """N tokens of S answers, answer after answer; fp32."""

    logps: Tensor  # [N] under the policy, differentiable
    old: Tensor  # [N] under the policy that wrote them
    advantages: Tensor  # [N]
    owner: Tensor  # [N] answer of each token, ascending
    num_answers: int
    reference: Tensor | None = None  # [N]; None where no KL is charged

    def lengths(self) -> Tensor:
        """[S] tokens of each answer."""
        return self.per_answer(torch.ones_like(self.logps))

    def per_answer(self, values: Tensor) -> Tensor:
        """[N] → [S] sums."""
        return values.new_zeros(self.num_answers).index_add(0, self.owner, values)

    def of_answer(self, values: Tensor) -> Tensor:
        """[N], the same over an answer → [S]. Zero for an answer without tokens."""
        return self.per_answer(values) / self.lengths().clamp_min(1.0)


def grpo(a: AnswerLogps, *, loss: GroupLoss, low: float | None, high: float, kl_coeff: float = 0.0) -> Loss:
    """Group-relative policy optimisation and its variants; per token −min(r A, clip(r, 1−ε_low, 1+ε_high) A) + β·k3.

    dapo     Σ over tokens / tokens of the step (arXiv 2503.14476, eq. 8).
    bnpo     the same: TRL's divides by the tokens of a micro-batch, so that its result depends on how a batch is cut.
    grpo     mean over an answer's tokens, then over answers (arXiv 2402.03300, eq. 3).
    dr_grpo  Σ over tokens / (answers × max_new_tokens) (arXiv 2503.20783, eq. 4 with a constant in place of |o|).
    gspo     r of a whole answer, exp(mean_t log r_t) (arXiv 2507.18071, eq. 7); clipped as one.
    cispo    −sg(min(r, ε_high)) A log π (arXiv 2506.13585, eq. 5, without a lower bound); ε_high is the cap itself.

    k3 = e^d − d − 1, d = log π_ref − log π, joins the same reduction (DeepSeekMath's estimator, never negative).
    """
    log_ratio = a.logps - a.old
    if loss == "gspo":
        mean = a.per_answer(log_ratio) / a.lengths().clamp_min(1.0)
        log_ratio = mean[a.owner]
    ratio = torch.exp(log_ratio)
    if loss == "cispo":
        losses = -ratio.detach().clamp(max=high) * a.advantages * a.logps
        metrics = _mean({"cispo_clip_ratio": (ratio > high) & (a.advantages > 0)})
    else:
        assert low is not None
        losses = clipped(ratio, a.advantages, low, high)
        metrics = clip_metrics(ratio, a.advantages, low, high)
    if a.reference is not None:
        gap = a.reference - a.logps
        k3 = torch.expm1(gap) - gap
        metrics |= _mean({"kl": k3})
        losses = losses + kl_coeff * k3
    if DENOMINATORS[loss] == "answers":
        losses = losses / a.lengths().clamp_min(1.0)[a.owner]
    return Loss(losses.sum(), metrics)


def rloo(a: AnswerLogps, *, low: float, high: float) -> Loss:
    """REINFORCE with a leave-one-out baseline (arXiv 2402.14740): −min(r A, clip(r) A) of whole answers.

    r = exp(Σ_t log r_t). The KL is in the reward, not here (`rollout/advantages.py`).
    """
    ratio = torch.exp(a.per_answer(a.logps - a.old))
    advantages = a.of_answer(a.advantages)
    return Loss(clipped(ratio, advantages, low, high).sum(), clip_metrics(ratio, advantages, low, high))


def ppo(a: AnswerLogps, *, low: float, high: float) -> Loss:
    """Proximal policy optimisation (arXiv 1707.06347, eq. 7): max(−r A, −clip(r) A) over all tokens of the step.

    `policy/clipfrac_avg` is TRL's: the share of tokens whose clip binds, not of all ratios outside the range.
    """
    log_ratio = a.logps - a.old
    ratio = torch.exp(log_ratio)
    losses = clipped(ratio, a.advantages, low, high)
    metrics = clip_metrics(ratio, a.advantages, low, high)
    metrics |= {"policy/clipfrac_avg": metrics["clip_ratio/region_mean"]} | _mean(
        {
            "loss/policy_avg": losses,
            "policy/approxkl_avg": 0.5 * log_ratio**2,
            "val/ratio": ratio,
        }
    )
    return Loss(losses.sum(), metrics)


def value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> Loss:
    """½ max((v − R)², (clip(v, v_old ± c) − R)²) over all tokens (PPO's own code; Engstrom et al. 2005.12729, §3).

    Args:
        values: [N] of the value head now; `old` of it when the answers were written; `returns`: [N] targets.
    """
    held = old + (values - old).clamp(-clip, clip)
    free, bound = (values - returns) ** 2, (held - returns) ** 2
    losses = 0.5 * torch.maximum(free, bound)
    return Loss(losses.sum(), _mean({"loss/value_avg": losses, "val/clipfrac_avg": bound > free}))


def clipped(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """−min(r A, clip(r, 1−low, 1+high) A), element by element."""
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def clip_metrics(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Metrics:
    """Shares whose gradient the clip cuts off, below and above."""
    below = (ratio < 1 - low) & (advantages < 0)
    above = (ratio > 1 + high) & (advantages > 0)
    return _mean({"clip_ratio/low_mean": below, "clip_ratio/high_mean": above, "clip_ratio/region_mean": below | above})


def _mean(values: dict[str, Tensor]) -> Metrics:
    return {name: (value.detach().float().sum(), float(value.numel())) for name, value in values.items()}
