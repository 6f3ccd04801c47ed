"""From rewards to advantages: the formulas, and what missing rewards and flat groups do."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from trueup.rollout.advantages import gae, group_relative, leave_one_out, whiten
from trueup.rollout.controllers import KlController, RunningNorm

REWARDS = np.array([[1.0, 0.0, 0.0, 3.0], [2.0, 2.0, 2.0, 2.0]])


def test_group_relative_uses_the_unbiased_deviation_of_the_group():
    found = group_relative(REWARDS, "group")
    assert found[0, 0] == pytest.approx((1.0 - 1.0) / (math.sqrt(2.0) + 1e-4))
    assert found[0, 3] == pytest.approx(2.0 / (math.sqrt(2.0) + 1e-4), abs=1e-12)
    assert not found[1].any()  # a group that is all alike teaches nothing


def test_scaling_by_the_batch_and_not_at_all():
    assert group_relative(REWARDS, "batch")[0, 3] == pytest.approx(2.0 / (REWARDS.std(ddof=1) + 1e-4))
    assert group_relative(REWARDS, "no")[0].tolist() == [0.0, -1.0, -1.0, 2.0]


def test_leave_one_out_compares_with_the_others():
    assert leave_one_out(REWARDS)[0].tolist() == pytest.approx([0.0, -4 / 3, -4 / 3, 8 / 3])


@pytest.mark.parametrize("function", [lambda r: group_relative(r, "group"), leave_one_out])
def test_a_missing_reward_counts_for_nothing(function):
    with_gap = np.array([[1.0, np.nan, 0.0, 3.0]])
    without = np.array([[1.0, 0.0, 3.0]])
    found = function(with_gap)[0]
    assert found[1] == 0.0
    np.testing.assert_allclose(np.delete(found, 1), function(without)[0])
    assert not function(np.array([[np.nan, np.nan]])).any()


def test_gae_is_the_sum_of_discounted_errors():
    rewards, values, gamma, lam = np.array([0.1, -0.2, 1.0]), np.array([0.5, 0.3, 0.8]), 0.9, 0.7
    deltas = rewards + gamma * np.array([0.3, 0.8, 0.0]) - values
    expected = [sum((gamma * lam) ** k * deltas[t + k] for k in range(3 - t)) for t in range(3)]
    (found,), (returns,) = gae([rewards], [values], gamma, lam)
    np.testing.assert_allclose(found, expected)
    np.testing.assert_allclose(returns, found + values)


def test_gae_at_lambda_1_is_the_return_minus_the_value():
    rewards, values = [np.array([0.0, 0.0, 1.0]), np.array([2.0])], [np.array([0.2, 0.4, 0.1]), np.array([0.5])]
    found, _ = gae(rewards, values, 1.0, 1.0)
    np.testing.assert_allclose(found[0], [0.8, 0.6, 0.9])
    np.testing.assert_allclose(found[1], [1.5])


def test_whitening_is_over_all_parts_together():
    parts = whiten([np.array([1.0, 2.0]), np.array([6.0])])
    together = np.concatenate(parts)
    assert together.mean() == pytest.approx(0) and together.std() == pytest.approx(1, abs=1e-6)
    assert np.concatenate(whiten([np.array([1.0, 3.0])], shift=False)).mean() == pytest.approx(2.0)


def test_the_kl_controller_steers_towards_its_target():
    steered, fixed = KlController(0.1, target=2.0), KlController(0.1, None)
    steered.see(4.0, 500)
    fixed.see(4.0, 500)
    assert steered.price == pytest.approx(0.1 * (1 + 0.2 * 500 / 10_000)) and fixed.price == 0.1
    steered.see(1.9, 500)
    assert steered.price == pytest.approx(0.101 * (1 - 0.05 * 0.05))


def test_running_norm_knows_all_rewards_so_far():
    norm, rng = RunningNorm(), np.random.default_rng(0)
    seen = [rng.normal(3, 2, n) for n in (5, 1, 12)]
    for rewards in seen:
        found = norm.normalise(rewards)
    everything = np.concatenate(seen)
    np.testing.assert_allclose(found, (seen[-1] - everything.mean()) / everything.std(ddof=1))
    again = RunningNorm()
    again.load_state_dict(json.loads(json.dumps(norm.state_dict())))
    np.testing.assert_array_equal(again.normalise(seen[0]), norm.normalise(seen[0]))
