"""Objectives in a run: what must not change a step, what a checkpoint holds, what each option does."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.recipes.test_equivalence import assert_same_step, perturb, program_of, step
from tests.recipes.test_runs import assert_same_bits, metrics
from tests.training.processes import needs_fork, run_ranks
from trueup.config.schema import RunConfig
from trueup.data.encode import prepare
from trueup.models.distributions import log_collisions, vocabulary_kl
from trueup.models.load import load_tokenizer
from trueup.recipes.feedback import crossed, partners, tell_balance
from trueup.recipes.objective import describe_objective, terms_of
from trueup.recipes.offline import run
from trueup.recipes.program import OfflineProgram
from trueup.recipes.reported import metric_names
from trueup.training.backend import Single

Config = Callable[..., RunConfig]
KTO = {"stage": "kto", "dataset": "labels"}
MIXED = {"dataset": "pairs,knowledge", "knowledge_weight": 0.5}
#: one of each kind of need: coupled, with a running mean, with distributions, several terms, two kinds of row, a
#: reference that moves.
KINDS = {
    "aot": {"pref_loss": "aot", "learning_rate": 0.1},  # far enough for policy and reference to rank pairs differently
    "aot_unpaired": {"pref_loss": "aot_unpaired"},
    "bco_pair": {"pref_loss": "bco_pair", "pref_beta": 0.3},  # at its own 0.01 the shift is hardly felt
    "tdpo2": {"pref_loss": "tdpo2"},
    "weighting": {"use_weighting": True},
    "several": {"pref_loss": "sigmoid,bco_pair,sft", "loss_weights": "0.8,0.2,1", "pref_beta": 0.1},
    "coupled and with distributions": {"pref_loss": "aot,tdpo2"},
    "bco weight": {"pref_bco_weight": 0.5, "pref_ftx": 0.1},
    "length": {"ld_alpha": 0.3},
    "orpo": {"stage": "orpo"},
    "kto": KTO,
    "bco": {**KTO, "pref_loss": "bco", "pref_ftx": 0.2},
    "knowledge": MIXED,
    "coupled knowledge": {**MIXED, "pref_loss": "aot"},
    "moving reference": {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.6},
}
#: what two processes are tried with in the normal tests; the others with `make prove`.
TRIED = ("aot", "bco_pair", "kto", "coupled knowledge", "moving reference")


def move_far(program: OfflineProgram) -> None:
    """So far that policy and reference rank pairs differently."""
    for _ in range(5):
        perturb(program)


def second_step(cfg: RunConfig):
    """The second step, after a move: running means have seen something by then."""
    program = program_of(cfg)
    move_far(program)
    step(program)
    return step(program, program.micro_batches(0, 1), steps_done=1)


@pytest.mark.parametrize("name", KINDS)
def test_no_objective_depends_on_how_a_step_is_cut(config: Config, name: str) -> None:
    whole = second_step(config(per_device_train_batch_size=8, **KINDS[name]))
    pieces = second_step(config(per_device_train_batch_size=2, gradient_accumulation_steps=4, **KINDS[name]))
    assert_same_step(pieces, whole, tolerance=2e-6)
    assert pieces[1] == pytest.approx(whole[1], rel=1e-5, abs=1e-5)


def test_without_the_step_as_a_whole_aot_would_depend_on_it(config: Config) -> None:
    """The test above can fail: sorting each micro-batch for itself is another loss."""
    cut = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "pref_loss": "aot"}
    program = program_of(config(**cut))
    move_far(program)
    whole = step(program)[0]
    program.lesson.surveyed = []
    assert step(program)[0] != pytest.approx(whole, rel=1e-4)


@needs_fork
@pytest.mark.parametrize("name", [n if n in TRIED else pytest.param(n, marks=pytest.mark.prove) for n in KINDS])
def test_two_processes_equal_one(config: Config, tmp_path: Path, name: str) -> None:
    keys = {"max_steps": 3, "learning_rate": 1e-2, "eval_strategy": "no", **KINDS[name]}
    keys["eval_dataset"] = "held_labels" if keys.get("stage") == "kto" else "held"
    run(config(**keys, per_device_train_batch_size=4, output_dir=str(tmp_path / "one")))
    two = config(**keys, per_device_train_batch_size=1, gradient_accumulation_steps=2, output_dir=str(tmp_path / "two"))
    assert run_ranks(lambda: run(two)) == [0, 0]
    for one, other in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-5)
    results = [json.loads((tmp_path / d / "eval_results.json").read_text("utf-8")) for d in ("one", "two")]
    assert results[1]["eval_loss"] == pytest.approx(results[0]["eval_loss"], rel=1e-4)


@pytest.mark.parametrize(
    "keys",
    [
        {"pref_loss": "bco_pair"},
        {"sync_ref_model": True, "ref_model_sync_steps": 2},
        {"sync_ref_model": True, "ref_model_sync_steps": 3, "finetuning_type": "full", "lora_rank": None},
        KTO,
        {**KTO, "pref_loss": "bco"},
    ],
    ids=["running mean", "moving reference", "moving reference, full", "kto", "bco"],
)
def test_resume_at_k_equals_uninterrupted_to_the_bit(config: Config, tmp_path: Path, keys: dict) -> None:
    """At a step where the reference moves, and at one where it does not; over the end of an epoch."""
    keys = {**keys, "save_strategy": "steps", "save_steps": 2, "max_steps": 8, "learning_rate": 1e-2,
            "per_device_train_batch_size": 4}  # fmt: skip
    run(config(**keys, output_dir=str(tmp_path / "whole")))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for step_number in (8, 6):
        shutil.rmtree(tmp_path / "cut" / f"checkpoint-{step_number}")
    run(config(**keys, output_dir=str(tmp_path / "cut"), resume_from_checkpoint="auto"))
    assert_same_bits(tmp_path / "whole", tmp_path / "cut")
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "cut")


# --- references ----------------------------------------------------------------------------------


def test_a_moving_reference_mixes_and_leaves_the_policy_alone(config: Config) -> None:
    program = program_of(config(sync_ref_model=True, ref_model_mixup_alpha=0.25))
    start = {name: p.detach().clone() for name, p in program.trainable.items()}
    assert step(program)[0] == pytest.approx(math.log(2), abs=1e-6)
    perturb(program)
    moved = {name: p.detach().clone() for name, p in program.trainable.items()}
    assert step(program, steps_done=1)[0] != pytest.approx(math.log(2), abs=1e-4)
    program.lesson.look_ahead([], Single("cpu"), 512)
    reference = program.lesson.references.live
    for name, past in reference.past.items():
        torch.testing.assert_close(past, 0.75 * start[name] + 0.25 * moved[name])
        assert torch.equal(program.trainable[name], moved[name])


def test_a_reference_that_follows_wholly_brings_the_loss_back_to_ln_2(config: Config) -> None:
    program = program_of(config(sync_ref_model=True, ref_model_mixup_alpha=1.0, ref_model_sync_steps=1))
    perturb(program)
    assert step(program, steps_done=1)[0] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("name", ["tdpo1", "tdpo2"])
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_token_level_dpo_starts_at_ln_2_without_divergence(config: Config, name: str, tuning: str) -> None:
    keys = {"finetuning_type": tuning, **({"lora_rank": None} if tuning == "full" else {})}
    loss, told, _ = step(program_of(config(pref_loss=name, **keys)))
    assert loss == pytest.approx(math.log(2), abs=1e-6)
    assert told["kl_vocabulary/rejected"] == pytest.approx(0, abs=1e-5)


def test_distributions_in_chunks_are_those_of_whole_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    head, other = (torch.randn(11, 6, generator=generator).double() for _ in range(2))
    hidden = torch.randn(5, 6, generator=generator).double().requires_grad_()
    reference = torch.randn(5, 6, generator=generator).double()

    def project(rows: torch.Tensor) -> torch.Tensor:
        return rows @ head.T

    p = torch.log_softmax(project(hidden), 1)
    q = torch.log_softmax(reference @ other.T, 1)
    torch.testing.assert_close(log_collisions(hidden, project, chunk=2), (2 * p).exp().sum(1).log().detach())
    found = vocabulary_kl(reference, lambda rows: rows @ other.T, hidden, project, chunk=2)
    torch.testing.assert_close(found, torch.nn.functional.kl_div(p, q, reduction="none", log_target=True).sum(1))
    assert torch.autograd.gradcheck(
        lambda h: vocabulary_kl(reference, lambda rows: rows @ other.T, h, project, chunk=2), hidden
    )


# --- options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys",
    [
        {"ld_alpha": 0.5}, {"use_weighting": True}, {"f_divergence_type": "js_divergence"}, {"pref_bco_weight": 0.5},
        {"f_divergence_type": "alpha_divergence"}, {"ld_alpha": 0.5, "ld_reference": False},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.1}, {"pref_beta": 0.3},
    ],
)  # fmt: skip
def test_every_option_of_dpo_acts(config: Config, keys: dict) -> None:
    plain, changed = (program_of(config(**k)) for k in ({}, keys))
    for program in (plain, changed):
        perturb(program)
    one, other = step(plain)[2], step(changed)[2]
    assert any(not torch.allclose(one[name], other[name], rtol=1e-3) for name in one)


def test_length_desensitising_keeps_the_margin_at_0_unless_the_reference_is_left_out(config: Config) -> None:
    assert step(program_of(config(ld_alpha=0.3)))[1]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert abs(step(program_of(config(ld_alpha=0.3, ld_reference=False)))[1]["rewards/margins"]) > 1e-3
    assert step(program_of(config(ld_alpha=1.0, ld_reference=False)))[0] == pytest.approx(math.log(2), abs=1e-6)


def test_weights_of_pairs_have_no_gradient_of_their_own(config: Config) -> None:
    """At the start every pair's DPO gradient is scaled by its weight, and nothing else."""
    program = program_of(config(use_weighting=True, per_device_train_batch_size=1))
    _, told, gradient = step(program)
    _, _, plain = step(program_of(config(per_device_train_batch_size=1)))
    moved = [name for name in plain if plain[name].abs().max() > 0]
    for name in moved:
        torch.testing.assert_close(gradient[name], told["weights"] * plain[name], rtol=1e-3, atol=1e-7)


