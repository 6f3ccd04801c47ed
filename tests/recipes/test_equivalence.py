"""Layouts, micro-batches, processes and references that must not change the result, and the values at step 0."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from trueup.config.schema import RunConfig
from trueup.data.encode import prepare
from trueup.models.load import load_policy, load_tokenizer
from trueup.recipes.batches import plan_batches, train_batches
from trueup.recipes.objective import objective_of
from trueup.recipes.offline import run
from trueup.recipes.program import OfflineProgram
from trueup.recipes.references import build_references
from trueup.recipes.reward import kind_of
from trueup.training.backend import Single
from trueup.training.step import step_totals

Config = Callable[..., RunConfig]


def program_of(cfg: RunConfig) -> OfflineProgram:
    tokenizer = load_tokenizer(cfg.model)
    prepared = prepare(cfg, tokenizer)
    plan, arithmetic = plan_batches(cfg, prepared.train.lengths)
    loaded = load_policy(cfg.model, cfg.tuning, cfg.train, tokenizer, kind=kind_of(cfg))
    references = None
    if objective_of(cfg).needs_reference:
        batches = {"train": train_batches(plan, arithmetic)}
        references = build_references(cfg, loaded, {"train": prepared.train}, batches, Single("cpu"))
    return OfflineProgram(cfg, loaded, tokenizer, prepared, plan, references, Single("cpu"))


def perturb(program: OfflineProgram) -> None:
    """Move off the start, the same way every time."""
    generator = torch.Generator().manual_seed(1)
    for parameter in program.trainable.values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)


def step(
    program: OfflineProgram, micro_batches=None, steps_done: int = 0
) -> tuple[float, dict[str, float], dict[str, torch.Tensor]]:
    """Loss, metrics and summed gradients of the first optimizer step."""
    batches = micro_batches or program.micro_batches(0, 0)
    program.look_ahead(batches, Single("cpu"), steps_done)
    totals = step_totals(program, batches, Single("cpu"))
    for parameter in program.trainable.values():
        parameter.grad = None
    loss_sum, sums = 0.0, {}
    for batch in batches:
        loss, metrics = program.loss(batch, totals)
        loss.backward()
        loss_sum += float(loss)
        for name, (value, count) in metrics.items():
            old = sums.get(name, (0.0, 0.0))
            sums[name] = (old[0] + float(value), old[1] + float(count))
    gradients = {n: p.grad.clone() for n, p in program.trainable.items() if p.grad is not None}
    return loss_sum, {name: value / count for name, (value, count) in sums.items()}, gradients


def assert_same_step(a, b, tolerance: float = 1e-6) -> None:
    assert a[0] == pytest.approx(b[0], rel=tolerance)
    assert a[2].keys() == b[2].keys()
    for name in a[2]:
        difference = (a[2][name] - b[2][name]).norm() / b[2][name].norm().clamp_min(1e-12)
        assert difference <= tolerance * 5, (name, float(difference))
    whole_a, whole_b = (torch.cat([g.flatten() for g in x[2].values()]) for x in (a, b))
    assert (whole_a - whole_b).norm() <= tolerance * whole_b.norm()


# --- values at step 0 -----------------------------------------------------------------------------------------

STARTS = {
    "lora": {},
    "lora over an sft adapter": {"adapter_name_or_path": "{sft}", "lora_rank": 2},
    "sft adapter continued": {"adapter_name_or_path": "{sft}", "lora_target": "q_proj,v_proj"},
    "full": {"finetuning_type": "full"},
    "full over an sft adapter": {"finetuning_type": "full", "model_name_or_path": "{sft}"},
    "freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
    "explicit reference": {"adapter_name_or_path": "{sft}", "ref_model": "{sft}"},
}


@pytest.fixture
def sft_dir(config: Config, tmp_path: Path) -> Path:
    """The output of a short SFT run: a LoRA adapter on q_proj and v_proj."""
    output = tmp_path / "sft"
    run(
        config(
            stage="sft",
            dataset="chats",
            max_steps=3,
            lora_target="q_proj,v_proj",
            output_dir=str(output),
        )
    )
    return output


@pytest.mark.parametrize("precompute", [True, False], ids=["cached", "live"])
@pytest.mark.parametrize("start", STARTS)
def test_at_step_0_the_loss_is_ln_2_and_the_margin_0(
    config: Config, sft_dir: Path, start: str, precompute: bool
) -> None:
    keys = {key: str(value).format(sft=sft_dir) for key, value in STARTS[start].items()}
    if STARTS[start].get("finetuning_type"):
        keys["lora_rank"] = None
    loss, metrics, _ = step(program_of(config(precompute_ref_log_probs=precompute, **keys)))
    assert loss == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["rewards/margins"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["rewards/accuracies"] == pytest.approx(0.5, abs=1e-6)
    assert metrics["kl"] == pytest.approx(0.0, abs=1e-6)


# --- what must not change a step --------------------------------------------------------------------------------


def one_step(cfg: RunConfig) -> tuple[float, dict[str, float], dict[str, torch.Tensor]]:
    program = program_of(cfg)
    perturb(program)
    return step(program)


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize(
    "stage",
    [{"stage": "dpo", "pref_ftx": 0.1}, {"stage": "sft", "dataset": "chats"}],
    ids=["dpo", "sft"],
)
def test_batch_8x1_equals_1x8(config: Config, stage: dict, tuning: str) -> None:
    keys = {**stage, "finetuning_type": tuning, **({"lora_rank": None} if tuning == "full" else {})}
    whole = one_step(config(per_device_train_batch_size=8, **keys))
    pieces = one_step(config(per_device_train_batch_size=1, gradient_accumulation_steps=8, **keys))
    by_tokens = one_step(config(per_device_train_batch_size=8, batch_tokens=96, **keys))
    assert_same_step(pieces, whole)
    assert_same_step(by_tokens, whole)
    assert pieces[1] == pytest.approx(whole[1], rel=1e-5, abs=1e-6)


def test_cached_equals_live_reference(config: Config) -> None:
    assert_same_step(one_step(config()), one_step(config(precompute_ref_log_probs=False)))


@pytest.mark.parametrize("dataset", ["chats", "texts"])
def test_packed_equals_padded(config: Config, dataset: str) -> None:
    """A pack in the forest gives the gradients of its members as right-padded rows through plain attention."""
    stage = "sft" if dataset == "chats" else "pt"
    program = program_of(config(stage=stage, dataset=dataset, packing=True, per_device_train_batch_size=2))
    perturb(program)
    packs = program.micro_batches(0, 0)
    assert max(len(batch.indices) for batch in packs) > 2
    shared = step(program, packs)
    program.policy.shared = False
    program.policy.base.set_attn_implementation(program.policy.plain_attention)
    assert_same_step(shared, step(program, packs), tolerance=2e-6)


def test_packing_changes_rows_per_step_and_loses_no_example(config: Config) -> None:
    program = program_of(config(stage="sft", dataset="chats", packing=True, per_device_train_batch_size=1))
    seen = [i for s in range(program.steps_per_epoch) for b in program.micro_batches(0, s) for i in b.indices]
    assert sorted(seen) == list(range(21))
    sizes = [program.size(b) for s in range(program.steps_per_epoch) for b in program.micro_batches(0, s)]
    assert max(sizes) <= 128


def test_label_smoothing_and_ftx_act(config: Config) -> None:
    plain, smooth, anchored = (
        one_step(config(**keys))[0] for keys in ({}, {"dpo_label_smoothing": 0.2}, {"pref_ftx": 1.0})
    )
    assert len({plain, smooth, anchored}) == 3


def test_lora_dropout_acts_in_preference_stages(config: Config) -> None:
    program = program_of(config(lora_dropout=0.5))
    perturb(program)
    program.train(True)
    first, second = step(program)[0], step(program)[0]
    assert first != second


def test_gradient_checkpointing_changes_nothing(config: Config) -> None:
    assert_same_step(one_step(config(gradient_checkpointing=True)), one_step(config()))
