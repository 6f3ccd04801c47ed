"""A run with `neftune_noise_alpha`: it learns, goes on to the bit, and nothing but its training has noise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.recipes.test_equivalence import program_of, step
from trueup.config.load import load_config
from trueup.config.schema import RunConfig
from trueup.data.forest import build_forest
from trueup.errors import ConfigError
from trueup.recipes.pairs import PairLesson
from trueup.recipes.run import run

Config = Callable[..., RunConfig]
STAGES: dict[str, dict] = {
    "sft": {"stage": "sft", "dataset": "chats"},
    "dpo": {"stage": "dpo"},
    "kto": {"stage": "kto", "dataset": "labels"},
    "rm": {"stage": "rm"},
}


def losses(run: Path, key: str = "loss") -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row[key] for row in rows if key in row]


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_noisy_run_learns_and_goes_on_to_the_bit(stage: str, config: Config, tmp_path: Path):
    keys = {
        **STAGES[stage], "neftune_noise_alpha": 5.0, "per_device_train_batch_size": 24, "max_steps": 4,
        "learning_rate": 3e-3, "lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 2,
        "eval_dataset": "held" if stage == "dpo" else "chats", "eval_strategy": "steps", "eval_steps": 1,
    }  # fmt: skip
    first, again = tmp_path / "first", tmp_path / "again"
    run(config(**keys, output_dir=str(first)))
    run(config(**keys, output_dir=str(again), resume_from_checkpoint=str(first / "checkpoint-2")))
    name = "adapter_model.safetensors"
    assert (first / name).read_bytes() == (again / name).read_bytes()
    assert losses(first)[2:] == losses(again)[-2:]
    if stage == "sft":  # the rows that are learnt from, without noise
        held = losses(first, "eval_loss")
        assert held[-1] < held[0]


@pytest.mark.parametrize("stage", STAGES)
def test_training_has_noise_and_evaluation_has_none(stage: str, config: Config):
    noisy, plain = (program_of(config(**STAGES[stage], neftune_noise_alpha=alpha)) for alpha in (50.0, None))
    for training in (True, False):
        values = []
        for program in (noisy, plain):
            program.train(training)
            torch.manual_seed(0)
            values.append(torch.cat([g.flatten() for g in step(program)[2].values()]))
        assert torch.equal(*values) != training


@pytest.mark.parametrize(
    "keys", [{}, {"precompute_ref_log_probs": False}, {"finetuning_type": "full", "lora_rank": None}]
)
def test_the_reference_has_no_noise(keys: dict, config: Config):
    found = []
    for alpha in (50.0, None):
        program = program_of(config(**keys, neftune_noise_alpha=alpha))
        program.train(True)
        batch = program.micro_batches(0, 0)[0]
        forest = build_forest([program.datasets["train"][i] for i in batch.indices])
        assert isinstance(program.lesson, PairLesson) and program.lesson.references is not None
        found.append(program.lesson.references.token_logps(batch, forest))
    assert torch.equal(*found)


def test_a_rollout_takes_no_noise(config: Config):
    keys = {"model_name_or_path": "m", "dataset": "d", "stage": "grpo", "reward_funcs": "f.py:g"}
    with pytest.raises(ConfigError, match="`neftune_noise_alpha` has no effect"):
        load_config({**keys, "neftune_noise_alpha": 5})