MIXES = {
    "mpo": ({"pref_loss": "sigmoid,bco_pair,sft", "loss_weights": "0.8,0.2,1"}, {"sigmoid": 0.8, "bco_pair": 0.2}, 1.0),
    "dpo with a likelihood": ({"pref_ftx": 0.4}, {"sigmoid": 1.0}, 0.4),
    "cpo-simpo": ({"pref_loss": "simpo", "pref_ftx": 0.7, "pref_beta": 2.0}, {"simpo": 1.0}, 0.7),
    "cpo": ({"stage": "cpo"}, {"cpo": 1.0}, 1.0),
    "bco weight": ({"pref_bco_weight": 0.5}, {"sigmoid": 2 / 3, "bco_pair": 1 / 3}, 0.0),
}


@pytest.mark.parametrize("name", MIXES)
def test_a_mixed_objective_is_the_weighted_sum_of_its_parts(config: Config, name: str) -> None:
    keys, parts, likelihood = MIXES[name]

    def first_step(**keys):
        program = program_of(config(**keys))
        perturb(program)
        return step(program)

    loss, told, gradient = first_step(**{"pref_beta": 0.1, **keys})
    apart = {n: first_step(pref_loss=n, pref_beta=keys.get("pref_beta", 0.1), pref_ftx=0.0) for n in parts}
    anchor = likelihood * told["sft_loss"] if likelihood else 0.0
    assert loss == pytest.approx(sum(w * apart[n][0] for n, w in parts.items()) + anchor, rel=1e-5)
    if not likelihood:
        for key, value in gradient.items():
            torch.testing.assert_close(value, sum(w * apart[n][2][key] for n, w in parts.items()), rtol=1e-3, atol=1e-6)


