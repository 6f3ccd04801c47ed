"""Objectives of reward models against written-out sums, closed forms and finite differences."""

from __future__ import annotations

import dataclasses
import math
from itertools import combinations

import pytest
import torch
from torch import Tensor

from trueup.objectives import OBJECTIVES
from trueup.types import Rankings

NAMES = ("bradley_terry", "plackett_luce", "pointwise", "binary")

#: Three rows: four answers of which two tie, a pair with a margin, a single answer.
REWARDS = [[1.2, -0.3, 0.4, 2.0], [0.5, 0.9], [-0.7]]
SCORES = [[4.0, 3.0, 3.0, 1.0], [1.0, 0.0], [0.5]]
MARGIN = [0.0, 0.3, 0.0]


def rankings(rewards=REWARDS, scores=SCORES, margin=MARGIN) -> Rankings:
    width = max(map(len, rewards))

    def padded(rows) -> Tensor:
        return torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows], dtype=torch.float64)

    present = padded([[1.0] * len(row) for row in rewards]).bool()
    return Rankings(padded(rewards), padded(scores), present, torch.tensor(margin, dtype=torch.float64))


def loss(name: str, given: Rankings, **keywords) -> Tensor:
    return OBJECTIVES[name].function(given, **keywords).sum


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def written_out(rewards, scores, margin, score_margin: float, center: float) -> float:
    """Bradley–Terry, one comparison after the other."""
    total = 0.0
    for r, s, m in zip(rewards, scores, margin, strict=True):
        pairs = [(i, j) for i in range(len(r)) for j in range(len(r)) if s[i] > s[j]]
        losses = [-log_sigmoid(r[i] - r[j] - m - score_margin * (s[i] - s[j])) for i, j in pairs]
        centred = [(r[i] + r[j]) ** 2 for i, j in combinations(range(len(r)), 2)]
        total += sum(losses) / max(len(losses), 1) + center * sum(centred) / max(len(centred), 1)
    return total


@pytest.mark.parametrize(("score_margin", "center"), [(0.0, 0.0), (0.2, 0.0), (0.0, 0.01), (0.2, 0.5)])
def test_bradley_terry_is_the_mean_over_a_rows_pairs(score_margin: float, center: float) -> None:
    expected = written_out(REWARDS, SCORES, MARGIN, score_margin, center)
    actual = loss("bradley_terry", rankings(), score_margin=score_margin, center=center)
    assert float(actual) == pytest.approx(expected, abs=1e-8)


#: Pairs of the reference vector, their answers' log-probabilities taken for rewards.
CHOSEN, REJECTED = [-10.0, -20.5, -33.0], [-12.5, -18.0, -41.0]


def test_of_pairs_all_forms_agree_with_trls_formulas() -> None:
    """−log σ(r_w − r_l − m) + c (r_w + r_l)², as TRL's RewardTrainer computes it."""
    pairs = [list(pair) for pair in zip(CHOSEN, REJECTED, strict=True)]
    given = rankings(pairs, [[1.0, 0.0]] * 3, [0.5, 1.0, 0.0])
    chosen, rejected = torch.tensor(CHOSEN).double(), torch.tensor(REJECTED).double()
    expected = -torch.nn.functional.logsigmoid(chosen - rejected - torch.tensor([0.5, 1.0, 0.0]).double()).mean()
    expected += 0.01 * ((chosen + rejected) ** 2).mean()
    for name in ("bradley_terry", "plackett_luce"):
        assert float(loss(name, given, center=0.01)) / 3 == pytest.approx(float(expected), abs=1e-8)


def test_plackett_luce_is_the_likelihood_of_the_order() -> None:
    rewards = [0.3, -1.0, 0.8, 0.1]
    expected = 0.0
    for place in range(3):
        rest = [math.exp(r) for r in rewards[place:]]
        expected -= math.log(rest[0] / sum(rest))
    given = rankings([rewards], [[4.0, 3.0, 2.0, 1.0]], [0.0])
    assert float(loss("plackett_luce", given)) == pytest.approx(expected, abs=1e-8)


