"""Objectives on preference pairs that need no reference.

L_w and L_l are the mean log-probabilities per token of the chosen and the rejected answer; what a run logs as
`rewards/…` is β times what the objective compares.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from trueup.objectives.pairwise import chosen_nll, weighed_sum
from trueup.objectives.registry import objective
from trueup.types import Loss, PairLogps


@objective("orpo", takes=PairLogps, denominator="pairs", parameters={"beta": "pref_beta"})
def orpo(logps: PairLogps, *, beta: float) -> Loss:
    """−L_w − λ log σ(log odds(y_w) − log odds(y_l)), odds = p/(1 − p) of p = exp L; λ is `beta`.

    ORPO (arXiv 2403.07691, eq. 6 and 7). The likelihood is the chosen answer's, each pair alike, as in the paper and in
    LLaMA-Factory; TRL takes it over prompt and answer, token by token of a micro-batch.
    """
    chosen, rejected = means_per_token(logps)
    odds = (chosen - log1mexp(chosen)) - (rejected - log1mexp(rejected))
    loss = weighed_sum(logps, -beta * F.logsigmoid(odds), (beta * chosen, beta * rejected))
    nll, pairs = chosen_nll(logps), float(len(odds))
    metrics = {"sft_loss": (nll.detach(), pairs), "odds_ratio_loss": (-F.logsigmoid(odds).detach().sum(), pairs)}
    return Loss(loss.sum + nll, {**loss.metrics, **metrics})


@objective(
    "simpo",
    takes=PairLogps,
    denominator="pairs",
    parameters={"beta": "pref_beta", "gamma": "simpo_gamma", "label_smoothing": "dpo_label_smoothing"},
)
def simpo(logps: PairLogps, *, beta: float, gamma: float, label_smoothing: float = 0.0) -> Loss:
    """−log σ(β(L_w − L_l) − γ): SimPO (arXiv 2405.14734, eq. 6), smoothed by ε as cDPO is.

    With `pref_ftx` it is CPO-SimPO. TRL's defaults (β 0.1, γ 0.5, an NLL term of weight 1) ask for a margin of 5 nats a
    token; ours are the paper's.
    """
    chosen, rejected = means_per_token(logps)
    return _contrast(logps, beta * chosen, beta * rejected, gamma, label_smoothing)


@objective(
    "cpo",
    takes=PairLogps,
    denominator="pairs",
    parameters={"beta": "pref_beta", "label_smoothing": "dpo_label_smoothing"},
)
def cpo(logps: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> Loss:
    """−log σ(β(log π(y_w) − log π(y_l))): the preference part of CPO (arXiv 2401.08417, eq. 3), on sums.

    Its likelihood part is `pref_ftx` (also called `cpo_alpha`), 1 unless set.
    """
    return _contrast(logps, beta * logps.chosen, beta * logps.rejected, 0.0, label_smoothing)


@objective(
    "alphapo",
    takes=PairLogps,
    denominator="pairs",
    parameters={"beta": "pref_beta", "gamma": "simpo_gamma", "alpha": "alphapo_alpha"},
)
def alphapo(logps: PairLogps, *, beta: float, gamma: float, alpha: float) -> Loss:
    """SimPO with rewards (1 − p^(−α))/α, p = exp L, in place of log p: AlphaPO (arXiv 2501.03884); α → 0 is SimPO."""
    chosen, rejected = (_bent(mean, alpha) for mean in means_per_token(logps))
    return _contrast(logps, beta * chosen, beta * rejected, gamma)


def _contrast(logps: PairLogps, chosen: Tensor, rejected: Tensor, gamma: float, label_smoothing: float = 0.0) -> Loss:
    margins = chosen - rejected - gamma
    losses = -(1 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins)
    return weighed_sum(logps, losses, (chosen, rejected))


def _bent(mean: Tensor, alpha: float) -> Tensor:
    return mean if alpha == 0 else -torch.expm1(-alpha * mean) / alpha


def means_per_token(logps: PairLogps) -> tuple[Tensor, Tensor]:
    """L_w and L_l, [B] each."""
    return logps.chosen / logps.chosen_len, logps.rejected / logps.rejected_len


def log1mexp(x: Tensor) -> Tensor:
    """log(1 − exp x) for x < 0, exact on both sides of −ln 2 (Mächler 2012).

    x = 0 (an answer the model is certain of, to the last bit) is taken as −1e-6: its odds are large, not infinite.
    """
    x = x.clamp(max=-1e-6)
    return torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))
