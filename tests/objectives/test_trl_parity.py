"""The same values as TRL's own trainers on the same tensors; `make_trl_values.py` and its like say how they were made.

Where TRL differs, it is by choice, and the objective's docstring says so: `ipo_sum`, a running shift in `bco_pair` and
`bco`, the sort of a whole step in `aot`, cDPO's smoothing, LD-DPO on the policy alone, ORPO's likelihood without the
prompt, the mean of a mean in `sft`, ties in online DPO, what PPO's advantages are divided by.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.objectives.test_policy_gradient import LENGTHS, LOGPS, OWNER, REFERENCE
from tests.objectives.vector import as_feedback, evaluate, mean, pairs
from trueup.objectives import OBJECTIVES, pairwise, reference_free, unpaired
from trueup.recipes.collector import Collected
from trueup.recipes.coupling import RunningMean
from trueup.recipes.learners import MicroBatch, OnlineDpo, Ppo
from trueup.recipes.objective import Term, add_up
from trueup.recipes.pairs import PairLesson, pair_logps
from trueup.rollout.rollout import Rollout
from trueup.rollout.sampler import Sampled
from trueup.training.backend import Single
from trueup.types import PairLogps, Rankings


def read(name: str) -> dict:
    return json.loads(Path(__file__).with_name(name).read_text(encoding="utf-8"))


TRL, TRL_ONLINE = read("trl_values.json")["values"], read("trl_online_values.json")["values"]
TRL_PAST, PPO = read("trl_past_values.json")["values"], read("trl_past_values.json")["ppo"]
SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")


SINGLE = ("kto", "apo_zero_unpaired")
FP32 = {"exo_pair": 1e-7}  # TRL takes the logarithms of ε in fp32


@pytest.mark.parametrize("name", [name for name in TRL if name in OBJECTIVES and name not in (*SINGLE, "sft")])
def test_losses(name: str) -> None:
    keywords = {"label_smoothing": 0.1} if name in SMOOTHED else {}
    assert float(mean(evaluate(name, pairs(), **keywords))) == pytest.approx(TRL[name], abs=FP32.get(name, 1e-8))


@pytest.mark.parametrize("name", [*SINGLE, "kto+weights"])
def test_losses_of_single_answers(name: str) -> None:
    keywords: dict = {"mismatched": torch.full((6,), 0.05).double()} if "kto" in name else {}
    if name.endswith("weights"):
        keywords |= {"desirable_weight": 2.0, "undesirable_weight": 0.5}
    value = mean(evaluate(name.split("+")[0], pairs(), **keywords), 6)
    assert float(value) == pytest.approx(TRL[name], abs=1e-8)


@pytest.mark.parametrize("name", [name for name in TRL if name.endswith(("forward_kl", "_divergence"))])
def test_losses_under_other_divergences(name: str) -> None:
    """TRL computes the alpha divergence in fp32."""
    loss, divergence = name.split("+")
    tolerance = {"rel": 1e-6} if divergence == "alpha_divergence" else {"abs": 1e-8}
    assert float(mean(evaluate(loss, pairs(), divergence=divergence))) == pytest.approx(TRL[name], **tolerance)


def token_values(chosen: torch.Tensor, rejected: torch.Tensor, logps: PairLogps) -> torch.Tensor:
    """[N], an answer's t-th of n tokens having t / (1 + … + n) of its log-probability."""
    parts = []
    for total, length in zip(
        interleaved(chosen, rejected), interleaved(logps.chosen_len, logps.rejected_len), strict=True
    ):
        number = torch.arange(1, int(length) + 1).double()
        parts.append(total * number / number.sum())
    return torch.cat(parts)


def interleaved(chosen: torch.Tensor, rejected: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.stack([chosen, rejected], 1).flatten())