def test_length_desensitising_by_1_is_dpo(config: Config) -> None:
    plain, whole = (program_of(config(**keys)) for keys in ({}, {"ld_alpha": 1.0}))
    for program in (plain, whole):
        perturb(program)
    assert_same_step(step(whole), step(plain))


def test_knowledge_rows_add_their_likelihood_over_the_steps_tokens(config: Config) -> None:
    program = program_of(config(per_device_train_batch_size=42, **MIXED))
    loss, told, _ = step(program)
    assert loss == pytest.approx(math.log(2) + 0.5 * told["knowledge_loss"], rel=1e-5)
    plain = step(program_of(config(stage="sft", dataset="chats", per_device_train_batch_size=21)))
    assert told["knowledge_loss"] == pytest.approx(plain[0], rel=1e-5)


def test_a_step_of_knowledge_alone_is_a_step(config: Config) -> None:
    program = program_of(config(disable_shuffling=True, per_device_train_batch_size=7, **MIXED))
    pairs_only, knowledge_only = step(program), step(program, program.micro_batches(0, 5), steps_done=5)
    assert pairs_only[0] == pytest.approx(math.log(2), abs=1e-6)
    assert set(knowledge_only[1]) == {"knowledge_loss"} and math.isfinite(knowledge_only[0])


# --- single answers --------------------------------------------------------------------------------


def test_partners_are_other_rows_and_change_with_the_epoch() -> None:
    for count in (2, 3, 17):
        other = partners(np.arange(count), seed=5, epoch=0)
        assert sorted(other) == list(range(count)) and not (other == np.arange(count)).any()
    rows = np.arange(17)
    assert not np.array_equal(partners(rows, 5, 0), partners(rows, 5, 1))
    assert np.array_equal(partners(rows, 5, 1), partners(rows, 5, 1))


def test_partners_have_another_prompt_where_there_is_one() -> None:
    for prompts in ([0, 0, 1, 1, 2, 2], [0, 1, 2, 0, 1, 0], [0, 0, 0, 1]):
        for epoch in range(5):
            other = partners(np.array(prompts), 5, epoch)
            assert not (np.array(prompts)[other] == prompts).any()
            assert sorted(other) == list(range(len(prompts))) or prompts == [0, 0, 0, 1]
    assert not (partners(np.zeros(4, dtype=int), 5, 0) == np.arange(4)).any()


