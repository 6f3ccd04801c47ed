"""LLaMA-Pro from end to end: blocks inserted by an export, trained alone, gone on with, and loaded as any model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import ROOT
from tests.recipes.test_adapter_matrix import (
    STAGES,
    acts_as_it_was_trained,
    read_lines,
    spied,
    starts_as_its_reference,
)
from tests.recipes.test_equivalence import program_of
from trueup.config.load import load_config
from trueup.config.schema import RunConfig
from trueup.errors import ConfigError, CorruptStateError, ModelError
from trueup.inference.export.export import export
from trueup.recipes.check import check
from trueup.recipes.run import run

Config = Callable[..., RunConfig]
PRO = {"finetuning_type": "freeze", "lora_rank": None, "use_llama_pro": True}
WITH_LORA = {"use_llama_pro": True, "freeze_trainable_layers": 2}
ROWS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def expanded(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a new block after each of its two."""
    target = tmp_path_factory.mktemp("expanded") / "model"
    keys = {"model_name_or_path": str(tiny_dir), "export_dir": str(target), "num_expand": 2, "template": "chatml"}
    done = export(load_config(None, keys=keys, verb="export"))
    assert done.facts["inserted blocks"] == 2 and done.differences["model"].largest < 1e-6
    return target


@torch.no_grad()
def logits_of(directory: Path) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(input_ids=ROWS).logits


def test_the_expanded_checkpoint_answers_as_the_original(expanded: Path, tiny_dir: Path):
    torch.testing.assert_close(logits_of(expanded), logits_of(tiny_dir), atol=1e-6, rtol=0)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_only_inserted_blocks_move_from_where_they_say_nothing(stage, expanded: Path, config: Config, tmp_path: Path):
    keys = {
        **STAGES[stage], **PRO, "model_name_or_path": str(expanded), "freeze_trainable_layers": 2, "max_steps": 3,
        "per_device_train_batch_size": 24, "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 2,
        "lr_scheduler_type": "constant", "plot_loss": False,
    }  # fmt: skip
    first, again = tmp_path / "first", tmp_path / "again"
    run(config(**keys, output_dir=str(first)))
    rows = [row for row in read_lines(first / "metrics.jsonl") if "loss" in row]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert stage == "sft" or abs(rows[0]["rewards/margins"]) < 1e-5
    before, after = load_file(expanded / "model.safetensors"), load_file(first / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[2] for name in moved} == {"1", "3"}
    assert {name for name in moved if name.endswith(("o_proj.weight", "down_proj.weight"))} == {
        f"model.layers.{i}.{name}.weight" for i in (1, 3) for name in ("self_attn.o_proj", "mlp.down_proj")
    }
    run(config(**keys, output_dir=str(again), resume_from_checkpoint=str(first / "checkpoint-2")))
    assert (again / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()


@pytest.mark.parametrize("stage, more", [("dpo", {}), ("sft", {"lora_target": "q_proj,o_proj", "use_rslora": True})])
def test_adapters_are_in_inserted_blocks_only(stage, more, expanded: Path, config: Config, tmp_path, monkeypatch):
    """As LLaMA-Factory has them: learnt, resumed, folded into the expanded model, whose own blocks stand."""
    keys = {
        **STAGES[stage], **WITH_LORA, **more, "model_name_or_path": str(expanded), "max_steps": 4,
        "per_device_train_batch_size": 24, "learning_rate": 3e-3, "save_strategy": "steps", "save_steps": 2,
        "lr_scheduler_type": "constant", "plot_loss": False,
    }  # fmt: skip
    starts_as_its_reference(config(**keys))
    first, again = tmp_path / "first", tmp_path / "again"
    trained = spied(monkeypatch)
    run(config(**keys, output_dir=str(first)))
    acts_as_it_was_trained(config(**keys), first, trained["logits"])
    losses = [row["loss"] for row in read_lines(first / "metrics.jsonl") if "loss" in row]
    assert losses[-1] < losses[0]
    adapter = load_file(first / "adapter_model.safetensors")
    assert {name.split(".layers.")[1].split(".")[0] for name in adapter} == {"1", "3"}
    run(config(**keys, output_dir=str(again), resume_from_checkpoint=str(first / "checkpoint-2")))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (first / name).read_bytes() == (again / name).read_bytes()

    written = {"model_name_or_path": str(first), "export_dir": str(tmp_path / "merged"), "template": "chatml"}
    export(load_config(None, keys=written, verb="export"))
    before, after = load_file(expanded / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[2] for name in moved} == {"1", "3"}
    beside = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(expanded, dtype=torch.float32), str(first))
    with torch.no_grad():
        torch.testing.assert_close(logits_of(tmp_path / "merged"), beside(input_ids=ROWS).logits, atol=1e-4, rtol=0)
    with pytest.raises(CorruptStateError, match="freeze_trainable_layers"):
        changed = {**keys, "freeze_trainable_layers": 1, "resume_from_checkpoint": str(first / "checkpoint-2")}
        run(config(**changed, output_dir=str(tmp_path / "other")))


