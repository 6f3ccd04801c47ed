"""Supervised objectives: the negative log-likelihood of given tokens, all alike or weighed token by token.

What weighs a token has no gradient. Weighed losses are sums that are divided by the number of tokens, not of weights,
and report the likelihood itself as `nll`.
"""

from __future__ import annotations

from torch import Tensor

from trueup.objectives.registry import objective
from trueup.types import Loss, TokenLogps

#: what an entropy is divided by: about ln 20, the largest that 20 tokens have.
LARGEST_ENTROPY = 3.0


@objective("sft", takes=TokenLogps, denominator="predictions")
def negative_log_likelihood(logps: TokenLogps) -> Loss:
    """−Σ_t log π(y_t), averaged over the trained tokens of the whole optimizer step.

    Args:
        logps: [N] log-probabilities of the trained tokens (pre-training and SFT alike).
    """
    return Loss(-logps.logps.sum())


@objective("dft", takes=TokenLogps, denominator="predictions")
def dynamic_fine_tuning(logps: TokenLogps) -> Loss:
    """−Σ_t sg(π(y_t)) log π(y_t): a token counts as much as the model already believes it (DFT, arXiv 2508.05629).

    SFT is a policy gradient whose reward is divided by π(y_t); the weight takes the division back, so that tokens the
    model finds absurd no longer rule the step.
    """
    return _weighed(logps, logps.logps.detach().exp())


@objective("eaft", takes=TokenLogps, denominator="predictions", parameters={"alpha": "eaft_alpha"}, needs_entropy=True)
def entropy_adaptive_fine_tuning(logps: TokenLogps, alpha: float = 1.0) -> Loss:
    """−Σ_t (H_t / 3)^α log π(y_t): tokens count where the model is unsure (EAFT, arXiv 2601.02151).

    A model that is sure of another token than the data's has its knowledge contradicted, and forgets; such tokens weigh
    little here. H_t is the entropy of the 20 likeliest tokens among themselves, about 3 nats at the most, as in
    LLaMA-Factory.

    Args:
        logps: with `entropy` [N].
    """
    assert logps.entropy is not None
    return _weighed(logps, (logps.entropy / LARGEST_ENTROPY) ** alpha)


def _weighed(logps: TokenLogps, weight: Tensor) -> Loss:
    nll = -logps.logps
    return Loss((weight * nll).sum(), {"nll": (nll.detach().sum(), float(len(nll)))})
