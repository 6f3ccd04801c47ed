"""Objectives on single answers that people want or do not want.

Δ = log π(y|x) − log π_ref(y|x); λ_D and λ_U weigh desirable and undesirable answers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trueup.objectives.registry import objective
from trueup.types import FeedbackLogps, Loss, Metrics

_PARAMETERS = {
    "beta": "pref_beta",
    "desirable_weight": "kto_chosen_weight",
    "undesirable_weight": "kto_rejected_weight",
}


@objective(
    "kto",
    takes=FeedbackLogps,
    denominator="answers",
    needs_reference=True,
    parameters=_PARAMETERS,
    needs_mismatched=True,
)
def kto(
    logps: FeedbackLogps,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    mismatched: Tensor | None = None,
) -> Loss:
    """λ_D (1 − σ(β(Δ − z))) for wanted, λ_U (1 − σ(β(z − Δ))) for unwanted answers: KTO (arXiv 2402.01306).

    z = max(0, mean log-ratio of prompts with answers of other prompts): an estimate of the KL between policy and
    reference, without gradient.

    Args:
        mismatched: [M] log-ratios of the mismatched pairs of the whole optimizer step; none counts as z = 0. TRL and
            LLaMA-Factory estimate z on each micro-batch.
    """
    z = _baseline(logps, mismatched)
    rewards = beta * (logps.answer - logps.reference)
    wanted = torch.where(logps.desirable, 1.0, -1.0)
    weight = torch.where(logps.desirable, desirable_weight, undesirable_weight)
    losses = weight * (1 - torch.sigmoid(wanted * (rewards - beta * z)))
    return Loss(losses.sum(), {**feedback_metrics(logps, rewards), "kl_mismatched": (z, 1.0)})


def _baseline(logps: FeedbackLogps, mismatched: Tensor | None) -> Tensor:
    if mismatched is None or not len(mismatched):
        return logps.answer.new_zeros(())
    return mismatched.detach().mean().clamp(min=0).to(logps.answer)


@objective(
    "bco", takes=FeedbackLogps, denominator="answers", needs_reference=True, parameters=_PARAMETERS, needs_shift=True
)
def bco(
    logps: FeedbackLogps,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    shift: float = 0.0,
) -> Loss:
    """−λ_D log σ(βΔ − δ) for wanted, −λ_U log σ(−(βΔ − δ)) for unwanted answers: BCO (arXiv 2404.04656).

    δ is the running mean of all rewards of the steps before this one (`pairwise.bco_pair` says why); at the same δ it
    is the loss of TRL's BCOTrainer, which TRL 1.16 no longer has. The paper's density-ratio weights for wanted and
    unwanted prompts that differ in kind are left out.
    """
    rewards = beta * (logps.answer - logps.reference)
    wanted = torch.where(logps.desirable, 1.0, -1.0)
    weight = torch.where(logps.desirable, desirable_weight, undesirable_weight)
    losses = -weight * F.logsigmoid(wanted * (rewards - shift))
    return Loss(losses.sum(), feedback_metrics(logps, rewards))


@objective(
    "apo_zero_unpaired", takes=FeedbackLogps, denominator="answers", needs_reference=True, parameters=_PARAMETERS
)
def apo_zero_unpaired(
    logps: FeedbackLogps, *, beta: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> Loss:
    """λ_D (1 − σ(βΔ)) for wanted, λ_U σ(βΔ) for unwanted answers: APO-zero (arXiv 2408.06266), KTO at z = 0."""
    return Loss(
        kto(logps, beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight).sum,
        feedback_metrics(logps, beta * (logps.answer - logps.reference)),
    )


@objective("desirable_nll", takes=FeedbackLogps, denominator="desirable")
def desirable_anchor(logps: FeedbackLogps) -> Loss:
    """The wanted answers' mean −log π per token, averaged over them: `pref_ftx` on single answers (LLaMA-Factory)."""
    nll = -(logps.answer / logps.length)[logps.desirable].sum()
    return Loss(nll, {"sft_loss": (nll.detach(), logps.desirable.sum())})


def feedback_metrics(logps: FeedbackLogps, rewards: Tensor) -> Metrics:
    """Under TRL's names: wanted answers are `chosen`, unwanted ones `rejected`.

    The accuracy of single answers is the share whose reward has the right sign; a reward of 0 is half right.
    """
    rewards, answer = rewards.detach(), logps.answer.detach()
    chosen = logps.desirable.to(rewards.dtype)
    rejected = 1 - chosen
    signed = torch.where(logps.desirable, rewards, -rewards)
    accurate = (signed > 0).float() + 0.5 * (signed == 0).float()
    return {
        "rewards/chosen": ((chosen * rewards).sum(), chosen.sum()),
        "rewards/rejected": ((rejected * rewards).sum(), rejected.sum()),
        "rewards/accuracies": (accurate.sum(), float(len(rewards))),
        "logps/chosen": ((chosen * answer).sum(), chosen.sum()),
        "logps/rejected": ((rejected * answer).sum(), rejected.sum()),
    }
