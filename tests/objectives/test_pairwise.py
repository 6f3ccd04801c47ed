"""Pairwise objectives against independently computed values, finite differences and closed forms."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from trueup.objectives import OBJECTIVES, pairwise
from trueup.types import PairLogps


def reference_vector(dtype=torch.float64) -> PairLogps:
    """Three asymmetric pairs whose losses were computed in float64 from the papers' formulas."""
    rows = [
        [-10, -20.5, -33], [-12.5, -18, -41], [5, 8, 13], [6, 4, 16], [-11.2, -20.1, -34], [-13.9, -18.7, -36.5],
    ]  # fmt: skip
    return PairLogps(*(torch.tensor(row, dtype=dtype) for row in rows))


@pytest.mark.parametrize(
    ("name", "parameters", "expected"),
    [
        ("sigmoid", {"beta": 0.1}, 0.6361161933),
        ("sigmoid", {"beta": 0.1, "label_smoothing": 0.1}, 0.6501161933),
    ],
)
def test_reference_values(name: str, parameters: dict, expected: float) -> None:
    loss = OBJECTIVES[name].function(reference_vector(), **parameters)
    assert float(loss.sum) / 3 == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_gradients_by_finite_differences(smoothing: float) -> None:
    logps = reference_vector()

    def loss(chosen, rejected):
        moved = dataclasses.replace(logps, chosen=chosen, rejected=rejected)
        return pairwise.sigmoid(moved, beta=0.3, label_smoothing=smoothing).sum + pairwise.chosen_nll(moved)

    assert torch.autograd.gradcheck(loss, (logps.chosen.requires_grad_(), logps.rejected.requires_grad_()))


def test_at_the_start_the_loss_is_ln_2_and_every_pair_a_tie() -> None:
    logps = reference_vector()
    start = dataclasses.replace(logps, ref_chosen=logps.chosen, ref_rejected=logps.rejected)
    loss = pairwise.sigmoid(start, beta=0.1)
    assert float(loss.sum) == pytest.approx(3 * math.log(2), abs=1e-12)
    means = {name: float(total / count) for name, (total, count) in loss.metrics.items()}
    assert means["rewards/accuracies"] == 0.5
    assert means["rewards/margins"] == 0.0


def test_metrics_are_named_and_averaged_as_trl_does() -> None:
    loss = pairwise.sigmoid(reference_vector(), beta=0.1)
    means = {name: float(total / count) for name, (total, count) in loss.metrics.items()}
    assert means["rewards/chosen"] == pytest.approx(0.1 * (1.2 - 0.4 + 1.0) / 3)
    assert means["rewards/rejected"] == pytest.approx(0.1 * (1.4 + 0.7 - 4.5) / 3)
    assert means["rewards/accuracies"] == pytest.approx(1 / 3)
    assert means["logps/chosen"] == pytest.approx((-10 - 20.5 - 33) / 3)
    assert not any(total.requires_grad for total, _ in loss.metrics.values())


def test_chosen_nll_is_the_mean_per_token_of_each_pair() -> None:
    assert float(pairwise.chosen_nll(reference_vector())) == pytest.approx(10 / 5 + 20.5 / 8 + 33 / 13)
