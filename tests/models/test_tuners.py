"""The adapter that a config asks for: its shape, where it starts, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from peft import IA3Config, LoraConfig, OFTConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from tests.models.test_layout import random_rows
from tests.models.tiny import COMMON, tiny_model
from trueup.config.load import load_config
from trueup.config.schema import TuningSection
from trueup.data.forest import build_forest
from trueup.errors import ConfigError, ModelError
from trueup.models.adapters import TRAINED, Start, attach_frozen, attach_trained
from trueup.models.policy import Policy
from trueup.models.principal import take_principal
from trueup.models.tuners import adapter_config


def wanted(base=None, **keys):
    return adapter_config(TuningSection(**keys), base or tiny_model("llama"))


def trained(base, **keys):
    return attach_trained(base.requires_grad_(False), wanted(base, **keys), [], "tiny")


def made(base, model=None) -> Policy:
    policy = Policy(base, model)
    policy.verify_layout()
    return policy


@torch.no_grad()
def logps(policy: Policy) -> torch.Tensor:
    return policy.token_logps(build_forest(random_rows()))


def test_oft_takes_its_blocks_rank_targets_and_dropout_from_the_config():
    blocks = wanted(finetuning_type="oft", oft_block_size=8, oft_target=["q_proj"], module_dropout=0.25)
    assert isinstance(blocks, OFTConfig) and (blocks.oft_block_size, blocks.module_dropout) == (8, 0.25)
    assert blocks.target_modules == {"q_proj"}
    rank = wanted(finetuning_type="oft", oft_rank=4)
    assert (rank.r, rank.oft_block_size) == (4, 0)
    model = trained(tiny_model("llama"), finetuning_type="oft", oft_block_size=8, oft_target=["q_proj"]).model
    assert {name.split(".")[-4] for name, p in model.named_parameters() if p.requires_grad} == {"q_proj"}


def test_ia3_scales_what_its_authors_do_unless_told_otherwise():
    usual = wanted(finetuning_type="ia3")
    assert isinstance(usual, IA3Config)
    assert usual.target_modules == {"k_proj", "v_proj", "down_proj"} and usual.feedforward_modules == {"down_proj"}
    assert wanted(finetuning_type="ia3", ia3_target=["o_proj"]).target_modules == {"o_proj"}


def test_dora_trains_magnitudes_and_starts_at_the_base():
    base = tiny_model("llama")
    before = logps(made(tiny_model("llama")))
    adapters = trained(base, use_dora=True, lora_rank=4)
    assert any("lora_magnitude_vector" in name for name, p in adapters.model.named_parameters() if p.requires_grad)
    torch.testing.assert_close(logps(made(base, adapters.model)), before)


def test_single_layers_have_ranks_and_scales_of_their_own():
    base = tiny_model("llama")
    model = trained(base, lora_rank=4, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}).model
    found = {
        path.rsplit(".", 1)[-1]: (layer.r[TRAINED], layer.scaling[TRAINED])
        for path, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }
    assert (found["q_proj"], found["v_proj"], found["k_proj"]) == ((2, 4.0), (4, 0.75), (4, 2.0))


def principal(base, iterations: int, rank: int = 4):
    keys = {"lora_rank": rank, "pissa_init": True, "pissa_iter": iterations}
    start = Start(lambda model: take_principal(model, TRAINED, iterations), changes_base=True)
    return attach_trained(base.requires_grad_(False), wanted(base, **keys), [], "tiny", start=start)


@pytest.mark.parametrize("pissa_iter", [-1, 16])
def test_pissa_starts_from_the_principal_components_exactly_or_by_iterations(pissa_iter):
    """pissa_iter: -1 decomposes exactly, a number of iterations nearly so."""
    base = tiny_model("llama")
    weight = base.model.layers[0].self_attn.q_proj.weight.detach().clone()
    least = torch.linalg.vector_norm(torch.linalg.svdvals(weight)[4:])
    principal(base, pissa_iter)
    left = torch.linalg.vector_norm(base.model.layers[0].self_attn.q_proj.get_base_layer().weight)
    assert float(left / least) == pytest.approx(1, abs=1e-5 if pissa_iter < 0 else 1e-2)


def test_pissa_saves_an_ordinary_adapter_for_the_original_base(tmp_path: Path):
    """pissa_convert: what was taken out of the base is taken back in the files, at twice the rank."""
    base = tiny_model("llama")
    before = logps(made(tiny_model("llama")))
    adapters = principal(base, 8)
    policy = made(base, adapters.model)
    torch.testing.assert_close(logps(policy), before, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        for name, parameter in adapters.model.named_parameters():
            if parameter.requires_grad and "lora_B" in name:
                parameter += 0.01
    moved = logps(policy)
    adapters.save(tmp_path / "a", {})
    assert LoraConfig.from_pretrained(tmp_path / "a").r == 8
    assert {min(t.shape) for t in load_file(tmp_path / "a" / "adapter_model.safetensors").values()} == {8}
    plain = tiny_model("llama")
    torch.testing.assert_close(logps(made(plain, attach_frozen(plain, [tmp_path / "a"]))), moved, atol=1e-4, rtol=1e-4)
    with pytest.raises(ConfigError, match="for a base that exists nowhere"):
        load_config({"model_name_or_path": "m", "dataset": "d", "pissa_init": True, "pissa_convert": False})


def mixture() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    keys = {**COMMON, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    return transformers.AutoModelForCausalLM.from_config(transformers.Qwen3MoeConfig(**keys)).eval()


def test_experts_get_adapters_when_they_are_named(tmp_path: Path):
    base = mixture()
    config = wanted(base, lora_rank=2, lora_target=["q_proj", "experts"])
    assert config.target_modules == {"q_proj"}
    assert sorted(config.target_parameters) == ["experts.down_proj", "experts.gate_up_proj"]
    adapters = attach_trained(base.requires_grad_(False), config, [], "tiny")
    names = [name for name, p in adapters.model.named_parameters() if p.requires_grad]
    assert any(".experts." in name for name in names) and any(".q_proj." in name for name in names)
    with pytest.raises(ModelError, match="adapters on experts take neither"):
        wanted(mixture(), lora_target=["experts"], lora_dropout=0.1)


def test_a_pattern_that_matches_nothing_or_is_none_is_refused():
    for pattern, words in ((r".*\.query_proj", "no module of the model matches"), (r".*(", "no regular expression")):
        base = tiny_model("llama")
        with pytest.raises(ModelError, match=words):
            attach_trained(base, wanted(base, lora_target=[pattern]), [], "tiny")