@pytest.mark.parametrize(
    "more, what",
    [
        ({"lora_target": "q_proj,v_proj"}, "nothing would learn"),
        ({"lora_target": "down_proj,embed_tokens"}, "embed_tokens is not in the inserted blocks"),
        ({"lora_target": "q_pro"}, "no module of the model is called"),
        ({"freeze_trainable_layers": 4}, "inserted"),
        ({"use_dora": True}, "weights of 0"),
        ({"pissa_init": True}, "weights of 0"),
    ],
)
def test_adapters_that_could_not_learn_are_refused(more: dict, what: str, expanded: Path, config: Config):
    with pytest.raises((ConfigError, ModelError), match=what):
        program_of(config(**{**WITH_LORA, "model_name_or_path": str(expanded), **more}))


def test_blocks_that_were_trained_take_any_adapter(expanded: Path, config: Config, tmp_path: Path):
    keys = {**STAGES["sft"], "model_name_or_path": str(expanded), "freeze_trainable_layers": 2, "plot_loss": False}
    run(config(**{**keys, **PRO}, max_steps=1, output_dir=str(tmp_path / "first")))
    later = {**keys, **WITH_LORA, "model_name_or_path": str(tmp_path / "first"), "lora_target": "q_proj"}
    assert len(program_of(config(**later)).trainable) == 4
    assert check(config(**later)).estimate.trainable == sum(
        p.numel() for p in program_of(config(**later)).trainable.values()
    )


def test_what_was_not_inserted_is_not_trained_by_its_name(expanded: Path, config: Config, tiny_dir: Path):
    keys = {**PRO, "model_name_or_path": str(expanded)}
    assert check(config(**keys, freeze_trainable_layers=2)).estimate.trainable
    for count in (3, 4):
        with pytest.raises(ModelError, match="inserted"):
            check(config(**keys, freeze_trainable_layers=count))
    with pytest.raises(ConfigError, match="use_llama_pro"):
        config(use_llama_pro=True, finetuning_type="full", lora_rank=None)
    with pytest.raises(ConfigError, match="freeze_trainable_layers"):
        config(freeze_trainable_layers=2)
    unevenly = {"model_name_or_path": str(tiny_dir), "export_dir": str(expanded / "x"), "num_expand": 5}
    with pytest.raises(ModelError, match="evenly"):
        export(load_config(None, keys={**unevenly, "template": "chatml"}, verb="export"))


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The built-in model with blocks of its own, and with tokens of its own."""
    monkeypatch.chdir(tmp_path)
    few = {"max_steps": 1, "max_samples": 6, "plot_loss": False, "regression_report": False, "device": "cpu",
           "bf16": False, "precompute_ref_log_probs": False}  # fmt: skip
    keys = {"model_name_or_path": "builtin:sql-tiny", "num_expand": 2, "export_dir": "saves/sql-tiny/expanded"}
    export(load_config(None, keys=keys, verb="export"))
    pro = run(load_config(ROOT / "examples/builtin_llama_pro.yaml", keys=few))
    assert read_lines(pro.output_dir / "metrics.jsonl")[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    grown = run(load_config(ROOT / "examples/builtin_new_tokens.yaml", keys=few))
    tokenizer = AutoTokenizer.from_pretrained(grown.output_dir)
    assert [len(tokenizer.encode(word)) for word in ("Pixel", "Shoes", "Biology", "Lisbon")] == [1] * 4
