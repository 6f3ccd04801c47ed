"""A run on a stretched model: what reads positions in one way while training reads them so ever after."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import trueup
from tests.recipes.test_adapter_matrix import logits_of, spied
from tests.recipes.test_equivalence import program_of, step
from trueup.config.load import load_config
from trueup.config.schema import RunConfig
from trueup.errors import ConfigError, ModelError
from trueup.inference.export.export import export
from trueup.inference.model import Model
from trueup.inference.server.settings import Settings
from trueup.inference.server.vllm_server import command
from trueup.models.load import load_policy, load_tokenizer
from trueup.models.rope import RECORD, rope_of
from trueup.recipes.check import check
from trueup.recipes.references import live_reference
from trueup.recipes.run import run

Config = Callable[..., RunConfig]
PLAIN = {"device": "cpu", "bf16": False}


@pytest.fixture
def short_dir(tiny_dir: Path, tmp_path: Path) -> Path:
    """The tiny model, made for 32 positions."""
    directory = tmp_path / "short"
    shutil.copytree(tiny_dir, directory)
    return with_context(directory, 32)


def with_context(directory: Path, positions: int) -> Path:
    path = directory / "config.json"
    values = json.loads(path.read_text(encoding="utf-8")) | {"max_position_embeddings": positions}
    path.write_text(json.dumps(values), encoding="utf-8")
    return directory


def keys_of(base: Path, **keys) -> dict:
    """Two steps, stretched by 4: cutoff_len is 128."""
    return {"model_name_or_path": str(base), "rope_scaling": "yarn", "max_steps": 2, "learning_rate": 1e-2, **keys}


def load(path: Path, **keys) -> Model:
    return Model(load_config({**PLAIN, "model_name_or_path": str(path), **keys}, verb="infer"))


def test_the_card_says_how_peft_alone_loads_the_base(config: Config, short_dir: Path, tmp_path: Path, monkeypatch):
    trained = spied(monkeypatch)
    run(config(**keys_of(short_dir)))
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    after = json.loads((tmp_path / "out" / RECORD).read_text(encoding="utf-8"))["after"]
    said = {"rope_parameters": after["parameters"], "max_position_embeddings": after["positions"]}
    assert ", ".join(f"{key}={value}" for key, value in said.items()) in card and str(short_dir) in card
    base = AutoModelForCausalLM.from_pretrained(short_dir, config=AutoConfig.from_pretrained(short_dir, **said))
    with torch.no_grad():
        found = PeftModel.from_pretrained(base, tmp_path / "out").eval()(input_ids=torch.arange(3, 40)[None]).logits
    torch.testing.assert_close(found, trained["logits"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["linear", "ntk", "yarn", "llama3"])
def test_an_adapter_brings_its_stretch_along(kind: str, config: Config, short_dir: Path, tmp_path: Path, monkeypatch):
    trained, said = spied(monkeypatch), StringIO()
    run(config(**keys_of(short_dir, rope_scaling=kind)), Console(file=said, width=200))
    out = tmp_path / "out"
    assert f"positions {kind}, factor 4: 32 → 128 positions" in said.getvalue()
    assert f"rope_scaling: {kind}\nrope_scaling_length: 128" in (out / "run.yaml").read_text(encoding="utf-8")
    found = load(out)
    torch.testing.assert_close(logits_of(found.policy), trained["logits"], atol=1e-5, rtol=0)
    found.merge(tmp_path / "merged", torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()  # transformers alone
    with torch.no_grad():
        plain = merged(torch.arange(3, 40)[None]).logits
    torch.testing.assert_close(plain, trained["logits"], atol=1e-4, rtol=0)
    assert merged.config.rope_parameters["rope_type"] == ("default" if kind == "ntk" else kind)
    assert merged.config.max_position_embeddings == 128


def test_a_stretched_base_in_few_bits_is_merged_in_full(config: Config, short_dir: Path, tmp_path: Path, caplog):
    pytest.importorskip("bitsandbytes")
    run(config(**keys_of(short_dir, quantization_bit=4)))
    found = load(tmp_path / "out", quantization_bit=4)
    with caplog.at_level(logging.WARNING, "trueup"):
        found.merge(tmp_path / "merged", torch.float32)
    assert "trained over 4-bit weights" in caplog.text
    read = AutoConfig.from_pretrained(tmp_path / "merged")
    assert read.rope_parameters["factor"] == 4.0 and not hasattr(read, "quantization_config")


def test_full_training_saves_the_stretch_in_the_models_config(config: Config, short_dir: Path, tmp_path, monkeypatch):
    trained = spied(monkeypatch)
    run(config(**keys_of(short_dir, finetuning_type="full", stage="sft", dataset="chats", lora_rank=None)))
    saved = AutoConfig.from_pretrained(tmp_path / "out")
    assert (saved.rope_parameters["rope_type"], saved.max_position_embeddings) == ("yarn", 128)
    assert not (tmp_path / "out" / RECORD).exists()
    for keys in ({}, {"rope_scaling": "yarn", "rope_scaling_length": 128}):  # which holds already
        found = logits_of(load(tmp_path / "out", **keys).policy)
        torch.testing.assert_close(found, trained["logits"], atol=1e-5, rtol=0)


def test_a_stretched_run_goes_on_to_the_bit_and_from_its_adapter(config: Config, short_dir: Path, tmp_path: Path):
    keys = keys_of(short_dir, save_strategy="steps", save_steps=1, max_steps=2)
    run(config(**keys, output_dir=str(tmp_path / "whole")))
    start = tmp_path / "whole" / "checkpoint-1"
    assert (start / RECORD).is_file()
    run(config(**keys, output_dir=str(tmp_path / "parts"), resume_from_checkpoint=str(start)))
    one, other = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert one == other
    # Without the key: what an adapter was trained with holds for what goes on from it.
    further = config(model_name_or_path=str(short_dir), adapter_name_or_path=str(tmp_path / "whole"), max_steps=1)
    run(further)
    assert (tmp_path / "out" / RECORD).read_bytes() == (tmp_path / "whole" / RECORD).read_bytes()
    for other in ({"rope_scaling": "linear"}, {"rope_scaling": "yarn", "cutoff_len": 200}):
        with pytest.raises(ModelError, match="stretched already"):
            program_of(further.replace(rope_scaling_length=other.get("cutoff_len", 128), **other))


@pytest.mark.parametrize("keys", [{}, {"precompute_ref_log_probs": False}, {"ref_model": "base"}])
def test_the_reference_reads_positions_as_the_policy_does(keys: dict, config: Config, short_dir: Path):
    keys = {name: str(short_dir) if value == "base" else value for name, value in keys.items()}
    cfg = config(**keys_of(short_dir, **keys))
    _, metrics, _ = step(program_of(cfg))
    assert abs(metrics["rewards/margins"]) < 1e-5
    loaded = load_policy(cfg.model, cfg.tuning, cfg.train, load_tokenizer(cfg.model))
    one, other = rope_of(live_reference(cfg, loaded).policy.base.config), rope_of(loaded.policy.base.config)
    assert one is not None and one == other and one.factor == 4.0


def test_an_adapter_on_another_base_is_refused_with_words(config: Config, short_dir: Path, tmp_path: Path, caplog):
    run(config(**keys_of(short_dir)))
    out, other = tmp_path / "out", with_context(Path(shutil.copytree(short_dir, tmp_path / "other")), 64)
    with pytest.raises(ModelError, match=r"trained with yarn, factor 4: 32 → 128 .* not stretched and 64 positions"):
        load(other, adapter_name_or_path=str(out))
    beside = load(short_dir)
    with pytest.raises(ModelError, match="was trained with yarn"):  # a server's second adapter
        beside.engine.attach("second", [str(out)])
    plain = tmp_path / "plain"
    run(config(model_name_or_path=str(short_dir), max_steps=1, output_dir=str(plain)))
    with caplog.at_level(logging.WARNING, "trueup"):
        load(short_dir, adapter_name_or_path=[str(plain), str(out)])
    assert "plain was trained without a stretch" in caplog.text
    shutil.copytree(out, tmp_path / "else")
    record = json.loads((out / RECORD).read_text(encoding="utf-8"))
    record["after"]["parameters"]["factor"] = 8.0
    (tmp_path / "else" / RECORD).write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(ModelError, match="and .*else with yarn, factor 8"):
        load(short_dir, adapter_name_or_path=[str(out), str(tmp_path / "else")])


def test_vllm_is_not_given_an_adapter_that_it_would_run_otherwise(config: Config, short_dir: Path, tmp_path: Path):
    run(config(**keys_of(short_dir)))
    for keys in ({"adapter_name_or_path": str(tmp_path / "out")}, {"rope_scaling": "yarn"}):
        cfg = load_config({**PLAIN, "model_name_or_path": str(short_dir), **keys}, verb="infer")
        with pytest.raises(ConfigError, match="trueup export"):
            command(cfg, Settings())


def test_an_export_carries_the_stretch_into_its_files(config: Config, short_dir: Path, tmp_path: Path):
    gguf = pytest.importorskip("gguf")
    run(config(**keys_of(short_dir, rope_scaling="linear")))
    keys = {"model_name_or_path": str(tmp_path / "out"), "export_dir": str(tmp_path / "file"), "export_gguf": "f32"}
    done = export(load_config(None, keys=keys, verb="export"))
    assert done.differences["gguf"].within(1e-4)
    assert AutoConfig.from_pretrained(tmp_path / "file").rope_parameters["factor"] == 4.0
    (path,) = (tmp_path / "file").glob("*.gguf")
    fields = gguf.GGUFReader(path).fields
    read = {name.split(".", 1)[1]: fields[name].contents() for name in fields if "rope" in name or "context" in name}
    assert read["rope.scaling.type"] == "linear" and read["rope.scaling.factor"] == 4.0
    assert read["context_length"] == 128
    assert "num_ctx 128" in (tmp_path / "file" / "Modelfile").read_text(encoding="utf-8")


def test_a_run_that_asks_for_dynamic_trains_goes_on_and_is_exported_with_ntk(config: Config, short_dir, tmp_path):
    gguf = pytest.importorskip("gguf")
    keys = keys_of(short_dir, rope_scaling="dynamic", save_strategy="steps", save_steps=1, stage="sft", dataset="chats")
    run(config(**keys))
    again = {
        **keys,
        "output_dir": str(tmp_path / "again"),
        "resume_from_checkpoint": str(tmp_path / "out/checkpoint-1"),
    }
    run(config(**again))
    one, other = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("out", "again"))
    assert one == other
    written = {"model_name_or_path": str(tmp_path / "out"), "export_dir": str(tmp_path / "file"), "export_gguf": "f32"}
    assert export(load_config(None, keys=written, verb="export")).differences["gguf"].within(1e-4)
    said = AutoConfig.from_pretrained(tmp_path / "file")
    (path,) = (tmp_path / "file").glob("*.gguf")
    fields = gguf.GGUFReader(path).fields
    read = {name.split(".", 1)[1]: fields[name].contents() for name in fields if "rope" in name or "context" in name}
    assert (
        read["rope.freq_base"] == pytest.approx(said.rope_parameters["rope_theta"], rel=1e-6)
        and said.rope_parameters["rope_theta"] > 1e4
    )
    assert read["context_length"] == said.max_position_embeddings == 128
    text = json.loads((tmp_path / "file" / "config.json").read_text(encoding="utf-8"))
    assert text.get("rope_theta", said.rope_parameters["rope_theta"]) == said.rope_parameters["rope_theta"]


def test_a_model_in_memory_is_not_stretched_behind_its_back(short_dir: Path):
    model = AutoModelForCausalLM.from_pretrained(short_dir)
    tokenizer = AutoTokenizer.from_pretrained(short_dir)
    keys = {"stage": "sft", "rope_scaling": "yarn", "cutoff_len": 128}
    with pytest.raises(ModelError, match="built already"):
        trueup.train(keys, model=model, tokenizer=tokenizer, train_dataset=[{"instruction": "a", "output": "b"}] * 4)


def test_check_finds_a_model_that_cannot_be_stretched(config: Config, short_dir: Path):
    path = short_dir / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    values["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    path.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ModelError, match="stretched already"):
        check(config(**keys_of(short_dir)))
