"""Fused layers beside the model's own: other numbers are found out, clearly slower ones too, and nothing is left."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.models.test_booster import boosted
from tests.models.tiny import tiny_model
from trueup.models import fused, trial
from trueup.models.booster import boost
from trueup.models.fused import fuse, fused_modules
from trueup.models.policy import Policy
from trueup.models.trial import Trial, disagreement, kinds_of, limit_of, time_layer, timed_layer, trial_tokens

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def every_model_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "WORTHWHILE", 0)


def with_layers(count: int) -> Policy:
    """Frozen, its layers fused."""
    base = tiny_model("llama", std=0.05, num_hidden_layers=count).requires_grad_(False)
    fuse(base)
    return Policy(base)


def layers_of(policy: Policy) -> nn.ModuleList:
    return policy.base.get_decoder().layers


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_fused_layers_agree_with_the_models_own(name: str, dtype: torch.dtype) -> None:
    policy, _ = boosted(name, "fused", dtype)
    assert policy.boosted
    assert policy.gap is not None and policy.gap <= limit_of(dtype)
    assert disagreement(policy) <= limit_of(dtype)  # in the shared layout
    assert len(time_layer(policy, timed_layer(policy)).seconds) >= 1


def test_nothing_is_left_behind() -> None:
    policy, _ = boosted("llama", "fused")
    for parameter in policy.trainable().values():
        nn.init.zeros_(parameter)
    classes = [type(module) for module in policy.model.modules()]
    modes = [module.training for module in policy.model.modules()]
    state = torch.get_rng_state()
    disagreement(policy)
    time_layer(policy, timed_layer(policy))
    assert [type(module) for module in policy.model.modules()] == classes
    assert [module.training for module in policy.model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(not p.any() and p.grad is None for p in policy.trainable().values())


class LlamaMLP(nn.Module):
    """A model's code may call another formula by that name."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1.1 * self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize("places", [(0, 1, 2), (2,)], ids=["all", "last"])
def test_another_formula_under_a_known_name_is_found_out(places: tuple[int, ...], caplog) -> None:
    base = tiny_model("llama", std=0.05, num_hidden_layers=3).requires_grad_(False)
    for place in places:
        base.get_decoder().layers[place].mlp.__class__ = LlamaMLP
    policy = Policy(base)
    said = boost(policy, "auto")
    assert not fused_modules(base)
    assert not policy.boosted
    assert policy.shared
    assert "auto: transformers' own layers" in said and "fused layers give other numbers" in said
    assert "fused layers give other numbers than this model's own" in caplog.text


def test_a_comparison_that_fails_is_no_reason_to_stop(monkeypatch, caplog) -> None:
    def fails(*given) -> float:
        raise KeyError("hidden_states")

    monkeypatch.setattr("trueup.models.booster.disagreement", fails)
    policy, said = boosted("llama", "auto")
    assert policy.boosted and fused_modules(policy.model)
    assert policy.gap is None
    assert "could not be compared with this model's own" in caplog.text


def not_a_number(grad: torch.Tensor) -> torch.Tensor:
    return torch.full_like(grad, math.nan)


@pytest.mark.parametrize("spoilt", [not_a_number, lambda grad: None], ids=["nan", "none"])
def test_a_gradient_that_one_way_has_not_is_an_infinite_gap(spoilt: Callable, monkeypatch) -> None:
    policy, _ = boosted("llama", "fused")
    backward = fused._LoraLinear.backward

    def spoiling(ctx, grad):
        d_x, base, d_a, d_b, scale = backward(ctx, grad)
        return d_x, base, d_a, spoilt(d_b), scale

    monkeypatch.setattr(fused._LoraLinear, "backward", staticmethod(spoiling))
    assert disagreement(policy) == math.inf


def test_a_number_that_is_none_is_an_infinite_gap_wherever_it_stands() -> None:
    one, none = torch.ones(3), torch.full((3,), math.nan)
    assert trial._relative(one, one) == trial._relative(None, None) == 0
    for pair in ((one, none), (none, one), (none, none), (one, None), (None, one)):
        assert trial._relative(*pair) == math.inf


def test_a_layer_of_each_kind_is_compared_and_one_that_trains_is_timed() -> None:
    policy = with_layers(5)
    assert [len(kind) for kind in kinds_of(policy)] == [5]
    layers = layers_of(policy)
    layers[4].mlp.requires_grad_(True)  # as `freeze` does
    assert [len(kind) for kind in kinds_of(policy)] == [4, 1]
    assert timed_layer(policy) is layers[4]
    assert disagreement(policy) <= limit_of(torch.float32)
    layers[0].mlp.requires_grad_(True)
    layers[1].self_attn.requires_grad_(True)
    assert [len(kind) for kind in kinds_of(policy)] == [2, 1, 2]
    assert timed_layer(policy) is layers[0]


def test_fused_layers_are_given_up_only_where_they_are_clearly_slower() -> None:
    def of(*ratios: float) -> Trial:
        return Trial(16, tuple((ratio, 1.0) for ratio in ratios))

    assert of(0.9, 0.8, 0.9, 0.9, 0.9).fused
    assert of(1.02, 1.03, 1.0, 1.04, 1.02).fused
    assert of(1.3, 1.3, 1.3, 1.0, 1.0).fused
    assert not of(1.3, 1.3, 1.3, 1.2, 1.1).fused
    assert of(1.3, 1.3).fused  # no verdict
    assert of(1.3, 1.3).ratio is None
    busy = Trial(16, ((2.0, 1.5), (1.4, 1.2), (1.0, 1.0), (3.0, 2.0), (1.9, 1.0)))
    assert sorted(busy.ratios)[1] > trial.MARGIN  # nearly all pairs say so, but the fastest passes are alike
    assert busy.fused


def test_a_trial_stays_short() -> None:
    small, large = nn.Linear(10, 10), nn.Linear(20_000, 10_000, device="meta")
    assert trial_tokens(small, CPU) == 128
    assert trial_tokens(large, CPU) == 16
    assert trial_tokens(large, torch.device("cuda")) == 2048


def test_small_models_and_models_without_fused_layers_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, _ = boosted("llama", "attention")
    assert not fused_modules(policy.model)
    assert timed_layer(policy) is None
    assert disagreement(policy) == 0
    policy, _ = boosted("llama", "fused")
    assert timed_layer(policy) is not None
    monkeypatch.undo()
    assert timed_layer(policy) is None
