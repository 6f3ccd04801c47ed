"""Keys that other tests only pass by: each acts, in the smallest setting that shows it (docs/llamafactory.md)."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer

from tests.recipes.test_equivalence import perturb, program_of, step
from trueup.config.load import load_config
from trueup.config.schema import RunConfig
from trueup.data import encode
from trueup.data.encode import prepare
from trueup.errors import ConfigError, ModelError
from trueup.inference.export.plan import make_plan
from trueup.inference.server.settings import Settings
from trueup.inference.server.vllm_server import command
from trueup.models.hub import ADAPTER_CONFIG, download_adapter, hub_access
from trueup.models.load import load_base, load_policy, load_tokenizer
from trueup.models.quantise import is_quantised
from trueup.recipes import judges
from trueup.recipes.batches import plan_batches
from trueup.recipes.references import live_reference, reference_section
from trueup.recipes.run import run
from trueup.recipes.weights import weights_table

Config = Callable[..., RunConfig]
CPU = torch.device("cpu")


def test_neat_packing_packs(config: Config):
    cfg = config(neat_packing=True, stage="sft", dataset="chats")
    plan, arithmetic = plan_batches(cfg, prepare(cfg, load_tokenizer(cfg.model)).train.lengths)
    assert arithmetic.packs == len(plan.units) < arithmetic.examples


def test_preprocessing_batch_size_is_what_a_worker_takes_at_a_time(config: Config, monkeypatch: pytest.MonkeyPatch):
    seen = []
    whole = encode.encode_examples
    monkeypatch.setattr(encode, "encode_examples", lambda *given: seen.append(given[-1]) or whole(*given))
    cfg = config(preprocessing_batch_size=7, overwrite_cache=True)
    prepare(cfg, load_tokenizer(cfg.model))
    assert seen == [7]


@pytest.mark.parametrize("hub, token", [("huggingface", "hf_hub_token"), ("modelscope", "ms_hub_token"),
                                        ("modelers", "om_hub_token")])  # fmt: skip
def test_a_hub_is_asked_with_its_own_token_for_the_revision_named(config: Config, hub: str, token: str):
    tokens = {"hf_hub_token": "h", "ms_hub_token": "m", "om_hub_token": "o"}
    access = hub_access(config(hub=hub, model_revision="v2", cache_dir="there", **tokens).model)
    assert (access.hub, access.token, access.revision, access.cache_dir) == (hub, tokens[token], "v2", "there")


def test_the_tokenizer_is_fast_unless_told_otherwise(config: Config, monkeypatch: pytest.MonkeyPatch):
    asked = []
    whole = AutoTokenizer.from_pretrained
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *a, **k: asked.append(k["use_fast"]) or whole(*a, **k))
    for value in (True, False):
        load_tokenizer(config(use_fast_tokenizer=value).model)
    assert asked == [True, False]


@pytest.mark.parametrize("value, kernel", [("disabled", "eager"), ("sdpa", "sdpa"), ("auto", "sdpa")])
def test_flash_attn_chooses_the_kernel_of_the_unshared_path(config: Config, value: str, kernel: str):
    cfg = config(flash_attn=value)
    base = load_base(str(cfg.model.model_name_or_path), cfg.model, CPU, torch.float32)
    assert base.config._attn_implementation == kernel


def trained(cfg: RunConfig) -> set[str]:
    return set(load_policy(cfg.model, cfg.tuning, cfg.train, load_tokenizer(cfg.model)).policy.trainable())


def test_freeze_trains_the_layers_and_modules_named_and_no_others(config: Config):
    freeze = {"finetuning_type": "freeze", "lora_rank": None}
    last = trained(config(**freeze, freeze_trainable_layers=1))
    first = trained(config(**freeze, freeze_trainable_layers=-1))
    assert last and all(".layers.1." in name for name in last) and all(".layers.0." in name for name in first)
    some = trained(config(**freeze, freeze_trainable_layers=2, freeze_trainable_modules=["mlp"]))
    assert some and all(".mlp." in name for name in some)
    more = trained(config(**freeze, freeze_trainable_layers=1, freeze_extra_modules=["embed_tokens"]))
    assert {name for name in more - last} == {name for name in more if "embed_tokens" in name} != set()


def test_freeze_trains_modules_outside_the_layers_alone_and_names_those_that_are_not_there(config: Config):
    freeze = {"finetuning_type": "freeze", "lora_rank": None}
    head = trained(config(**freeze, freeze_trainable_layers=0, freeze_extra_modules=["norm", "lm_head"]))
    assert head == {"model.norm.weight", "model.embed_tokens.weight"}  # one tensor with the head
    with pytest.raises(ModelError) as caught:
        trained(config(**freeze, freeze_trainable_modules=["nowhere"], freeze_extra_modules=["neither"]))
    assert {(p.where, p.what.split()[3]) for p in caught.value.problems} == {
        ("freeze_trainable_modules", "nowhere"), ("freeze_extra_modules", "neither"),
    }  # fmt: skip
    with pytest.raises(ModelError, match="the model has 2 layers"):
        trained(config(**freeze, freeze_trainable_layers=3))


def test_a_reference_has_bits_of_its_own(config: Config, tiny_dir: Path):
    pytest.importorskip("bitsandbytes")
    keys = {"ref_model": str(tiny_dir), "precompute_ref_log_probs": False}
    for bits in (None, 8):
        cfg = config(**keys, ref_model_quantization_bit=bits)
        assert reference_section(cfg).quantization_bit == bits
        loaded = load_policy(cfg.model, cfg.tuning, cfg.train, load_tokenizer(cfg.model))
        assert is_quantised(live_reference(cfg, loaded).policy.base) == bool(bits)
        assert not is_quantised(loaded.policy.base)


def test_a_reward_model_has_bits_of_its_own(config: Config, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(judges, "load_reward_model", lambda section, *rest: asked.append(section.quantization_bit))
    monkeypatch.setattr(judges, "is_text_classifier", lambda *given: False)
    monkeypatch.setattr(judges, "_template_of", lambda *given: None)
    monkeypatch.setattr(judges, "_Rendered", lambda *given: None)
    keys = {"stage": "ppo", "dataset": "chats", "reward_model": str(tiny_dir), "reward_model_quantization_bit": 4}
    judges._reward_model(config(**keys), None, None, CPU, torch.float32)
    assert asked == [4]


def test_export_device_cpu_folds_where_memory_is_largest(config: Config, tiny_dir: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("trueup.inference.export.plan.pick_device", lambda wanted: torch.device(
        "cpu" if wanted == "cpu" else "meta"))  # fmt: skip
    keys = {"model_name_or_path": str(tiny_dir), "export_dir": str(tmp_path / "out"), "template": "qwen"}
    for value, device in (("cpu", "cpu"), ("auto", "meta")):
        cfg = load_config(None, keys={**keys, "export_device": value}, verb="export")
        assert make_plan(cfg).device == torch.device(device)


def test_vllm_is_told_how_much_it_may_take(tiny_dir: Path, tmp_path: Path):
    keys = {"vllm_maxlen": 512, "vllm_gpu_util": 0.5, "vllm_enforce_eager": True, "vllm_max_lora_rank": 16}
    cfg = load_config({"model_name_or_path": str(tiny_dir), "vllm_config": {"seed": 3}, **keys}, verb="infer")
    said = " ".join(command(cfg, Settings(adapters={"a": str(tmp_path)})))
    for words in ("--max-model-len 512", "--gpu-memory-utilization 0.5", "--enforce-eager", "--max-lora-rank 16",
                  "--seed 3"):  # fmt: skip
        assert words in said


def test_added_tokens_are_one_token_each(config: Config):
    plain = load_tokenizer(config().model)
    cfg = config(add_tokens="<cold>", add_special_tokens="<warm>,<hot>")
    tokenizer = load_tokenizer(cfg.model)
    assert len(tokenizer) == len(plain) + 3
    assert [len(tokenizer.encode(t, add_special_tokens=False)) for t in ("<cold>", "<warm>", "<hot>")] == [1, 1, 1]
    assert tokenizer.decode(tokenizer.encode("<cold><warm>"), skip_special_tokens=True) == "<cold>"


def test_the_shape_of_the_adapter_is_the_configs(config: Config):
    cfg = config(lora_rank=3, lora_alpha=12)
    loaded = load_policy(cfg.model, cfg.tuning, cfg.train, load_tokenizer(cfg.model))
    shapes = {name: p.shape for name, p in loaded.policy.trainable().items()}
    assert all(shape[0] == 3 for name, shape in shapes.items() if "lora_A" in name)
    (shape,) = loaded.policy.model.peft_config.values()
    assert (shape.r, shape.lora_alpha) == (3, 12)


@pytest.mark.parametrize(
    "plain, keys",
    [
        ({}, {"pref_beta": 0.3}),
        ({"stage": "simpo"}, {"simpo_gamma": 2.0}),
        ({"stage": "kto", "dataset": "labels"}, {"kto_chosen_weight": 3.0}),
        ({"stage": "kto", "dataset": "labels"}, {"kto_rejected_weight": 3.0}),
    ],
)
def test_a_loss_reads_its_keys(config: Config, plain: dict, keys: dict):
    def gradients(**given) -> dict[str, torch.Tensor]:
        program = program_of(config(**given))
        perturb(program)
        return step(program)[2]

    one, other = gradients(**plain), gradients(**plain, **keys)
    assert any(not torch.allclose(one[name], other[name], rtol=1e-3) for name in one)


def test_adapters_of_a_reward_model_are_looked_for(config: Config, tiny_dir: Path):
    keys = {"stage": "ppo", "dataset": "chats", "reward_model": str(tiny_dir)}
    with pytest.raises(ModelError, match="nowhere"):
        judges._check_kind(config(**keys, reward_model_adapters="./nowhere", reward_model_type="lora"), str(tiny_dir))


def test_an_adapter_lies_in_a_folder_of_what_is_named(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run(config(max_steps=1, output_dir=str(tmp_path / "out/best")))
    cfg = config(adapter_name_or_path=str(tmp_path / "out"), adapter_folder="best")
    loaded = load_policy(cfg.model, cfg.tuning, cfg.train, load_tokenizer(cfg.model))
    assert loaded.starts == [str(tmp_path / "out/best")]
    assert load_config(cfg.resolved()).model.adapter_name_or_path == cfg.model.adapter_name_or_path

    asked = {}
    there = (tmp_path / "snapshot/best", tmp_path / "snapshot")
    there[0].mkdir(parents=True)
    (there[0] / ADAPTER_CONFIG).write_text("{}", encoding="utf-8")
    monkeypatch.setattr("trueup.models.hub.mind_the_hub", lambda: None)
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **keys: asked.update(keys, name=name) or str(there[1])
    )
    (name,) = config(adapter_name_or_path="someone/adapters", adapter_folder="best").model.adapter_name_or_path
    assert download_adapter(name, hub_access(cfg.model)) == str(there[0])
    assert (asked["name"], asked["allow_patterns"]) == ("someone/adapters", "best/*")
    named = {"model_name_or_path": cfg.model.model_name_or_path, "adapter_name_or_path": "someone/adapters"}
    served = load_config({**named, "adapter_folder": "best"}, verb="infer")
    said = command(served, Settings())
    assert f"someone/adapters/best={there[0]}" in said  # vLLM itself knows of no folder


@pytest.mark.parametrize(
    "folder", ["..", "a/../..", "/etc", ".", "C:best", "C:/best", "a\\..\\..", "\\etc", "\\\\host\\etc"]
)
def test_a_folder_of_an_adapter_does_not_lead_out_of_it(config: Config, folder: str):
    with pytest.raises(ConfigError, match="adapter_folder"):
        config(adapter_name_or_path="out", adapter_folder=folder)


def test_weights_are_listed_with_alike_layers_in_one_line(config: Config):
    cfg = config(print_param_status=True, max_steps=1)
    loaded = load_policy(cfg.model, cfg.tuning, cfg.train, load_tokenizer(cfg.model))
    table = weights_table(loaded.policy.model)
    assert table.title == "all: type float32, device cpu"
    columns = [list(column.cells) for column in table.columns]
    rows = {name: rest for name, *rest in zip(*columns, strict=True)}
    weights = dict(loaded.policy.model.named_parameters())
    last = loaded.policy.base.config.num_hidden_layers - 1
    for name, weight in weights.items():
        name = name.removeprefix("base_model.model.")
        shown = rows[name.replace(".layers.0.", f".layers.0-{last}.").replace(f".layers.{last}.", f".layers.0-{last}.")]
        assert shown == ["×".join(map(str, weight.shape)), "yes" if weight.requires_grad else "no"]
    next(iter(weights.values())).data = next(iter(weights.values())).data.double()
    assert [column.header for column in weights_table(loaded.policy.model).columns][2:] == ["type", "trains"]
    for asked in (True, False):
        told = Console(file=io.StringIO(), width=200)
        run(cfg.replace(print_param_status=asked, overwrite_output_dir=True), told)
        assert ("lora_A" in told.file.getvalue()) is asked