def test_tied_answers_may_change_places() -> None:
    given = rankings()
    swapped = dataclasses.replace(given, rewards=given.rewards[:, [0, 2, 1, 3]], present=given.present[:, [0, 2, 1, 3]])
    row = slice(0, 1)
    for name in ("bradley_terry", "plackett_luce"):
        a, b = (dataclasses.replace(g, **{f.name: getattr(g, f.name)[row] for f in dataclasses.fields(g)})
                for g in (given, swapped))  # fmt: skip
        assert float(loss(name, a)) == pytest.approx(float(loss(name, b)), abs=1e-12)


def test_each_answer_by_itself() -> None:
    flat = [(r, s) for rs, ss in zip(REWARDS, SCORES, strict=True) for r, s in zip(rs, ss, strict=True)]
    assert float(loss("pointwise", rankings())) == pytest.approx(sum((r - s) ** 2 for r, s in flat), abs=1e-8)
    labels = [[1.0, 0.0, 0.0, 0.25], [1.0, 0.0], [0.5]]
    flat = [(r, s) for rs, ss in zip(REWARDS, labels, strict=True) for r, s in zip(rs, ss, strict=True)]
    expected = sum(-s * log_sigmoid(r) - (1 - s) * log_sigmoid(-r) for r, s in flat)
    assert float(loss("binary", rankings(scores=labels))) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize(
    ("name", "answers", "expected"),
    [
        ("bradley_terry", 2, math.log(2)),
        ("bradley_terry", 5, math.log(2)),
        ("plackett_luce", 2, math.log(2)),
        ("plackett_luce", 5, math.log(120)),
        ("binary", 2, 2 * math.log(2)),
        ("pointwise", 2, 1.0),
    ],
)
def test_closed_forms_when_all_rewards_are_zero(name: str, answers: int, expected: float) -> None:
    scores = [float(i) for i in reversed(range(answers))]
    given = rankings([[0.0] * answers], [scores], [0.0])
    result = OBJECTIVES[name].function(given)
    assert float(result.sum) == pytest.approx(expected, abs=1e-12)
    if name in ("bradley_terry", "plackett_luce"):
        assert float(result.metrics["accuracy"][0] / result.metrics["accuracy"][1]) == 0.5


@pytest.mark.parametrize("name", NAMES)
def test_gradients_by_finite_differences(name: str) -> None:
    given = rankings(scores=[[1.0, 0.5, 0.5, 0.0], [1.0, 0.0], [0.5]])
    keywords = {"score_margin": 0.2, "center": 0.1} if OBJECTIVES[name].parameters else {}

    def of(rewards: Tensor) -> Tensor:
        return loss(name, dataclasses.replace(given, rewards=rewards), **keywords)

    rewards = given.rewards.clone().requires_grad_()
    assert torch.autograd.gradcheck(of, rewards)
    (gradient,) = torch.autograd.grad(of(rewards), rewards)
    assert gradient[~given.present].abs().sum() == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_row_of_ties_teaches_a_comparison_nothing(name: str) -> None:
    given = rankings([[0.3, 1.0]], [[1.0, 1.0]], [0.0])
    rewards = given.rewards.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(name, dataclasses.replace(given, rewards=rewards)), rewards)
    if name == "bradley_terry":
        assert gradient.abs().sum() == 0
    assert bool(torch.isfinite(gradient).all())


def test_metrics_bear_trls_names() -> None:
    told = OBJECTIVES["bradley_terry"].function(rankings()).metrics
    means = {name: float(total / count) for name, (total, count) in told.items()}
    assert means["accuracy"] == pytest.approx(2 / 6)  # 1.2 over −0.3 and 0.4; not over 2.0, nor 0.5 over 0.9
    assert means["min_reward"] == pytest.approx((-0.3 + 0.5 - 0.7) / 3)
    assert means["max_reward"] == pytest.approx((2.0 + 0.9 - 0.7) / 3)
    assert means["mean_reward"] == pytest.approx(4.0 / 7)
    assert means["margin"] == pytest.approx((1.5 + 0.8 - 0.8 - 2.3 - 1.6 - 0.4) / 6)
