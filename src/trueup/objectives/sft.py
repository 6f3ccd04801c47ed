"""Supervised objectives: the negative log-likelihood of given tokens."""

from __future__ import annotations

from trueup.objectives.registry import objective
from trueup.types import Loss, TokenLogps


@objective("sft", takes=TokenLogps, denominator="predictions")
def negative_log_likelihood(logps: TokenLogps) -> Loss:
    """−Σ_t log π(y_t), averaged over the trained tokens of the whole optimizer step.

    Args:
        logps: [N] log-probabilities of the trained tokens (pre-training and SFT alike).
    """
    return Loss(-logps.logps.sum())
