"""Quantised bases: the policy is its reference before the first step, its gradients those of written-out weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.models.test_layout import random_rows
from tests.models.tiny import tiny_model
from trueup.config.schema import ModelSection, TuningSection
from trueup.data.forest import build_forest
from trueup.errors import ModelError
from trueup.models import quantise
from trueup.models.adapters import attach_trained
from trueup.models.fused import FusedLora, fuse
from trueup.models.load import load_base
from trueup.models.policy import Policy
from trueup.models.reference import LiveReference
from trueup.models.reward import RewardModel
from trueup.models.tuners import adapter_config

WAYS = {
    "bnb nf4": {"quantization_bit": 4},
    "bnb fp4": {"quantization_bit": 4, "quantization_type": "fp4", "double_quantization": False},
    "bnb 8": {"quantization_bit": 8},
    "hqq 4": {"quantization_bit": 4, "quantization_method": "hqq"},
    "hqq 2": {"quantization_bit": 2, "quantization_method": "hqq"},
    "torchao int8": {"quantization_bit": 8, "quantization_method": "torchao"},
    "torchao fp8": {"quantization_bit": 8, "quantization_method": "torchao", "quantization_type": "fp8"},
}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("base")
    shapes = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2)
    tiny_model("qwen2", std=0.1, **shapes).save_pretrained(path)
    return path


def section(directory: Path, way: str) -> ModelSection:
    library = WAYS[way].get("quantization_method", "bnb")
    pytest.importorskip(quantise.LIBRARIES[library][1][0])
    return ModelSection(model_name_or_path=str(directory), **WAYS[way])


def quantised(directory: Path, way: str, dtype=torch.float32, kind=Policy):
    return load_base(str(directory), section(directory, way), CPU, dtype, kind=kind)


def with_lora(base, **tuning) -> tuple[Policy, object]:
    torch.manual_seed(0)
    adapters = attach_trained(base, adapter_config(TuningSection(**tuning), base), [], "base")
    policy = Policy(base, adapters.model)
    fuse(policy.model)
    policy.verify_layout()
    return policy, adapters


def gradients(policy: Policy) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    logps = policy.token_logps(build_forest(random_rows()))
    logps.sum().backward()
    return logps.detach(), {name: p.grad for name, p in policy.trainable().items()}


@pytest.mark.parametrize(
    ("way", "dtype"), [*((way, torch.float32) for way in WAYS), ("bnb nf4", torch.bfloat16), ("bnb 8", torch.bfloat16)]
)
def test_the_policy_is_its_reference_and_learns_as_over_the_written_out_weights(directory, way, dtype):
    base = quantised(directory, way, dtype)
    policy, adapters = with_lora(base)
    assert policy.shared and any(isinstance(module, FusedLora) for module in policy.model.modules())
    policy.model.train()
    logps, found = gradients(policy)
    with torch.no_grad(), adapters.as_reference():
        policy.model.eval()
        assert torch.equal(policy.token_logps(build_forest(random_rows())), logps)
    plain = quantise.dequantise(quantised(directory, way, dtype), dtype)
    assert not quantise.is_quantised(plain) and type(plain.model.layers[0].mlp.up_proj) is torch.nn.Linear
    other, expected = gradients(with_lora(plain)[0])
    assert torch.equal(other, logps)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name])


@pytest.mark.parametrize("way", ["bnb nf4", "bnb 8", "hqq 4", "torchao int8"])
def test_a_quantised_model_is_close_to_what_it_was_made_from_and_smaller(directory, way):
    base = quantised(directory, way)
    whole = load_base(str(directory), ModelSection(model_name_or_path=str(directory)), CPU, torch.float32)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        far = (base(ids).logits - whole(ids).logits).abs().max() / whole(ids).logits.abs().max()
    assert 0 < far < (0.05 if "8" in way else 0.5)
    assert type(base.lm_head) is torch.nn.Linear
    assert quantise.count_parameters(base) == sum(p.numel() for p in whole.parameters())
    kept, expected = (
        quantise.resident_bytes(base),
        quantise.expected_bytes(whole, section(directory, way), torch.float32),
    )
    assert kept < quantise.resident_bytes(whole) and expected == pytest.approx(
        kept, rel=0.1, abs=20_000
    )  # tables of 1.1 KB a layer
    assert way.split()[0] in ("hqq", "torchao") or "bitsandbytes" in (quantise.describe(base) or "")


def test_bitsandbytes_own_forwards_differ_between_training_and_evaluation_and_ours_do_not(directory):
    """Why its layers compute otherwise here: an 8-bit product of its own rounds the inputs, in evaluation alone."""
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0, llm_int8_skip_modules=["lm_head"])
    own = AutoModelForCausalLM.from_pretrained(directory, quantization_config=config, device_map={"": "cpu"})
    ids = torch.arange(3, 40)[None]

    def gap(model) -> float:
        with torch.no_grad():
            return float((model.train()(ids).logits - model.eval()(ids).logits).abs().max())

    before = gap(own)
    quantise.settle(own)
    assert gap(own) == 0 < before


def test_what_bitsandbytes_repacked_for_evaluation_is_taken_back(directory):
    """On some CPUs an evaluation of 4-bit weights repacks them, and no gradient passes through them afterwards."""
    base = quantised(directory, "bnb fp4")
    quantise.unsettle(base)
    ids = torch.arange(3, 40)[None]
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = torch.cpu._is_avx512_bf16_supported()
    with torch.no_grad():
        base.eval()(ids)
    quantise.settle(base)
    fresh = quantised(directory, "bnb fp4")
    with torch.no_grad():
        torch.testing.assert_close(base(ids).logits, fresh(ids).logits, atol=0.1, rtol=0.1)
    policy, _ = with_lora(base)
    assert all(gradient is not None for gradient in gradients(policy)[1].values())


def test_a_reference_is_known_by_its_quantisation(directory):
    prints = set()
    for way in ("bnb nf4", "bnb fp4", "bnb 8"):
        policy, adapters = with_lora(quantised(directory, way))
        prints.add(LiveReference.of(policy, adapters).fingerprint())
    policy, adapters = with_lora(quantised(directory, "bnb 8"))
    assert len(prints) == 3 and LiveReference.of(policy, adapters).fingerprint() in prints


@pytest.mark.parametrize("way", ["bnb nf4", "bnb 8"])
def test_checkpoints_quantised_by_bitsandbytes_need_no_key(directory, tmp_path, way, caplog):
    pytest.importorskip("bitsandbytes")
    made = quantised(directory, way)
    quantise.unsettle(made)
    made.save_pretrained(tmp_path)
    asked = ModelSection(model_name_or_path=str(tmp_path), quantization_bit=4)
    base = load_base(str(tmp_path), asked, CPU, torch.float32)
    assert "quantised already" in caplog.text
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        quantise.settle(made)
        torch.testing.assert_close(base(ids).logits, made(ids).logits)
    plain = load_base(str(tmp_path), asked, CPU, torch.float32, quantised=False)
    assert not quantise.is_quantised(plain)
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, base(ids).logits)
    plain.save_pretrained(tmp_path / "plain")
    assert not quantise.stored_quantisation(AutoModelForCausalLM.from_pretrained(tmp_path / "plain").config)
    assert all(gradient is not None for gradient in gradients(with_lora(base)[0])[1].values())
    head = load_base(str(tmp_path), asked, CPU, torch.float32, kind=RewardModel).score
    assert type(head) is torch.nn.Linear and head.weight.dtype == torch.float32


def test_a_reward_models_head_stays_whole(directory):
    base = quantised(directory, "bnb nf4", kind=RewardModel)
    assert type(base.score) is torch.nn.Linear and isinstance(base.model.layers[0].mlp.up_proj, quantise.Weighted)


def test_a_missing_library_is_named_with_the_line_that_installs_it(directory, monkeypatch):
    asked = ModelSection(model_name_or_path=str(directory), quantization_bit=4, quantization_method="hqq")
    monkeypatch.setattr(quantise.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"(?s)hqq, which is not installed.*trueup\[hqq\]") as caught:
        load_base(str(directory), asked, CPU, torch.float32)
    assert caught.value.exit_code == 6


@pytest.mark.parametrize(("method", "library"), [("gptq", "gptqmodel"), ("awq", "gptqmodel")])
def test_checkpoints_of_libraries_that_are_not_there_are_refused(directory, monkeypatch, method, library):
    model = tiny_model("qwen2")
    model.config.quantization_config = {"quant_method": method, "bits": 4, "group_size": 128}
    monkeypatch.setattr(quantise.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=f"{library}, which is not installed"):
        quantise.loading(ModelSection(), model.config, torch.float32, CPU)


def test_eetq_needs_a_gpu(directory, monkeypatch):
    asked = ModelSection(model_name_or_path=str(directory), quantization_bit=8, quantization_method="eetq")
    monkeypatch.setattr(quantise, "_require", lambda *_: None)
    with pytest.raises(ModelError, match="EETQ needs a CUDA GPU"):
        load_base(str(directory), asked, CPU, torch.float32)
