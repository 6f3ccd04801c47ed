"""Activations that wait elsewhere: the same gradients, no weight moved, no value twice."""

from __future__ import annotations

import pytest
import torch

from tests.models.test_memory import SHAPE, a_pair, policy
from trueup.models import offload
from trueup.models.memory import LayerCosts, recompute
from trueup.models.offload import offloading


def gradients(made, inside) -> dict[str, torch.Tensor]:
    made.model.zero_grad()
    with inside:
        logps = made.token_logps(a_pair(20, 30))
    logps.sum().backward()
    return {name: p.grad.clone() for name, p in made.trainable().items() if p.grad is not None}


@pytest.mark.parametrize("recomputing", [0, 2])
@pytest.mark.parametrize(
    "keys", [{}, {"finetuning_type": "full"}, {"lora_dropout": 0.1}], ids=["lora", "full", "dropout"]
)
def test_gradients_are_the_same_to_the_bit(keys: dict, recomputing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = policy("llama", torch.float32, **keys)
    monkeypatch.setattr(offload, "SMALLEST", 0)
    recompute(made.base, recomputing)
    found = []
    for elsewhere in (False, True):
        torch.manual_seed(0)
        found.append(gradients(made, offloading(made.model, smallest=0) if elsewhere else torch.enable_grad()))
    kept, moved = found
    assert kept.keys() == moved.keys() and kept
    assert all(torch.equal(kept[name], moved[name]) for name in kept)


def test_weights_and_small_values_stay_and_no_value_moves_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = policy("llama", torch.float32)
    moved: list[torch.Tensor] = []
    whole = torch.empty
    monkeypatch.setattr(offload.torch, "empty", lambda *a, **k: moved.append(whole(*a, **k)) or moved[-1])
    tokens, smallest = len(a_pair(20, 30).input_ids), 4 * SHAPE["hidden_size"]
    with offloading(made.model, smallest):
        x = torch.randn(tokens, SHAPE["hidden_size"], requires_grad=True)
        y = x * 2.0
        weight = next(p for p in made.model.parameters() if p.shape == (128, 128))
        total = (y**2).sum() + (y**3).sum() + (y @ weight.requires_grad_()).sum() + (y[:1, :4] ** 2).sum()
    own = [t for t in moved if t.shape == y.shape]
    assert len(own) == len([t for t in moved if t.nbytes >= smallest]) == 1
    total.backward()
    expected = 2.0 * (2 * y + 3 * y**2 + weight.sum(1))
    expected[:1, :4] += 2.0 * 2 * y[:1, :4]
    assert torch.allclose(x.grad, expected.detach(), rtol=1e-5, atol=1e-5)


def test_the_policy_offloads_when_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = policy("llama", torch.float32)
    asked = []
    monkeypatch.setattr("trueup.models.policy.offloading", lambda model: asked.append(model) or torch.enable_grad())
    made.token_logps(a_pair(5, 5))
    assert asked == []
    made.offloads = True
    made.token_logps(a_pair(5, 5))
    assert asked == [made.model]
    with torch.no_grad():
        made.token_logps(a_pair(5, 5))
    assert len(asked) == 1


def test_one_layer_is_what_the_device_then_holds() -> None:
    costs = LayerCosts(layers=10, kept=100, entry=10, outside=5, passing=20, offloaded=True)
    assert costs.needed(1) == LayerCosts(layers=1, kept=100, entry=10, outside=5, passing=20).needed(1)
