"""Adapters: the reference is the start, and what is saved stands on the root base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel

from tests.models.test_layout import random_rows
from tests.models.tiny import tiny_model
from trueup.data.forest import build_forest
from trueup.errors import ModelError
from trueup.models.adapters import attach_frozen, attach_trained, merge_adapters
from trueup.models.policy import Policy


def lora(rank: int = 4, targets="all-linear", alpha: int | None = None, **more) -> LoraConfig:
    targets = targets if targets == "all-linear" else list(targets)
    return LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=alpha or 2 * rank, target_modules=targets, **more)


def train_a_little(policy: Policy, seed: int = 0) -> dict[str, torch.Tensor]:
    """Move every trained parameter off its start; returns the masters a trainer would hold."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.trainable().values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return {name: p.detach().float() for name, p in policy.trainable().items()}


def start(starts=(), wanted=None, **more):
    base = tiny_model("llama").requires_grad_(False)
    adapters = attach_trained(base, wanted or lora(), list(starts), "tiny", **more)
    policy = Policy(base, adapters.model)
    policy.verify_layout()
    return policy, adapters


def saved(directory: Path, starts=(), wanted=None, seed: int = 0, **more):
    policy, adapters = start(starts, wanted, **more)
    masters = train_a_little(policy, seed)
    adapters.save(directory, masters)
    return policy, adapters


def logps(policy: Policy) -> torch.Tensor:
    with torch.no_grad():
        return policy.token_logps(build_forest(random_rows()))


def plain_peft_logits(directory: Path) -> torch.Tensor:
    model = PeftModel.from_pretrained(tiny_model("llama"), directory).eval()
    return model(torch.arange(3, 20)[None]).logits


def policy_logits(policy: Policy) -> torch.Tensor:
    with torch.no_grad(), policy.generating():
        return policy.model(torch.arange(3, 20)[None]).logits


@torch.no_grad()
def test_a_new_adapter_starts_as_its_reference() -> None:
    policy, adapters = start()
    now = logps(policy)
    with adapters.as_reference():
        assert torch.equal(logps(policy), now)


def test_only_the_trained_adapter_moves(tmp_path: Path) -> None:
    saved(tmp_path / "sft", wanted=lora(4, ["q_proj", "v_proj"]))
    policy, _ = start([tmp_path / "sft"], lora(2))
    assert all(".default." in name for name in policy.trainable())


@torch.no_grad()
@pytest.mark.parametrize("wanted", [lora(4), lora(2, ["up_proj"])], ids=["continued", "on top"])
def test_reference_over_an_sft_adapter_is_base_plus_adapter(tmp_path: Path, wanted: LoraConfig) -> None:
    trained, _ = saved(tmp_path / "sft", wanted=lora(4))
    policy, adapters = start([tmp_path / "sft"], wanted)
    assert adapters.continued == (wanted.r == 4)
    torch.testing.assert_close(logps(policy), logps(trained), atol=1e-6, rtol=0)
    before = logps(policy)
    train_a_little(policy)
    with adapters.as_reference():
        assert torch.equal(logps(policy), before)
    assert not torch.allclose(logps(policy), before)


