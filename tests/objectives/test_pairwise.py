"""What pairwise objectives report, and the anchor they share."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from tests.objectives.vector import at_start, pairs
from trueup.objectives import pairwise


def test_with_the_anchor_gradients_are_those_of_finite_differences() -> None:
    logps = pairs()

    def loss(chosen, rejected):
        moved = dataclasses.replace(logps, chosen=chosen, rejected=rejected)
        return pairwise.sigmoid(moved, beta=0.3).sum + pairwise.chosen_nll(moved)

    assert torch.autograd.gradcheck(loss, (logps.chosen.requires_grad_(), logps.rejected.requires_grad_()))


def test_at_the_start_the_loss_is_ln_2_and_every_pair_a_tie() -> None:
    loss = pairwise.sigmoid(at_start(pairs()), beta=0.1)
    assert float(loss.sum) == pytest.approx(3 * math.log(2), abs=1e-12)
    means = {name: float(total / count) for name, (total, count) in loss.metrics.items()}
    assert means["rewards/accuracies"] == 0.5
    assert means["rewards/margins"] == 0.0


def test_metrics_are_named_and_averaged_as_trl_does() -> None:
    loss = pairwise.sigmoid(pairs(), beta=0.1)
    means = {name: float(total / count) for name, (total, count) in loss.metrics.items()}
    assert means["rewards/chosen"] == pytest.approx(0.1 * (1.2 - 0.4 + 1.0) / 3)
    assert means["rewards/rejected"] == pytest.approx(0.1 * (1.4 + 0.7 - 4.5) / 3)
    assert means["rewards/accuracies"] == pytest.approx(1 / 3)
    assert means["logps/chosen"] == pytest.approx((-10 - 20.5 - 33) / 3)
    assert not any(total.requires_grad for total, _ in loss.metrics.values())


def test_rewards_are_what_the_objective_compares() -> None:
    loss = pairwise.sigmoid_norm(pairs(), beta=0.1)
    expected = 0.1 * (1.2 / 5 - 0.4 / 8 + 1.0 / 13) / 3
    total, count = loss.metrics["rewards/chosen"]
    assert float(total / count) == pytest.approx(expected)


def test_chosen_nll_is_the_mean_per_token_of_each_pair() -> None:
    assert float(pairwise.chosen_nll(pairs())) == pytest.approx(10 / 5 + 20.5 / 8 + 33 / 13)
