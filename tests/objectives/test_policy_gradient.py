"""Policy-gradient objectives against loops written from the papers, finite differences, and values at step 0."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from trueup.objectives.policy_gradient import DENOMINATORS, AnswerLogps, grpo, ppo, rloo, value_loss

LENGTHS = [3, 1, 4, 2]
OWNER = torch.tensor([i for i, n in enumerate(LENGTHS) for _ in range(n)])
LOGPS = torch.tensor([-0.9, -2.1, -0.3, -1.2, -0.05, -3.0, -0.6, -1.1, -0.45, -2.2], dtype=torch.float64)
OLD = torch.tensor([-1.1, -1.6, -0.35, -1.2, -0.4, -2.4, -0.9, -1.0, -0.7, -1.4], dtype=torch.float64)
REFERENCE = torch.tensor([-1.0, -1.8, -0.2, -1.5, -0.3, -2.0, -0.7, -1.3, -0.5, -1.9], dtype=torch.float64)
ADVANTAGE = [1.3, -0.7, 0.4, -1.1]
LOW, HIGH, BETA, LONGEST = 0.2, 0.28, 0.04, 8


def answers(logps=LOGPS, reference: bool = False) -> AnswerLogps:
    advantages = torch.tensor(ADVANTAGE, dtype=torch.float64)[OWNER]
    return AnswerLogps(logps, OLD, advantages, OWNER, len(LENGTHS), REFERENCE if reference else None)


def divided(loss: str, total: float) -> float:
    return (
        total / {"tokens": sum(LENGTHS), "answers": len(LENGTHS), "budget": len(LENGTHS) * LONGEST}[DENOMINATORS[loss]]
    )


def by_hand(loss: str, beta: float) -> float:
    """The losses token by token, in plain Python, as the papers write them."""
    per_answer, start = [], 0
    for length, advantage in zip(LENGTHS, ADVANTAGE, strict=True):
        tokens = range(start, start + length)
        start += length
        lp, old, ref = ([float(v[t]) for t in tokens] for v in (LOGPS, OLD, REFERENCE))
        ratios = [math.exp(a - b) for a, b in zip(lp, old, strict=True)]
        if loss == "gspo":
            ratios = [math.exp(sum(a - b for a, b in zip(lp, old, strict=True)) / length)] * length
        values = []
        for t, r in enumerate(ratios):
            if loss == "cispo":
                value = -min(r, 5.0) * advantage * lp[t]
            else:
                value = -min(r * advantage, min(max(r, 1 - LOW), 1 + HIGH) * advantage)
            d = ref[t] - lp[t]
            values.append(value + beta * (math.exp(d) - d - 1))
        per_answer.append(values)
    flat = [v for values in per_answer for v in values]
    if loss in ("grpo", "gspo"):
        return sum(sum(v) / len(v) for v in per_answer) / len(per_answer)
    return sum(flat) / (len(LENGTHS) * LONGEST if loss == "dr_grpo" else len(flat))


LOSSES = ["dapo", "bnpo", "grpo", "dr_grpo", "gspo", "cispo"]


@pytest.mark.parametrize("beta", [0.0, BETA])
@pytest.mark.parametrize("loss", LOSSES)
def test_grpo_variants_are_the_papers_formulas(loss, beta):
    high = 5.0 if loss == "cispo" else HIGH
    result = grpo(answers(reference=beta > 0), loss=loss, low=LOW, high=high, kl_coeff=beta)
    assert divided(loss, float(result.sum)) == pytest.approx(by_hand(loss, beta), abs=1e-12)


TRL = json.loads(Path(__file__).with_name("trl_online_values.json").read_text(encoding="utf-8"))["values"]


@pytest.mark.parametrize("name", [name for name in TRL if not name.startswith("online_dpo")])
def test_trl_computes_the_same(name):
    loss, beta = name.split()
    if loss == "rloo":
        total = rloo(answers(), low=LOW, high=HIGH).sum
    else:
        high = 5.0 if loss == "cispo" else HIGH
        total = grpo(answers(reference=beta != "0.0"), loss=loss, low=LOW, high=high, kl_coeff=float(beta)).sum
    assert divided(loss, float(total)) == pytest.approx(TRL[name], abs=1e-8)


def test_all_variants_differ_except_the_two_that_are_one_here():
    values = {x: divided(x, float(grpo(answers(), loss=x, low=LOW, high=HIGH).sum)) for x in LOSSES}
    assert values.pop("bnpo") == values["dapo"]
    assert len({round(v, 10) for v in values.values()}) == len(values)


def test_rloo_clips_whole_answers():
    expected, start = 0.0, 0
    for length, advantage in zip(LENGTHS, ADVANTAGE, strict=True):
        r = math.exp(float((LOGPS - OLD)[start : start + length].sum()))
        expected -= min(r * advantage, min(max(r, 0.8), 1.2) * advantage)
        start += length
    assert float(rloo(answers(), low=0.2, high=0.2).sum) == pytest.approx(expected, abs=1e-12)


def test_ppo_is_the_larger_of_both_losses():
    r = torch.exp(LOGPS - OLD)
    a = answers().advantages
    expected = torch.maximum(-r * a, -r.clamp(0.8, 1.2) * a).sum()
    result = ppo(answers(), low=0.2, high=0.2)
    assert float(result.sum) == pytest.approx(float(expected), abs=1e-12)
    value, count = result.metrics["policy/clipfrac_avg"]
    bites = (-r.clamp(0.8, 1.2) * a > -r * a).double().mean()
    assert float(value) / count == pytest.approx(float(bites)) != float(((r < 0.8) | (r > 1.2)).double().mean())


def test_values_far_from_the_old_ones_are_held():
    values, old, returns = (torch.tensor(v, dtype=torch.float64) for v in ([1.0, 0.1], [0.0, 0.0], [2.0, 1.0]))
    result = value_loss(values, old, returns, clip=0.2)
    assert float(result.sum) == pytest.approx(0.5 * (max(1.0, 1.8**2) + 0.9**2))


def functions(loss: str):
    if loss == "rloo":
        return lambda x: rloo(answers(x), low=LOW, high=HIGH).sum
    if loss == "ppo":
        return lambda x: ppo(answers(x), low=LOW, high=HIGH).sum
    return lambda x: grpo(answers(x, reference=True), loss=loss, low=LOW, high=HIGH, kl_coeff=BETA).sum


@pytest.mark.parametrize("loss", ["dapo", "grpo", "dr_grpo", "gspo", "rloo", "ppo"])
def test_gradients_are_the_finite_differences(loss):
    assert torch.autograd.gradcheck(functions(loss), LOGPS.clone().requires_grad_())


def test_cispo_has_the_gradient_of_a_weighed_likelihood():
    x = LOGPS.clone().requires_grad_()
    grpo(answers(x), loss="cispo", low=None, high=1.1).sum.backward()
    weights = torch.exp(LOGPS - OLD).clamp(max=1.1)
    torch.testing.assert_close(x.grad, -weights * answers().advantages)


def test_value_gradients_are_the_finite_differences():
    values = torch.linspace(-1, 1, 6, dtype=torch.float64).requires_grad_()
    old, returns = torch.zeros(6, dtype=torch.float64), torch.linspace(1, -0.7, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda v: value_loss(v, old, returns, 0.3).sum, values)


@pytest.mark.parametrize("loss", ["dapo", "grpo", "dr_grpo", "gspo", "cispo", "rloo", "ppo"])
def test_on_the_policys_own_answers_the_gradient_is_reinforce(loss):
    """At ratio 1 every clip is open: d/dlogp of the sum is −A, weighed as the loss weighs tokens."""
    x = LOGPS.clone().requires_grad_()
    a = AnswerLogps(x, LOGPS, answers().advantages, OWNER, len(LENGTHS))
    match loss:
        case "rloo":
            total = rloo(a, low=0.2, high=0.2).sum
        case "ppo":
            total = ppo(a, low=0.2, high=0.2).sum
        case _:
            total = grpo(a, loss=loss, low=0.2, high=5.0 if loss == "cispo" else 0.2).sum
    total.backward()
    lengths = torch.tensor(LENGTHS, dtype=torch.float64)[OWNER]
    weight = 1 / lengths if loss in ("grpo", "gspo") else torch.ones_like(lengths)
    torch.testing.assert_close(x.grad, -a.advantages * weight)


def test_kl_is_never_negative_and_zero_at_the_reference():
    metrics = grpo(answers(reference=True), loss="dapo", low=LOW, high=HIGH, kl_coeff=BETA).metrics
    assert float(metrics["kl"][0]) > 0
    same = AnswerLogps(REFERENCE, OLD, answers().advantages, OWNER, len(LENGTHS), REFERENCE)
    assert float(grpo(same, loss="dapo", low=LOW, high=HIGH, kl_coeff=BETA).metrics["kl"][0]) == 0.0
