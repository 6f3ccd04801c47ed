"""Three asymmetric pairs, and how each objective is called on them."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from trueup.objectives import OBJECTIVES
from trueup.types import FeedbackLogps, Loss, PairLogps

#: chosen, rejected, their lengths, and both under the reference: a = [1.2, −0.4, 1.0], c = [1.4, 0.7, −4.5].
ROWS = [
    [-10, -20.5, -33], [-12.5, -18, -41], [5, 8, 13], [6, 4, 16], [-11.2, -20.1, -34], [-13.9, -18.7, -36.5],
]  # fmt: skip


def pairs(dtype: torch.dtype = torch.float64) -> PairLogps:
    """Pairs whose losses were computed in float64 from the papers' formulas."""
    return PairLogps(*(torch.tensor(row, dtype=dtype) for row in ROWS))


def with_divergence(logps: PairLogps) -> PairLogps:
    """The same with some divergences over the vocabulary."""
    chosen = torch.tensor([0.3, 1.1, 0.7], dtype=logps.chosen.dtype)
    return dataclasses.replace(logps, kl_chosen=chosen, kl_rejected=chosen.flip(0) + 0.4)


def as_feedback(logps: PairLogps) -> FeedbackLogps:
    """All chosen answers as desirable, all rejected ones as undesirable."""
    assert logps.ref_chosen is not None and logps.ref_rejected is not None
    count = len(logps.chosen)
    return FeedbackLogps(
        torch.cat([logps.chosen, logps.rejected]),
        torch.cat([logps.chosen_len, logps.rejected_len]),
        torch.tensor([True] * count + [False] * count),
        torch.cat([logps.ref_chosen, logps.ref_rejected]),
    )


def at_start(logps: PairLogps) -> PairLogps:
    """Policy = reference."""
    zero = torch.zeros_like(logps.chosen)
    return dataclasses.replace(
        logps, ref_chosen=logps.chosen.detach(), ref_rejected=logps.rejected.detach(), kl_chosen=zero, kl_rejected=zero
    )


#: Keyword arguments with which each objective is checked; β 0.1 where it is not said.
ARGUMENTS: dict[str, dict] = {
    "robust": {"label_smoothing": 0.1},
    "simpo": {"beta": 2.0, "gamma": 0.5},
    "alphapo": {"beta": 2.0, "gamma": 0.5, "alpha": 0.25},
    "dpop": {"penalty": 5.0},
}


def evaluate(name: str, logps: PairLogps, **keywords) -> Loss:
    """An objective on these pairs, whichever form it takes them in."""
    objective = OBJECTIVES[name]
    arguments = {**ARGUMENTS.get(name, {}), **keywords}
    if "beta" in objective.parameters:
        arguments = {"beta": 0.1, **arguments}
    given = logps if objective.takes is PairLogps else as_feedback(logps)
    return objective.function(with_divergence(logps) if objective.needs_divergence else given, **arguments)


def mean(loss: Loss, count: int = 3) -> Tensor:
    return loss.sum / count


PAIRWISE = [name for name, row in OBJECTIVES.items() if row.takes is PairLogps]
UNPAIRED = [name for name, row in OBJECTIVES.items() if row.takes is FeedbackLogps]
