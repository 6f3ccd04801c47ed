"""`train_from_scratch`: new weights of a model's shape, which the run trains and saves like any others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trueup.config.schema import RunConfig
from trueup.errors import ConfigError
from trueup.models.load import load_for_inference, load_policy, load_tokenizer
from trueup.recipes.run import run

Config = Callable[..., RunConfig]
SCRATCH = {"train_from_scratch": True, "stage": "sft", "dataset": "chats", "finetuning_type": "full", "lora_rank": None}


def weights(cfg: RunConfig) -> dict[str, torch.Tensor]:
    loaded = load_policy(cfg.model, cfg.tuning, cfg.train, load_tokenizer(cfg.model))
    return dict(loaded.policy.base.state_dict())


def test_weights_are_new_follow_the_seed_and_stay_tied(config: Config, tiny_dir: Path):
    stored = load_file(tiny_dir / "model.safetensors")
    first, again, other = (weights(config(**SCRATCH, seed=seed)) for seed in (1, 1, 2))
    name = "model.layers.0.mlp.gate_proj.weight"
    assert first.keys() >= stored.keys() and first[name].shape == stored[name].shape
    assert not torch.equal(first[name], stored[name]) and not torch.equal(first[name], other[name])
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert first["lm_head.weight"].data_ptr() == first["model.embed_tokens.weight"].data_ptr()


def test_what_was_trained_is_what_is_loaded_afterwards(config: Config, tmp_path: Path):
    run(config(**SCRATCH, max_steps=2))
    cfg = config(model_name_or_path=str(tmp_path / "out"))
    base = load_for_inference(cfg.model, cfg.train).base
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(base.state_dict()[name], tensor) for name, tensor in saved.items())


@pytest.mark.parametrize("keys", [{"finetuning_type": "lora"}, {"stage": "dpo", "dataset": "pairs"}])
def test_where_nothing_could_come_of_it_it_is_refused(config: Config, keys: dict):
    with pytest.raises(ConfigError, match="train_from_scratch"):
        config(**SCRATCH | keys)