@pytest.mark.parametrize("name", [name for name in TRL if name.endswith("+ld")])
def test_length_desensitised_losses(name: str) -> None:
    """The tokens beyond the shorter answer's length count 0.3, of policy and reference."""
    logps = pairs()
    assert logps.ref_chosen is not None and logps.ref_rejected is not None
    policy = token_values(logps.chosen, logps.rejected, logps).float()  # a run sums tokens in fp32
    reference = token_values(logps.ref_chosen, logps.ref_rejected, logps).float()
    lengths = torch.stack(interleaved(logps.chosen_len, logps.rejected_len)).long()
    owner = torch.repeat_interleave(torch.arange(6), lengths)
    lesson = SimpleNamespace(objective=SimpleNamespace(ld_alpha=0.3, ld_reference=True))
    plain = pair_logps(owner, policy, reference, 6)
    reweighed = PairLesson._reweighed(lesson, plain, owner, policy, reference)  # type: ignore[arg-type]
    assert float(mean(evaluate(name.split("+")[0], reweighed))) == pytest.approx(TRL[name], rel=2e-6)


def test_a_weighted_sum_of_losses() -> None:
    weights = {"sigmoid": 0.8, "bco_pair": 0.2}
    terms = [Term(name, OBJECTIVES[name], weight, {"beta": 0.1}) for name, weight in weights.items()]
    total = add_up(terms, [evaluate(name, pairs()) for name in weights], {"pairs": 3.0})
    assert float(total) == pytest.approx(TRL["sigmoid+bco_pair"], abs=1e-8)


def test_the_chosen_answers_likelihood_token_by_token() -> None:
    """TRL's mean over the tokens of a batch is ours over answers, each weighed by its length."""
    logps = pairs()
    one_by_one = [
        float(pairwise.chosen_nll(PairLogps(*(getattr(logps, f.name)[i : i + 1] for f in FIELDS)))) for i in range(3)
    ]
    lengths = logps.chosen_len.tolist()
    weighed = sum(n * value for n, value in zip(lengths, one_by_one, strict=True)) / sum(lengths)
    assert weighed == pytest.approx(TRL["sft"], abs=1e-8)


FIELDS = dataclasses.fields(PairLogps)[:4]


@pytest.mark.parametrize(
    ("name", "margin", "center"),
    [("reward", [0.0] * 3, 0.0), ("reward+margin", [0.5, 0.0, 1.5], 0.0), ("reward+centred", [0.0] * 3, 0.01)],
)
def test_reward_models(name: str, margin: list[float], center: float) -> None:
    rewards = torch.stack([pairs().chosen, pairs().rejected], 1)
    scores = torch.tensor([1.0, 0.0]).double().expand(3, 2)
    given = Rankings(rewards, scores, torch.ones(3, 2).bool(), torch.tensor(margin).double())
    result = OBJECTIVES["bradley_terry"].function(given, score_margin=0.0, center=center)
    assert float(result.sum) / 3 == pytest.approx(TRL[name], abs=1e-8)


def test_smoothed_cpo() -> None:
    assert float(mean(evaluate("cpo", pairs(), label_smoothing=0.1))) == pytest.approx(TRL["cpo+smoothing"], abs=1e-8)


def test_odds_ratio_term() -> None:
    """TRL computes it in fp32."""
    whole = reference_free.orpo(pairs(), beta=1.0).sum - pairwise.chosen_nll(pairs())
    assert float(whole) / 3 == pytest.approx(TRL["orpo_odds"], abs=1e-7)


@pytest.mark.parametrize("name", ["sigmoid", "hinge"])
def test_weights_of_pairs(name: str) -> None:
    """Σ_v π(v)² was e^−0.3 at every token."""
    logps = pairs()
    weight = torch.exp(logps.chosen / logps.chosen_len + logps.rejected / logps.rejected_len + 0.6)
    weighed = dataclasses.replace(logps, weight=weight)
    assert float(mean(evaluate(name, weighed))) == pytest.approx(TRL[f"{name}+weighting"], abs=1e-8)


