"""Fused layers tried on a first layer: what agrees is taken unless clearly slower, and nothing is left behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.models.test_booster import boosted
from tests.models.tiny import tiny_model
from trueup.models import trial
from trueup.models.fused import fuse, fused_modules
from trueup.models.policy import Policy
from trueup.models.trial import Trial, first_layer, trial_tokens, try_layer

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def every_model_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "WORTHWHILE", 0)


def tried(policy: Policy) -> Trial:
    layer = first_layer(policy)
    assert layer is not None
    return try_layer(policy, layer, 16)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_fused_layers_agree_with_the_models_own(name: str, dtype: torch.dtype) -> None:
    policy, _ = boosted(name, "fused", dtype)
    found = tried(policy)
    assert found.agrees
    assert len(found.seconds) >= 1


def test_nothing_is_left_behind() -> None:
    policy, _ = boosted("llama", "fused")
    for parameter in policy.trainable().values():
        nn.init.zeros_(parameter)
    classes = [type(module) for module in policy.model.modules()]
    modes = [module.training for module in policy.model.modules()]
    state = torch.get_rng_state()
    tried(policy)
    assert [type(module) for module in policy.model.modules()] == classes
    assert [module.training for module in policy.model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(not p.any() and p.grad is None for p in policy.trainable().values())


class LlamaMLP(nn.Module):
    """A model's code may call another formula by that name."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1.1 * self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def test_another_formula_under_a_known_name_is_found_out() -> None:
    base = tiny_model("llama", std=0.05).requires_grad_(False)
    for layer in base.get_decoder().layers:
        layer.mlp.__class__ = LlamaMLP
    policy = Policy(base)
    fuse(base)
    assert policy.verify_layout() is None  # which compares fused layers with fused layers
    found = tried(policy)
    assert not found.agrees
    assert not found.fused
    assert found.seconds == ()


def test_fused_layers_are_given_up_only_where_they_are_clearly_slower() -> None:
    def of(*ratios: float) -> Trial:
        return Trial(16, 0.0, 1e-4, tuple((ratio, 1.0) for ratio in ratios))

    assert of(0.9, 0.8, 0.9, 0.9, 0.9).fused
    assert of(1.02, 1.03, 1.0, 1.04, 1.02).fused
    assert of(1.3, 1.3, 1.3, 1.0, 1.0).fused
    assert not of(1.3, 1.3, 1.3, 1.2, 1.1).fused
    assert of(1.3, 1.3).fused  # no verdict
    assert of(1.3, 1.3).ratio is None
    busy = Trial(16, 0.0, 1e-4, ((2.0, 1.5), (1.4, 1.2), (1.0, 1.0), (3.0, 2.0), (1.9, 1.0)))
    assert sorted(busy.ratios)[1] > trial.MARGIN  # nearly all pairs say so, but the fastest passes are alike
    assert busy.fused


def test_a_trial_stays_short() -> None:
    small, large = nn.Linear(10, 10), nn.Linear(20_000, 10_000, device="meta")
    assert trial_tokens(small, 50, CPU) == 50
    assert trial_tokens(small, 4096, CPU) == 128
    assert trial_tokens(large, 4096, CPU) == 16
    assert trial_tokens(large, 4096, torch.device("cuda")) == 2048


def test_small_models_and_models_without_fused_layers_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, _ = boosted("llama", "attention")
    assert not fused_modules(policy.model)
    assert first_layer(policy) is None
    policy, _ = boosted("llama", "fused")
    assert first_layer(policy) is not None
    monkeypatch.undo()
    assert first_layer(policy) is None
