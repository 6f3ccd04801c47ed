"""Fused layers compute what the layers they replace compute, values and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.models.test_layout import random_rows
from tests.models.tiny import tiny_model
from trueup.data.forest import build_forest
from trueup.models.fused import FusedLora, fuse
from trueup.models.policy import Policy


def adapted(architecture: str, **keys):
    """A tiny model with a LoRA adapter whose B is not zero."""
    torch.manual_seed(0)
    base = tiny_model(architecture)
    base.requires_grad_(False)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear", **keys)
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    return model


def values_and_gradients(model):
    policy = Policy(model.get_base_model(), model)
    assert policy.verify_layout() is None
    logps = policy.token_logps(build_forest(random_rows()))
    parameters = policy.trainable()
    weights = torch.linspace(-1, 1, len(logps))
    return logps, dict(zip(parameters, torch.autograd.grad((logps * weights).sum(), parameters.values()), strict=True))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral", "gemma", "phi3", "glm"])
def test_equals_the_layers_it_replaces(architecture: str) -> None:
    plain = adapted(architecture)
    fused = copy.deepcopy(plain)
    assert fuse(fused) > 0
    assert any(isinstance(module, FusedLora) for module in fused.modules())
    (expected, expected_gradients), (logps, gradients) = map(values_and_gradients, (plain, fused))
    torch.testing.assert_close(logps, expected, atol=1e-5, rtol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], atol=2e-5, rtol=2e-5)


def test_every_layer_of_llama_is_fused() -> None:
    model = adapted("llama")
    layers = model.get_base_model().config.num_hidden_layers
    assert fuse(model) == layers * (7 + 1 + 2) + 1  # projections, MLP, norms; the last norm


def test_dropout_and_several_adapters_are_left_to_peft() -> None:
    model = adapted("llama", lora_dropout=0.5)
    fuse(model)
    layer = next(module for module in model.modules() if isinstance(module, FusedLora))
    x = torch.randn(3, layer.in_features)
    model.train()
    assert layer.single_adapter(x) is None and not torch.equal(layer(x), layer(x))
    model.eval()
    assert layer.single_adapter(x) is not None
    model.add_adapter("second", LoraConfig(r=2, target_modules="all-linear"))
    model.base_model.set_adapter(["default", "second"])
    assert layer.single_adapter(x) is None
    with model.disable_adapter():
        assert layer.single_adapter(x) is None
        torch.testing.assert_close(layer(x), layer.base_layer(x))


def test_full_training_keeps_trained_norms_as_they_are() -> None:
    model = tiny_model("llama").requires_grad_(True)
    assert fuse(model) == model.config.num_hidden_layers  # the MLPs