def test_bco_on_single_answers_at_a_given_shift() -> None:
    """TRL has a step's own rewards in its running mean; ours has those of the steps before, so the shift is given."""
    logps = as_feedback(pairs())
    assert float(unpaired.bco(logps, beta=0.1).sum) / 6 == pytest.approx(TRL_PAST["bco"], abs=1e-8)
    seen = RunningMean(Single("cpu"))
    for step, moved in enumerate([0.0, 6.0]):
        now = dataclasses.replace(logps, answer=logps.answer + moved * logps.desirable)
        seen.see(0.1 * (now.answer - now.reference))
        seen.fold()
        assert seen.mean == pytest.approx(TRL_PAST[f"bco delta {step}"], abs=1e-7)  # TRL's is fp32
        loss = unpaired.bco(now, beta=0.1, shift=seen.mean)
        assert float(loss.sum) / 6 == pytest.approx(TRL_PAST[f"bco loss {step}"], abs=1e-7)


def rollout_of(lengths: list[int], num_answers: int, **tokens) -> Rollout:
    """Answers of these lengths with per-token values."""
    drawn = [Sampled(np.ones(n, dtype=np.int32), np.zeros(n, dtype=np.float32), 0.0, True) for n in lengths]
    groups = [drawn[i : i + num_answers] for i in range(0, len(drawn), num_answers)]
    rollout = Rollout.of(0, 0, np.arange(len(groups)), groups)
    for name, values in tokens.items():
        rollout.put(name, list(range(len(lengths))), np.asarray(values, dtype=np.float64).reshape(-1))
    rollout.tokens["sampled"] = np.zeros(len(rollout.ids_T), dtype=np.float32)
    return rollout


def test_online_dpo() -> None:
    rollout = rollout_of(LENGTHS, 2, reference=REFERENCE)
    rollout.rewards_S = np.array([0.3, 1.0, 2.0, -1.0])
    learner = OnlineDpo(
        SimpleNamespace(objective=SimpleNamespace(pref_beta=0.1)), SimpleNamespace(judge=None), Single()
    )
    learner.appraise(Collected(rollout, [], np.zeros((4, 0)), {}))
    loss = learner.loss(MicroBatch(rollout, rollout.answers_of([0, 1]), OWNER, LOGPS, None))
    assert float(loss.sum) / 2 == pytest.approx(TRL_ONLINE["online_dpo 0.1"], abs=1e-7)  # a rollout is fp32


def test_ppo_from_rewards_to_losses() -> None:
    """TRL whitens by the unbiased deviation: its policy loss is ours times √((N − 1)/N), N tokens."""
    online = SimpleNamespace(
        ppo_clip_ratio=0.2, ppo_clip_ratio_high=0.2, ppo_gamma=0.97, ppo_lambda=0.9, ppo_value_coeff=0.1,
        ppo_value_clip=0.2, ppo_whiten_rewards=False, ppo_kl_coeff=0.05, ppo_target=None, ppo_score_norm=False,
    )  # fmt: skip
    rollout = rollout_of([4, 4, 4], 1, **{name: PPO[name] for name in ("old", "reference", "values")})
    rollout.rewards_S = np.array(PPO["scores"])
    learner = Ppo(SimpleNamespace(online=online))
    told = learner.appraise(Collected(rollout, [], np.zeros((3, 0)), {"entropy": (0.0, 1.0)}))
    logps, values = (torch.tensor(rows).double().flatten() for rows in (PPO["new"], PPO["new_values"]))
    owner = torch.arange(3).repeat_interleave(4)
    loss = learner.loss(MicroBatch(rollout, [0, 1, 2], owner, logps, values))
    found = {name: float(total) / float(count) for name, (total, count) in {**told, **loss.metrics}.items()}
    unbiased = (11 / 12) ** 0.5
    found["loss/policy_avg"] *= unbiased
    found["loss"] = found["loss/policy_avg"] + 0.1 * found["loss/value_avg"]
    assert float(loss.sum) / 12 == pytest.approx(found["loss/policy_avg"] / unbiased + 0.1 * found["loss/value_avg"])
    expected = {name.removeprefix("ppo "): value for name, value in TRL_PAST.items() if name.startswith("ppo ")}
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-6)
