"""Objectives on preference pairs with a reference.

Notation of the papers: β `beta`, ε `label_smoothing`; Δ_w = log π(y_w|x) − log π_ref(y_w|x), Δ_l likewise.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from trueup.objectives.registry import objective
from trueup.types import Loss, Metrics, PairLogps


@objective(
    "sigmoid",
    takes=PairLogps,
    denominator="pairs",
    needs_reference=True,
    parameters={"beta": "pref_beta", "label_smoothing": "dpo_label_smoothing"},
)
def sigmoid(logps: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> Loss:
    """−(1−ε) log σ(β(Δ_w − Δ_l)) − ε log σ(−β(Δ_w − Δ_l)), summed over the pairs.

    DPO (arXiv 2305.18290, eq. 7); with ε > 0 the conservative form (cDPO, Mitchell 2023, eq. 3). At the start,
    policy = reference, it is ln 2 a pair.
    """
    rewards = implicit_rewards(logps, beta)
    margins = rewards[0] - rewards[1]
    losses = -(1 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins)
    return Loss(losses.sum(), pair_metrics(logps, *rewards))


def chosen_nll(logps: PairLogps) -> Tensor:
    """Σ over pairs of the chosen answer's mean −log π per token: RPO's anchor (arXiv 2404.19733, eq. 2; `pref_ftx`)."""
    return -(logps.chosen / logps.chosen_len).sum()


def implicit_rewards(logps: PairLogps, beta: float) -> tuple[Tensor, Tensor]:
    """β(log π − log π_ref) of the chosen and the rejected answers, [B] each (arXiv 2305.18290, eq. 5)."""
    assert logps.ref_chosen is not None and logps.ref_rejected is not None, "a reference was declared as needed"
    return beta * (logps.chosen - logps.ref_chosen), beta * (logps.rejected - logps.ref_rejected)


def pair_metrics(logps: PairLogps, chosen_rewards: Tensor, rejected_rewards: Tensor) -> Metrics:
    """The metrics every pairwise objective reports, under TRL's names; a tie counts as half an accurate pair."""
    chosen, rejected = chosen_rewards.detach(), rejected_rewards.detach()
    margins = chosen - rejected
    accurate = (margins > 0).float() + 0.5 * (margins == 0).float()
    values = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": margins,
        "rewards/accuracies": accurate,
        "logps/chosen": logps.chosen.detach(),
        "logps/rejected": logps.rejected.detach(),
    }
    return {name: (value.sum(), float(len(margins))) for name, value in values.items()}
