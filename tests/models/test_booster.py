"""`booster`: fused layers and shared prompts give what transformers' own layers give; what is not there is refused."""

from __future__ import annotations

import pytest
import torch

from tests.models.test_memory import a_pair
from tests.models.tiny import tiny_model
from trueup.config.load import load_config
from trueup.errors import ConfigError, ModelError
from trueup.models import booster
from trueup.models.adapters import attach_trained
from trueup.models.booster import boost, check_booster
from trueup.models.policy import Policy
from trueup.models.tuners import adapter_config

BASE = {"model_name_or_path": "m", "dataset": "alpaca_en_demo"}


def boosted(name: str, kind: str, dtype: torch.dtype = torch.float32) -> tuple[Policy, str]:
    tuning = load_config(BASE).tuning
    base = tiny_model(name, std=0.05, hidden_size=64, num_hidden_layers=2).to(dtype).requires_grad_(False)
    torch.manual_seed(0)
    policy = Policy(base, attach_trained(base, adapter_config(tuning, base), [], name).model)
    for parameter in policy.trainable().values():
        torch.nn.init.normal_(parameter, std=0.02)
    return policy, boost(policy, kind)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma"])
def test_none_is_transformers_own_and_gives_the_same(name: str) -> None:
    found = {}
    for kind in ("auto", "attention", "none"):
        policy, said = boosted(name, kind)
        assert said.startswith(kind)
        assert policy.shared == (kind != "none")
        fused = [type(module).__name__ for module in policy.model.modules() if "Fused" in type(module).__name__]
        assert bool(fused) == (kind == "auto")
        logps = policy.token_logps(a_pair(20, 30))
        logps.mean().backward()
        found[kind] = logps, {n: p.grad for n, p in policy.trainable().items()}
    for kind in ("auto", "attention"):
        assert torch.allclose(found[kind][0], found["none"][0], rtol=1e-5, atol=1e-5)
        for key, gradient in found["none"][1].items():
            assert torch.allclose(found[kind][1][key], gradient, rtol=1e-4, atol=1e-6), (kind, key)


def test_the_header_hears_which_kernels_are_in_use() -> None:
    assert "by torch, segment by segment" in boosted("llama", "auto")[1]
    assert "in blocks" in boosted("llama", "auto", torch.bfloat16)[1]
    assert boosted("llama", "none")[1] == "none: transformers' own layers and attention (sdpa)"
    assert boosted("llama", "fused")[1].startswith("fused: ")
    assert boosted("llama", "attention")[1].startswith("attention: transformers' own layers; attention over shared")
    assert boosted("llama", "flash_attn")[1].startswith("flash_attn: ")


def test_liger_is_refused_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    check_booster("auto", torch.device("cpu"))
    with pytest.raises(ModelError, match="GPUs"):
        check_booster("liger", torch.device("cpu"))
    monkeypatch.setattr(booster.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="liger-kernel"):
        check_booster("liger", torch.device("cuda"))


def test_liger_takes_the_layers_and_leaves_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(booster, "check_booster", lambda *given: None)
    monkeypatch.setattr(booster, "apply_liger_kernel", lambda base, kernels: asked.append((type(base), kernels)))
    policy, said = boosted("llama", "liger")
    assert asked == [(type(policy.base), {"cross_entropy": False, "fused_linear_cross_entropy": False})]
    assert said.startswith("liger: ")


def test_other_names_mean_the_same() -> None:
    assert load_config({**BASE, "use_liger_kernel": True}).model.booster == "liger"
    assert load_config({**BASE, "enable_liger_kernel": False}).model.booster == "auto"
    with pytest.raises(ConfigError, match="drop one"):
        load_config({**BASE, "booster": "flash_attn", "flash_attn": "sdpa"})