@pytest.mark.parametrize("keys", [{"pref_loss": "aot"}, KTO], ids=["aot", "kto"])
def test_a_look_at_the_whole_step_draws_no_dropout(config: Config, keys: dict) -> None:
    program = program_of(config(**keys, lora_dropout=0.5))
    move_far(program)
    program.lesson.policy.model.train()

    def seen() -> list:
        program.look_ahead([b for i in (0, 1) for b in program.micro_batches(0, i)], Single("cpu"), 0)
        if keys is KTO:
            return program.lesson.mismatched.tolist()
        return [v.tolist() for coupled in program.lesson.step.values() for v in coupled["aot"].values.values()]

    first = seen()
    assert first and first == seen() and program.lesson.policy.model.training


def test_the_shift_of_bco_is_of_the_rewards_in_its_loss(config: Config) -> None:
    program = program_of(config(pref_loss="bco_pair", ld_alpha=0.0, ld_reference=False))
    told = step(program)[1]
    program.look_ahead([], Single("cpu"), 1)
    assert program.lesson.shift.mean == pytest.approx((told["rewards/chosen"] + told["rewards/rejected"]) / 2, rel=1e-4)


@pytest.mark.parametrize("keys", [{"pref_loss": "bco_pair"}, {**KTO, "pref_loss": "bco"}], ids=["pairs", "feedback"])
def test_an_evaluation_sees_one_shift_before_and_after_a_checkpoint(config: Config, keys: dict) -> None:
    program = program_of(config(**keys))
    move_far(program)
    step(program)
    seen = []
    for _ in range(2):
        program.look_ahead([], Single("cpu"), None)
        seen.append(program.lesson.shift.mean)
        program.state_dict()
    assert seen[0] == seen[1] != 0


def test_a_crossed_row_fits_the_cutoff(config: Config) -> None:
    cfg = config(**KTO)
    train = prepare(cfg, load_tokenizer(cfg.model)).train
    row = crossed(train[0], train[1], cutoff=len(train[0].prompt) + 2)
    assert len(row.answers[0].ids) == 2 and np.array_equal(row.prompt, train[0].prompt)
    assert row.answers[0].ids.tolist() == train[1].answers[0].ids[:2].tolist()


def test_the_baseline_of_kto_is_the_steps_mean_over_mismatched_pairs(config: Config) -> None:
    program = program_of(config(**KTO))
    assert step(program)[1]["kl_mismatched"] == 0.0
    perturb(program)
    program.look_ahead(program.micro_batches(0, 0), Single("cpu"), 0)
    first = program.lesson.mismatched
    program.look_ahead(program.micro_batches(0, 0), Single("cpu"), program.steps_per_epoch)
    assert len(first) == 4 and not torch.equal(first, program.lesson.mismatched)


def test_labels_out_of_balance_are_said_with_weights_that_mend_it(config: Config, caplog) -> None:
    cfg = config(**KTO)
    train = prepare(cfg, load_tokenizer(cfg.model)).train
    tell_balance(cfg, train)
    assert not caplog.records
    tell_balance(config(**KTO, kto_chosen_weight=3.0), train)
    assert "kto_chosen_weight between 1.00 and 1.33" in caplog.messages[-1]
    assert "kto_rejected_weight between 2.25 and 3.00" in caplog.messages[-1]


# --- what a user is told -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_the_names_told_before_a_run_are_those_it_reports(config: Config, name: str) -> None:
    cfg = config(**KINDS[name])
    assert set(metric_names(cfg)) - {"loss"} >= set(step(program_of(cfg))[1])


def test_the_header_names_what_is_trained(config: Config) -> None:
    told = {name: describe_objective(config(**KINDS[name])) for name in KINDS}
    assert told["several"] == "dpo: 0.8 sigmoid + 0.2 bco_pair + 1 sft (beta 0.1)"
    assert told["orpo"] == "orpo: orpo (beta 0.1)"
    assert told["bco weight"] == "dpo: sigmoid (beta 0.1, pref_ftx 0.1, pref_bco_weight 0.5)"
    assert describe_objective(config(stage="simpo")) == "simpo: simpo (beta 2.0, gamma 1.0)"


def test_an_added_bco_loss_makes_a_mean_as_llama_factory_does(config: Config) -> None:
    terms = terms_of(config(pref_bco_weight=1.0, pref_ftx=0.5))
    assert [(term.name, term.weight) for term in terms] == [("sigmoid", 0.5), ("bco_pair", 0.5), ("pref_ftx", 0.5)]