@torch.no_grad()
def test_a_chain_of_three_stages_stands_on_the_root_base(tmp_path: Path) -> None:
    """pretrain → SFT → DPO with three different lora_targets; only the last output is loaded, by plain peft."""
    saved(tmp_path / "pt", wanted=lora(4, ["q_proj", "v_proj"], alpha=16), seed=1)
    saved(tmp_path / "sft", [tmp_path / "pt"], lora(6, use_rslora=True), seed=2)
    policy, _ = saved(tmp_path / "dpo", [tmp_path / "sft"], lora(3, ["v_proj", "down_proj"]), seed=3)
    torch.testing.assert_close(plain_peft_logits(tmp_path / "dpo"), policy_logits(policy), atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_several_starts_and_a_layer_subset(tmp_path: Path) -> None:
    saved(tmp_path / "a", wanted=lora(4, ["q_proj"], layers_to_transform=[1]), seed=1)
    saved(tmp_path / "b", wanted=lora(2, ["q_proj", "o_proj"]), seed=2)
    policy, _ = saved(tmp_path / "c", [tmp_path / "a", tmp_path / "b"], lora(2, ["gate_proj"]), seed=3)
    torch.testing.assert_close(plain_peft_logits(tmp_path / "c"), policy_logits(policy), atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_continued_adapter_is_saved_alone(tmp_path: Path) -> None:
    saved(tmp_path / "a", seed=1)
    policy, adapters = saved(tmp_path / "b", [tmp_path / "a"], seed=2)
    assert adapters.continued and not adapters.frozen
    torch.testing.assert_close(plain_peft_logits(tmp_path / "b"), policy_logits(policy), atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_create_new_adapter_freezes_the_start(tmp_path: Path) -> None:
    saved(tmp_path / "a", seed=1)
    policy, adapters = saved(tmp_path / "b", [tmp_path / "a"], create_new=True, seed=2)
    assert not adapters.continued
    torch.testing.assert_close(plain_peft_logits(tmp_path / "b"), policy_logits(policy), atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_merged_equals_adapter(tmp_path: Path) -> None:
    policy, _ = saved(tmp_path / "a", seed=1)
    merged = merge_adapters(tiny_model("llama"), [tmp_path / "a"])
    torch.testing.assert_close(merged(torch.arange(3, 20)[None]).logits, policy_logits(policy), atol=2e-5, rtol=1e-5)


def test_an_adapter_of_another_model_is_refused_by_tensor(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    other = tiny_model("llama", hidden_size=64, head_dim=8)
    with pytest.raises(ModelError, match=r"does not fit this base") as error:
        attach_trained(other, lora(), [tmp_path / "a"], "other")
    assert "the adapter has (4, 32), the model wants (4, 64)" in str(error.value)


def test_additional_target_is_trained_saved_and_not_concatenated(tmp_path: Path) -> None:
    wanted = lora(4, ["q_proj"], modules_to_save=["lm_head"])
    policy, _ = saved(tmp_path / "a", wanted=wanted)
    with torch.no_grad():
        torch.testing.assert_close(plain_peft_logits(tmp_path / "a"), policy_logits(policy), atol=2e-5, rtol=1e-5)
    with pytest.raises(ModelError, match="cannot be concatenated"):
        start([tmp_path / "a"], lora(2))


@torch.no_grad()
def test_a_module_trained_whole_on_top_of_a_start_is_saved(tmp_path: Path) -> None:
    saved(tmp_path / "a", seed=1)
    wanted = lora(2, ["q_proj"], modules_to_save=["lm_head"])
    policy, _ = saved(tmp_path / "b", [tmp_path / "a"], wanted, seed=2)
    torch.testing.assert_close(plain_peft_logits(tmp_path / "b"), policy_logits(policy), atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_a_rank_above_the_layer_width_keeps_its_scale(tmp_path: Path) -> None:
    saved(tmp_path / "a", wanted=lora(40, ["q_proj"], alpha=16), seed=1)
    policy, _ = saved(tmp_path / "b", [tmp_path / "a"], lora(2), seed=2)
    torch.testing.assert_close(plain_peft_logits(tmp_path / "b"), policy_logits(policy), atol=5e-5, rtol=1e-4)


@torch.no_grad()
def test_a_start_that_was_trained_with_dropout_does_not_drop(tmp_path: Path) -> None:
    saved(tmp_path / "sft", wanted=lora(4, ["q_proj"], lora_dropout=0.5))
    policy, adapters = start([tmp_path / "sft"], lora(2))
    policy.model.train()
    with adapters.as_reference():
        reference = logps(policy)
    assert torch.equal(logps(policy), reference)


def test_attaching_adapters_leaves_the_base_as_it_was_loaded(tmp_path: Path) -> None:
    """RoPE's frequencies stay in fp32 under a bf16 model: rounded, they would turn far positions by whole radians."""
    saved(tmp_path / "a")
    for attach in (
        lambda base: attach_trained(base, lora(), [], "tiny").model,
        lambda base: attach_trained(base, lora(2), [tmp_path / "a"], "tiny").model,
        lambda base: attach_frozen(base, [tmp_path / "a"]),
    ):
        base = tiny_model("llama")
        for parameter in base.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
        model = attach(base)
        assert {b.dtype for n, b in model.named_buffers() if "inv_freq" in n} == {torch.float32}
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
