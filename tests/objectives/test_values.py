"""Every objective against independently computed values, finite differences, closed forms and identities."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from tests.objectives.vector import ARGUMENTS, PAIRWISE, UNPAIRED, as_feedback, at_start, evaluate, mean, pairs
from trueup.objectives import OBJECTIVES, pairwise, reference_free, unpaired
from trueup.types import PairLogps, StepValues, TokenLogps

REFERENCE_VALUES = [
    ("sigmoid", {}, 0.6361161933),
    ("sigmoid", {"label_smoothing": 0.1}, 0.6501161933),
    ("robust", {"label_smoothing": 0.1}, 0.6186161933),
    ("hinge", {}, 0.8600000000),
    ("ipo_sum", {}, 21.5000000000),
    ("ipo", {}, 24.5935199872),
    ("exo_pair", {"label_smoothing": 1e-3}, 2.5398390241),
    ("nca_pair", {}, 1.3576122451),
    ("bco_pair", {"shift": 0.0}, 1.3267645376),
    ("sppo_hard", {}, 44.4333333333),
    ("aot", {}, 0.6352207842),
    ("aot_unpaired", {}, 0.6301569967),
    ("apo_zero", {}, 0.9656173322),
    ("apo_down", {}, 0.9810937063),
    ("discopop", {"tau": 0.05}, 0.7311973338),
    ("sigmoid_norm", {}, 0.6908910804),
    ("sigmoid", {"divergence": "forward_kl"}, 0.4800517808),
    ("sigmoid", {"divergence": "js_divergence"}, 0.6397936764),
    ("sigmoid", {"divergence": "alpha_divergence", "coefficient": 0.5}, 0.5336396245),
    ("cpo", {}, 0.5909931686),
    ("simpo", {"beta": 2.0, "gamma": 0.5}, 0.6172360999),
    ("dpop", {"penalty": 5.0}, 0.6729338492),
    ("rdpo", {"alpha": 0.01}, 0.6345307754),
]


@pytest.mark.parametrize(("name", "keywords", "expected"), REFERENCE_VALUES)
def test_reference_values(name: str, keywords: dict, expected: float) -> None:
    assert float(mean(evaluate(name, pairs(), **keywords))) == pytest.approx(expected, abs=1e-8)


def test_reference_value_of_orpos_odds_term() -> None:
    whole = reference_free.orpo(pairs(), beta=1.0).sum - pairwise.chosen_nll(pairs())
    assert float(whole) / 3 == pytest.approx(0.4842500104, abs=1e-8)


@pytest.mark.parametrize(
    ("name", "keywords", "expected"),
    [
        ("kto", {"mismatched": torch.tensor([0.05, 0.05])}, 0.4828188897),
        ("apo_zero_unpaired", {}, 0.4828086661),
    ],
)
def test_reference_values_of_single_answers(name: str, keywords: dict, expected: float) -> None:
    keywords = {key: value.double() if key == "mismatched" else value for key, value in keywords.items()}
    assert float(mean(evaluate(name, pairs(), **keywords), 6)) == pytest.approx(expected, abs=1e-8)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


#: Δ_w, Δ_l and the divergences over the vocabulary of each pair of `vector`, β 0.1.
ROWS = list(zip([1.2, -0.4, 1.0], [1.4, 0.7, -4.5], [0.3, 1.1, 0.7], [1.1, 1.5, 0.7], strict=True))
L_W, L_L = [-10 / 5, -20.5 / 8, -33 / 13], [-12.5 / 6, -18 / 4, -41 / 16]  # mean log-probabilities per token
#: what `losses.md` has a formula for and no value: written out once more, pair by pair.
WRITTEN_OUT = [
    ("tdpo1", {}, [-log_sigmoid(0.1 * (a - c) - 0.1 * (kl - kw)) for a, c, kw, kl in ROWS]),
    ("tdpo2", {"alpha": 0.5}, [-log_sigmoid(0.1 * (a - c) - 0.05 * (kl - kw)) for a, c, kw, kl in ROWS]),
    ("alphapo", {}, [
        -log_sigmoid(2 * ((1 - math.exp(-0.25 * w)) - (1 - math.exp(-0.25 * v))) / 0.25 - 0.5)
        for w, v in zip(L_W, L_L, strict=True)
    ]),
    ("bco_pair", {"shift": 0.4}, [-log_sigmoid(0.1 * a - 0.4) - log_sigmoid(0.4 - 0.1 * c) for a, c, *_ in ROWS]),
    ("simpo", {"label_smoothing": 0.1}, [
        -0.9 * log_sigmoid(m) - 0.1 * log_sigmoid(-m)
        for m in (2 * (w - v) - 0.5 for w, v in zip(L_W, L_L, strict=True))
    ]),
    ("chosen_nll", {}, [-w for w in L_W]),
    ("orpo", {}, [
        -w - 0.1 * log_sigmoid(w - v - math.log(1 - math.exp(w)) + math.log(1 - math.exp(v)))
        for w, v in zip(L_W, L_L, strict=True)
    ]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "keywords", "losses"), WRITTEN_OUT, ids=[row[0] for row in WRITTEN_OUT])
def test_formulas_written_out(name: str, keywords: dict, losses: list[float]) -> None:
    assert float(evaluate(name, pairs(), **keywords).sum) == pytest.approx(sum(losses), abs=1e-8)


def test_formulas_of_single_answers_written_out() -> None:
    """With weights and, in BCO, a shift; the likelihood is of the wanted answers alone."""
    weights = {"desirable_weight": 2.0, "undesirable_weight": 0.5}
    kto = sum(
        2 * (1 - 1 / (1 + math.exp(-0.1 * (a - 0.3)))) + 0.5 * (1 - 1 / (1 + math.exp(-0.1 * (0.3 - c))))
        for a, c, *_ in ROWS
    )
    bco = sum(-2 * log_sigmoid(0.1 * a - 0.4) - 0.5 * log_sigmoid(0.4 - 0.1 * c) for a, c, *_ in ROWS)
    seen = torch.tensor([0.5, 0.1]).double()
    assert float(evaluate("kto", pairs(), mismatched=seen, **weights).sum) == pytest.approx(kto, abs=1e-8)
    assert float(evaluate("bco", pairs(), shift=0.4, **weights).sum) == pytest.approx(bco, abs=1e-8)
    assert float(evaluate("desirable_nll", pairs()).sum) == pytest.approx(-sum(L_W), abs=1e-8)


def test_the_likelihood_of_tokens() -> None:
    logps = torch.tensor([-0.5, -1.25, -2.0], dtype=torch.float64, requires_grad=True)
    given = TokenLogps(logps, torch.tensor([0, 0, 1]), 2)
    loss = OBJECTIVES["sft"].function(given).sum
    loss.backward()
    assert float(loss.detach()) == 3.75
    assert logps.grad is not None and logps.grad.tolist() == [-1.0] * 3


@pytest.mark.parametrize(
    ("name", "keywords", "weights"),
    [
        ("dft", {}, [math.exp(-0.5), math.exp(-1.25), math.exp(-2.0)]),
        ("eaft", {}, [0.1, 0.5, 1.0]),
        ("eaft", {"alpha": 2.0}, [0.01, 0.25, 1.0]),
        ("eaft", {"alpha": 0.0}, [1.0, 1.0, 1.0]),
    ],
)
def test_weighed_likelihoods_and_their_gradients(name: str, keywords: dict, weights: list[float]) -> None:
    """The gradient is that of the sum with its weights held: finite differences of the likelihood, each times its."""
    logps = torch.tensor([-0.5, -1.25, -2.0], dtype=torch.float64, requires_grad=True)
    entropy = torch.tensor([0.3, 1.5, 3.0], dtype=torch.float64)

    def given(values: torch.Tensor) -> TokenLogps:
        return TokenLogps(values, torch.tensor([0, 0, 1]), 2, entropy)

    loss = OBJECTIVES[name].function(given(logps), **keywords)
    (gradient,) = torch.autograd.grad(loss.sum, logps)
    assert float(loss.sum) == pytest.approx(sum(w * -x for w, x in zip(weights, logps.tolist(), strict=True)))
    assert [float(value) for value in loss.metrics["nll"]] == [3.75, 3.0]
    step = 1e-6
    for i, weight in enumerate(weights):
        moved = logps.detach() + step * torch.eye(3, dtype=torch.float64)[i]
        plain = OBJECTIVES["sft"].function
        slope = float(plain(given(moved)).sum - plain(given(logps.detach())).sum) / step
        assert float(gradient[i]) == pytest.approx(weight * slope, rel=1e-6)


@pytest.mark.parametrize("name", [*PAIRWISE, *UNPAIRED])
def test_gradients_by_finite_differences(name: str) -> None:
    # IPO's and SPPO's targets, a hinge's corner and DPOP's are off these values; 0.2 of ε where it is taken.
    keywords = {"label_smoothing": 0.2} if "label_smoothing" in OBJECTIVES[name].parameters else {}
    logps = pairs()

    def loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        return evaluate(name, dataclasses.replace(logps, chosen=chosen, rejected=rejected), **keywords).sum

    assert torch.autograd.gradcheck(loss, (logps.chosen.requires_grad_(), logps.rejected.requires_grad_()))


@pytest.mark.parametrize(
    ("name", "keywords"),
    [
        ("kto", {"mismatched": torch.tensor([0.5, 0.1]).double(), "desirable_weight": 2.0}),
        ("bco", {"shift": 0.4, "undesirable_weight": 0.5}),
        ("bco_pair", {"shift": 0.4}),
        ("sigmoid", {"divergence": "alpha_divergence", "coefficient": 0.2}),
    ],
)
def test_gradients_with_what_a_step_brings(name: str, keywords: dict) -> None:
    """A baseline, a shift, weights of pairs: constants to the gradient."""
    logps = dataclasses.replace(pairs(), weight=torch.tensor([0.2, 1.5, 0.7]).double())

    def loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        return evaluate(name, dataclasses.replace(logps, chosen=chosen, rejected=rejected), **keywords).sum

    assert torch.autograd.gradcheck(loss, (logps.chosen.requires_grad_(), logps.rejected.requires_grad_()))


@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("name", [n for n in PAIRWISE if "divergence" in OBJECTIVES[n].parameters])
def test_gradients_under_other_divergences(name: str, divergence: str) -> None:
    logps = pairs()

    def loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        moved = dataclasses.replace(logps, chosen=chosen, rejected=rejected)
        return evaluate(name, moved, divergence=divergence).sum

    assert torch.autograd.gradcheck(loss, (logps.chosen.requires_grad_(), logps.rejected.requires_grad_()))


@pytest.mark.parametrize("name", ["tdpo1", "tdpo2"])
def test_gradients_of_the_divergence_over_the_vocabulary(name: str) -> None:
    """TDPO₁ moves both sides' divergence, TDPO₂ only the rejected side's."""
    logps = pairs()
    sides = (torch.tensor([0.3, 1.1, 0.7]).double(), torch.tensor([0.9, 0.2, 0.5]).double())

    def loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        return (
            OBJECTIVES[name].function(dataclasses.replace(logps, kl_chosen=chosen, kl_rejected=rejected), beta=0.1).sum
        )

    chosen, rejected = (side.requires_grad_() for side in sides)
    grad_chosen, grad_rejected = torch.autograd.grad(loss(chosen, rejected), (chosen, rejected), allow_unused=True)
    assert grad_rejected.abs().min() > 0
    assert (grad_chosen is None) == (name == "tdpo2")
    if name == "tdpo1":
        assert torch.autograd.gradcheck(loss, sides)


LN2 = math.log(2)
AT_START = {
    "sigmoid": LN2, "robust": LN2, "hinge": 1.0, "ipo": 25.0, "ipo_sum": 25.0, "discopop": 0.5 * LN2 + 0.5,
    "sigmoid_norm": LN2, "dpop": LN2, "tdpo1": LN2, "tdpo2": LN2, "nca_pair": 2 * LN2, "bco_pair": 2 * LN2,
    "sppo_hard": 50.0, "apo_zero": 1.0, "apo_down": 1.0, "aot": LN2, "aot_unpaired": LN2,
    "exo_pair": -LN2 - 0.5 * math.log(1e-3 * (1 - 1e-3)),
}  # fmt: skip


@pytest.mark.parametrize("name", AT_START)
def test_closed_forms_at_the_start(name: str) -> None:
    loss = OBJECTIVES[name].function(at_start(pairs()), **{"beta": 0.1, **ARGUMENTS.get(name, {})})
    assert float(mean(loss)) == pytest.approx(AT_START[name], abs=1e-12)
    means = {key: float(total / count) for key, (total, count) in loss.metrics.items()}
    assert means["rewards/margins"] == 0.0
    assert means["rewards/accuracies"] == 0.5


@pytest.mark.parametrize("name", ["kto", "bco", "apo_zero_unpaired"])
def test_closed_forms_of_single_answers_at_the_start(name: str) -> None:
    logps = as_feedback(at_start(pairs()))
    loss = OBJECTIVES[name].function(logps, beta=0.1, desirable_weight=2.0, undesirable_weight=1.0)
    assert float(loss.sum) == pytest.approx((2 + 1) * 3 * (LN2 if name == "bco" else 0.5), abs=1e-12)
    assert float(loss.metrics["rewards/accuracies"][0]) == 3.0


@pytest.mark.parametrize(
    ("name", "keywords", "expected"),
    [
        ("cpo", {}, LN2), ("simpo", {}, math.log1p(math.exp(0.5))), ("alphapo", {}, math.log1p(math.exp(0.5))),
        ("orpo", {"beta": 0.1}, 0.1 * LN2 + (10 / 5 + 20.5 / 8 + 33 / 13) / 3),
    ],
)  # fmt: skip
def test_closed_forms_of_equal_answers_without_a_reference(name: str, keywords: dict, expected: float) -> None:
    """Where no reference is, no value is known at the start, but what an answer is worth against itself is."""
    logps = pairs()
    same = dataclasses.replace(logps, rejected=logps.chosen, rejected_len=logps.chosen_len)
    assert float(mean(evaluate(name, same, **keywords))) == pytest.approx(expected, abs=1e-12)


def test_rdpo_at_the_start_sees_only_lengths() -> None:
    expected = sum(math.log1p(math.exp(-0.01 * d)) for d in (-1, 4, -3)) / 3
    assert float(mean(evaluate("rdpo", at_start(pairs()), alpha=0.01))) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("tau", [0.05, 0.5])
def test_discopops_slope_at_the_start_has_the_wrong_sign_at_the_published_tau(tau: float) -> None:
    margin = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    zero, one = torch.zeros(1).double(), torch.ones(1).double()
    pairwise.discopop(PairLogps(margin, zero, one, one, zero, zero), beta=1.0, tau=tau).sum.backward()
    assert margin.grad is not None
    assert float(margin.grad) == pytest.approx((1 - math.log(2)) / (4 * tau) - 0.75)
    assert (float(margin.grad) > 0) == (tau == 0.05)


# --- identities --------------------------------------------------------------------------------------------------


def losses_equal(one, other) -> None:
    assert float(one.sum) == pytest.approx(float(other.sum), abs=1e-12)


def test_without_smoothing_cdpo_and_robust_are_dpo() -> None:
    plain = evaluate("sigmoid", pairs())
    losses_equal(evaluate("sigmoid", pairs(), label_smoothing=0.0), plain)
    losses_equal(evaluate("robust", pairs(), label_smoothing=0.0), plain)


def test_aot_is_dpo_when_both_log_ratios_sort_alike() -> None:
    logps = pairs()
    assert logps.ref_chosen is not None
    alike = dataclasses.replace(logps, ref_chosen=logps.ref_chosen + torch.tensor([9.0, 0.0, 30.0]).double())
    order = torch.argsort(alike.chosen - alike.rejected)
    assert torch.equal(order, torch.argsort(alike.ref_chosen - alike.ref_rejected))
    losses_equal(evaluate("aot", alike), evaluate("sigmoid", alike))


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_one_pair_a_step_makes_aot_dpo(name: str) -> None:
    one = PairLogps(*(getattr(pairs(), f.name)[:1] for f in dataclasses.fields(PairLogps)[:6]))
    losses_equal(evaluate(name, one), evaluate("sigmoid", one))


def test_alpha_divergence_1_is_the_reverse_kl() -> None:
    plain = evaluate("sigmoid", pairs())
    losses_equal(evaluate("sigmoid", pairs(), divergence="alpha_divergence", coefficient=1.0), plain)
    near = evaluate("sigmoid", pairs(), divergence="alpha_divergence", coefficient=1 + 1e-5)
    assert float(near.sum) == pytest.approx(float(plain.sum), abs=1e-4)


def test_alpha_divergence_0_is_the_forward_kl() -> None:
    losses_equal(
        evaluate("sigmoid", pairs(), divergence="alpha_divergence", coefficient=0.0),
        evaluate("sigmoid", pairs(), divergence="forward_kl"),
    )


def test_divergences_stay_finite_far_from_the_reference() -> None:
    far = torch.tensor([-500.0, 500.0], requires_grad=True)
    for divergence in ("forward_kl", "js_divergence", "alpha_divergence"):
        slope = pairwise.divergence_slope(far, divergence)
        slope.sum().backward()
        assert torch.isfinite(slope).all() and torch.isfinite(far.grad).all()


def test_alphapo_at_0_is_simpo() -> None:
    losses_equal(evaluate("alphapo", pairs(), alpha=0.0), evaluate("simpo", pairs()))
    near = evaluate("alphapo", pairs(), alpha=1e-6)
    assert float(near.sum) == pytest.approx(float(evaluate("simpo", pairs()).sum), abs=1e-4)


def test_without_penalty_dpop_and_rdpo_are_dpo() -> None:
    losses_equal(evaluate("dpop", pairs(), penalty=0.0), evaluate("sigmoid", pairs()))
    losses_equal(evaluate("rdpo", pairs(), alpha=0.0), evaluate("sigmoid", pairs()))


def test_without_divergence_over_the_vocabulary_tdpo_is_dpo() -> None:
    zero = torch.zeros(3).double()
    logps = dataclasses.replace(pairs(), kl_chosen=zero, kl_rejected=zero)
    for name in ("tdpo1", "tdpo2"):
        losses_equal(OBJECTIVES[name].function(logps, beta=0.1), evaluate("sigmoid", logps))


def test_sums_and_means_are_one_for_answers_of_one_token() -> None:
    one = torch.ones(3).double()
    logps = dataclasses.replace(pairs(), chosen_len=one, rejected_len=one)
    losses_equal(evaluate("ipo", logps), evaluate("ipo_sum", logps))
    losses_equal(evaluate("sigmoid_norm", logps), evaluate("sigmoid", logps))
    losses_equal(evaluate("simpo", logps, beta=0.1, gamma=0.0), evaluate("cpo", logps))


def test_nca_and_bco_on_pairs_are_their_halves() -> None:
    """−log σ(βΔ_w) − log σ(−βΔ_l), and the mean of both signs of each: NCA is half of BCO and half of a pull to 0."""
    logps = pairs()
    assert logps.ref_chosen is not None
    centred = 0.5 * torch.nn.functional.softplus(0.1 * (logps.chosen - logps.ref_chosen)).sum()
    centred = centred + 0.5 * torch.nn.functional.softplus(-0.1 * (logps.chosen - logps.ref_chosen)).sum()
    halved = 0.5 * evaluate("bco_pair", logps).sum + centred
    assert float(evaluate("nca_pair", logps).sum) == pytest.approx(float(halved), abs=1e-12)
    assert float(evaluate("bco", logps).sum) == pytest.approx(float(evaluate("bco_pair", logps).sum), abs=1e-12)


def test_kto_without_baseline_is_apo_zero_unpaired_and_never_uses_a_negative_one() -> None:
    losses_equal(evaluate("kto", pairs()), evaluate("apo_zero_unpaired", pairs()))
    losses_equal(evaluate("kto", pairs(), mismatched=torch.tensor([-3.0, 1.0])), evaluate("kto", pairs()))


def test_apo_zero_is_twice_its_unpaired_form_on_split_pairs() -> None:
    assert float(evaluate("apo_zero", pairs()).sum) == pytest.approx(
        float(evaluate("apo_zero_unpaired", pairs()).sum), abs=1e-12
    )


def test_weights_multiply_losses_pair_by_pair() -> None:
    logps = pairs()
    one_hot = dataclasses.replace(logps, weight=torch.tensor([0.0, 2.0, 0.0]).double())
    second = PairLogps(*(getattr(logps, f.name)[1:2] for f in dataclasses.fields(PairLogps)[:6]))
    assert float(evaluate("hinge", one_hot).sum) == pytest.approx(2 * float(evaluate("hinge", second).sum))


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_a_step_cut_into_pieces_gives_the_whole_steps_loss_and_gradient(name: str) -> None:
    objective = OBJECTIVES[name]
    assert objective.survey is not None
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(7, generator=generator).double() * 5 - 20 for _ in range(4)]

    def of(part: slice) -> PairLogps:
        lengths = torch.ones(7).double()[part]
        return PairLogps(leaf[0][part], leaf[1][part], lengths, lengths, rows[2][part], rows[3][part])

    results = []
    for parts in ([slice(0, 7)], [slice(0, 2), slice(2, 3), slice(3, 7)]):
        leaf = [row.clone().requires_grad_() for row in rows[:2]]
        surveys = [objective.survey(of(part)) for part in parts]
        gathered = {key: torch.cat([survey[key] for survey in surveys]) for key in surveys[0]}
        total = sum(
            objective.function(of(p), beta=0.3, step=StepValues(gathered, torch.arange(7)[p])).sum for p in parts
        )
        results.append((total.detach(), *torch.autograd.grad(total, leaf)))
    for whole, pieces in zip(*results, strict=True):
        assert torch.allclose(whole, pieces, atol=1e-12, rtol=0)


def test_length_weights_cut_the_longer_answers_tail() -> None:
    owner = torch.tensor([0, 0, 0, 1, 2, 3, 3])
    weights = pairwise.length_weights(owner, torch.tensor([3, 1, 1, 2]), alpha=0.25)
    assert weights.tolist() == [1.0, 0.25, 0.25, 1.0, 1.0, 1.0, 0.25]
    assert pairwise.length_weights(owner, torch.tensor([3, 1, 1, 2]), alpha=1.0).tolist() == [1.0] * 7


def test_log1mexp_is_exact_on_both_sides_and_finite_at_certainty() -> None:
    x = torch.tensor([-1e-5, -0.5, -0.7, -3.0, -40.0]).double()
    expected = [math.log(-math.expm1(float(v))) for v in x]
    assert reference_free.log1mexp(x).tolist() == pytest.approx(expected, rel=1e-12)
    certain = torch.zeros(1, requires_grad=True)
    reference_free.log1mexp(certain).sum().backward()
    assert torch.isfinite(certain.grad).all()


# --- known optima ------------------------------------------------------------------------------------------------


def descend(loss, logits: torch.Tensor, steps: int = 3000) -> None:
    optimizer = torch.optim.LBFGS([logits], max_iter=steps, tolerance_grad=1e-12, tolerance_change=1e-16)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


def test_a_tabular_policy_under_dpo_reaches_the_closed_form() -> None:
    """Preferences drawn from a Bradley–Terry model of rewards r lead to π ∝ π_ref exp(r/β)."""
    generator = torch.Generator().manual_seed(3)
    reference = torch.log_softmax(torch.randn(5, generator=generator).double(), 0)
    reward, beta = torch.randn(5, generator=generator).double(), 0.5
    logits = reference.clone().requires_grad_()
    winners, losers = (index.flatten() for index in torch.meshgrid(torch.arange(5), torch.arange(5), indexing="ij"))
    share = torch.sigmoid(reward[winners] - reward[losers])
    ones = torch.ones(25).double()

    def loss() -> torch.Tensor:
        policy = torch.log_softmax(logits, 0)
        logps = PairLogps(
            policy[winners], policy[losers], ones, ones, reference[winners], reference[losers], weight=share
        )
        return pairwise.sigmoid(logps, beta=beta).sum

    descend(loss, logits)
    expected = torch.softmax(reference + reward / beta, 0)
    assert torch.allclose(torch.softmax(logits, 0), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["ipo", "ipo_sum"])
def test_the_margin_under_ipo_reaches_half_of_1_over_beta(name: str) -> None:
    margin = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    zero, one = torch.zeros(1).double(), torch.ones(1).double()
    descend(lambda: OBJECTIVES[name].function(PairLogps(margin, zero, one, one, zero, zero), beta=0.2).sum, margin)
    assert float(margin.detach()) == pytest.approx(1 / (2 * 0.2), abs=1e-6)


def test_bco_with_its_shift_has_the_gradient_of_a_centred_classifier() -> None:
    """δ moves both rewards alike: rewards shifted by δ give the loss of rewards around 0."""
    logps = pairs()
    assert logps.ref_chosen is not None and logps.ref_rejected is not None
    moved = dataclasses.replace(logps, ref_chosen=logps.ref_chosen - 7.0, ref_rejected=logps.ref_rejected - 7.0)
    losses_equal(evaluate("bco_pair", moved, shift=0.7), evaluate("bco_pair", logps, shift=0.0))
    losses_equal(
        unpaired.bco(as_feedback(moved), beta=0.1, shift=0.7), unpaired.bco(as_feedback(logps), beta=0.1, shift=0.0)
    )
