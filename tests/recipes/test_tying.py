"""Embeddings and head on one tensor: whatever trains, what is saved and merged is what was trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.recipes.test_adapter_matrix import logits_of, spied
from trueup.config.load import load_config
from trueup.config.schema import RunConfig
from trueup.inference.model import Model
from trueup.models.load import load_policy, load_tokenizer
from trueup.recipes.run import run

Config = Callable[..., RunConfig]
SHORT = {"stage": "sft", "dataset": "chats", "max_steps": 2, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}


def load(path: Path) -> Model:
    keys = {"model_name_or_path": str(path), "device": "cpu", "bf16": False}
    return Model(load_config(keys, verb="infer"))


def plain_logits(path: Path) -> torch.Tensor:
    """By transformers alone, which ties what the config calls tied."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits


ADAPTED: dict[str, tuple[dict, bool]] = {  # keys; whether head and embeddings are one tensor still
    "neither": ({"lora_target": "q_proj"}, True),
    "adapter on the embeddings": ({"lora_target": "q_proj,embed_tokens"}, False),
    "adapter on the head": ({"lora_target": "q_proj,lm_head"}, False),
    "an adapter on each": ({"lora_target": "q_proj,embed_tokens,lm_head"}, False),
    "whole embeddings": ({"lora_target": "q_proj", "additional_target": "embed_tokens"}, False),
    "whole head": ({"lora_target": "q_proj", "additional_target": "lm_head"}, False),
    "both whole": ({"lora_target": "q_proj", "additional_target": "embed_tokens,lm_head"}, False),
}


@pytest.mark.parametrize("name", ADAPTED)
def test_an_adapter_on_tied_weights_is_saved_and_merged_as_it_was_trained(name, config: Config, tmp_path, monkeypatch):
    keys, tied = ADAPTED[name]
    trained = spied(monkeypatch)
    run(config(**SHORT, **keys))
    out, merged = load(tmp_path / "out"), tmp_path / "merged"
    torch.testing.assert_close(logits_of(out.policy), trained["logits"], atol=1e-5, rtol=0)
    out.merge(merged, torch.float32)
    torch.testing.assert_close(plain_logits(merged), trained["logits"], atol=1e-4, rtol=0)
    assert json.loads((merged / "config.json").read_text(encoding="utf-8"))["tie_word_embeddings"] == tied
    assert ("lm_head.weight" in load_file(merged / "model.safetensors")) != tied


TRAINED: dict[str, dict] = {
    "full": {"finetuning_type": "full"},
    "freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
    "freeze and embeddings": {"finetuning_type": "freeze", "freeze_extra_modules": "embed_tokens"},
    "freeze and head": {"finetuning_type": "freeze", "freeze_extra_modules": "lm_head"},
}


@pytest.mark.parametrize("name", TRAINED)
def test_tied_weights_that_train_stay_one_tensor(name: str, config: Config, tmp_path: Path, monkeypatch):
    cfg = config(**SHORT, **TRAINED[name], lora_rank=None)
    policy = load_policy(cfg.model, cfg.tuning, cfg.train, load_tokenizer(cfg.model)).policy
    before = load_file(Path(str(cfg.model.model_name_or_path)) / "model.safetensors")["model.embed_tokens.weight"]
    tensors = policy.trainable().values()
    assert len({p.data_ptr() for p in tensors}) == len(tensors)  # none is optimised twice
    trained = spied(monkeypatch)
    run(cfg)
    torch.testing.assert_close(plain_logits(tmp_path / "out"), trained["logits"], atol=1e-5, rtol=0)
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert "lm_head.weight" not in saved
    assert torch.equal(saved["model.embed_tokens.weight"], before) == (name == "freeze")
