"""Whole runs on tiny models: artefacts, resume to the bit, processes, chained stages."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from trueup.config.schema import RunConfig
from trueup.errors import ConfigError
from trueup.recipes.check import check
from trueup.recipes.offline import run
from trueup.training.loop import WALL_CLOCK

Config = Callable[..., RunConfig]
FULL = {"finetuning_type": "full", "lora_rank": None}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def metrics(directory: Path) -> list[dict]:
    """metrics.jsonl without what the clock decides."""
    return [{k: v for k, v in row.items() if k not in WALL_CLOCK} for row in lines(directory / "metrics.jsonl")]


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= {f"{file.name}:{name}": tensor for name, tensor in load_file(file).items()}
    return found


def assert_same_bits(a: Path, b: Path) -> None:
    left, right = tensors(a), tensors(b)
    assert left.keys() == right.keys() and left
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def test_a_dpo_run_leaves_every_artefact(config: Config, tmp_path: Path) -> None:
    run(config(eval_dataset="held", eval_strategy="epoch", save_strategy="epoch", plot_loss=True))
    output = tmp_path / "out"
    for name in (
        "run.yaml", "environment.json", "status.json", "metrics.jsonl", "trainer_log.jsonl", "data_report.json",
        "data_report.html",
        "adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "training_loss.png",
        "training_rewards_accuracies.png", "train_results.json", "eval_results.json", "all_results.json", "README.md",
        "checkpoint-6/manifest.json", "checkpoint-12/adapter_model.safetensors",
    ):  # fmt: skip
        assert (output / name).is_file(), name
    assert json.loads((output / "status.json").read_text(encoding="utf-8"))["state"] == "finished"
    row = lines(output / "metrics.jsonl")[0]
    wanted = {"loss", "grad_norm", "learning_rate", "kl", "rewards/chosen", "rewards/rejected", "rewards/accuracies",
              "rewards/margins", "logps/chosen", "logps/rejected"}  # fmt: skip
    assert wanted <= row.keys()
    report = json.loads((output / "data_report.json").read_text(encoding="utf-8"))
    assert report["datasets"]["pairs"]["read"] == report["datasets"]["pairs"]["kept"] == 21
    assert not [path for path in output.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize(
    "stage", [{"stage": "dpo"}, {"stage": "sft", "dataset": "chats"}, {"stage": "pt", "dataset": "texts"}],
    ids=["dpo", "sft", "pt"],
)  # fmt: skip
def test_resume_at_k_equals_uninterrupted_to_the_bit(config: Config, tmp_path: Path, stage: dict, tuning: str) -> None:
    """Mid-epoch, in mid logging interval, with an incomplete accumulation at the epoch's end."""
    keys = {
        **stage, **(FULL if tuning == "full" else {"lora_dropout": 0.1}), "save_strategy": "steps", "save_steps": 2,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 3, "packing": False,
        "eval_strategy": "steps", "eval_steps": 4, "val_size": 3,
    }  # fmt: skip
    whole = tmp_path / "whole"
    run(config(**keys, output_dir=str(whole)))
    last = max(whole.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for k in (2, 4, 6):
        again = tmp_path / f"resumed-{k}"
        shutil.copytree(whole, again)
        for checkpoint in again.glob("checkpoint-*"):
            if int(checkpoint.name.split("-")[1]) > k:
                shutil.rmtree(checkpoint)
        run(config(**keys, output_dir=str(again), resume_from_checkpoint="auto"))
        assert_same_bits(whole / last.name, again / last.name)
        assert_same_bits(whole, again)
        assert metrics(whole) == metrics(again)


@pytest.mark.parametrize(
    "stage", [{"stage": "dpo"}, {"stage": "sft", "dataset": "chats", **FULL}], ids=["dpo-lora", "sft-full"]
)
def test_two_processes_equal_one(config: Config, tmp_path: Path, stage: dict) -> None:
    """The same steps, losses and gradients whether one process or two gloo processes share them."""
    from trueup.config.schema import dump_yaml

    keys = {
        **stage,
        "num_train_epochs": 1,
        "eval_strategy": "epoch",
        "val_size": 3,
        "learning_rate": 1e-4,
    }
    one = config(
        **keys,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        output_dir=str(tmp_path / "one"),
    )
    run(one)
    two = config(**keys, per_device_train_batch_size=2, output_dir=str(tmp_path / "two"))
    path = tmp_path / "two.yaml"
    path.write_text(dump_yaml(two), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "trueup",
               "train", str(path)]  # fmt: skip
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TRUEUP_CACHE": str(tmp_path / "other-cache"),
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        for name in ("loss", "grad_norm", "eval_loss", "rewards/margins", "num_tokens"):
            if name in a:
                # The first step's sums differ by rounding alone; later ones also by what Adam makes of that.
                rel = 1e-6 if a["step"] == 1 else 2e-5
                assert b[name] == pytest.approx(a[name], rel=rel, abs=1e-6), (name, a["step"])
    left, right = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    for name in left:
        torch.testing.assert_close(left[name], right[name], atol=2e-5, rtol=1e-4)


def test_chained_stages_stand_on_the_root_base(config: Config, tmp_path: Path, tiny_dir: Path) -> None:
    """pretrain → SFT → DPO, each from the last one's output directory, with three lora_targets."""
    chain = [
        ("pretrain", {"stage": "pretrain", "dataset": "texts", "lora_target": "q_proj,v_proj"}),
        ("sft", {"stage": "sft", "dataset": "chats", "lora_target": "all-linear", "lora_rank": 2}),
        ("dpo", {"stage": "dpo", "lora_target": "gate_proj,o_proj", "pref_beta": 0.5}),
    ]
    start = str(tiny_dir)
    for name, keys in chain:
        run(
            config(
                **keys,
                model_name_or_path=start,
                learning_rate=1e-2,
                output_dir=str(tmp_path / name),
            )
        )
        start = str(tmp_path / name)

    base = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, start).eval()
    ids = AutoTokenizer.from_pretrained(start)("sun rain wind snow star", return_tensors="pt").input_ids
    from trueup.models.load import load_for_inference

    cfg = config(model_name_or_path=start)
    trained = load_for_inference(cfg.model, cfg.train)
    with torch.no_grad(), trained.generating():
        ours = trained.model(ids).logits
        torch.testing.assert_close(plain(ids).logits, ours, atol=1e-5, rtol=1e-5)
        with plain.disable_adapter():
            assert not torch.allclose(plain(ids).logits, ours, atol=1e-3)


def test_the_trained_policy_is_what_was_saved(config: Config, tmp_path: Path, tiny_dir: Path, monkeypatch) -> None:
    """Logits of the policy in memory at the end equal those of the saved files under plain peft."""
    seen = {}
    from trueup.recipes.program import OfflineProgram

    save = OfflineProgram.save_model

    def spy(self: OfflineProgram, directory: Path, masters) -> None:
        save(self, directory, masters)
        with torch.no_grad(), self.policy.generating():
            seen["logits"] = self.policy.model(torch.arange(3, 40)[None]).logits

    monkeypatch.setattr(OfflineProgram, "save_model", spy)
    run(config(learning_rate=1e-2))
    base = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(torch.arange(3, 40)[None]).logits, seen["logits"], atol=1e-5, rtol=1e-5)


def test_bf16_keeps_fp32_masters(config: Config, tmp_path: Path) -> None:
    run(config(bf16=True, learning_rate=1e-5, max_steps=2))
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    moved = [tensor for name, tensor in saved.items() if "lora_B" in name]
    assert any(not torch.equal(t, t.bfloat16().float()) for t in moved), "masters must hold more than bf16 can"


@pytest.mark.parametrize("more", [{}, {"additional_target": "lm_head"}])
def test_a_continued_adapter_starts_from_its_fp32_values_in_bf16(config: Config, tmp_path: Path, more: dict) -> None:
    """An adapter that learns next to nothing is saved as it came: bf16 would have rounded it."""
    first, second = tmp_path / "first", tmp_path / "second"
    run(config(stage="sft", dataset="chats", max_steps=2, output_dir=str(first), **more))
    nothing = {"bf16": True, "learning_rate": 1e-30, "max_steps": 1, "adapter_name_or_path": str(first)}
    run(config(output_dir=str(second), **nothing, **more))
    before, after = (load_file(directory / "adapter_model.safetensors") for directory in (first, second))
    assert before.keys() == after.keys() and any("lora_B" in name for name in after)
    assert all(torch.equal(before[name], after[name]) for name in after)
    assert any(not torch.equal(t, t.bfloat16().float()) for t in after.values())


def test_it_learns_a_trait_of_held_out_answers(config: Config) -> None:
    """Chosen answers lack a marker that rejected ones end in: held-out accuracy goes to 1."""
    keys = {
        "eval_dataset": "held",
        "eval_strategy": "epoch",
        "num_train_epochs": 12,
        "learning_rate": 5e-3,
    }
    assert run(config(**keys)).metrics["eval_rewards/accuracies"] >= 0.95


def test_evaluating_a_checkpoint_trains_nothing(config: Config, tmp_path: Path) -> None:
    """Guide G3: an evaluation config on a trained adapter gives the figures its training ended with."""
    trained = run(config(eval_dataset="held", eval_strategy="epoch", learning_rate=1e-2)).metrics
    out = tmp_path / "out"
    before = tensors(out)
    cfg = config(
        do_eval=True,
        dataset=None,
        eval_dataset="held",
        adapter_name_or_path=str(out),
        output_dir=str(tmp_path / "evaluation"),
    )
    found = run(cfg).metrics
    for name in ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins", "eval_kl"):
        assert found[name] == pytest.approx(trained[name], rel=1e-4, abs=1e-5), name
    assert json.loads((tmp_path / "evaluation" / "eval_results.json").read_text(encoding="utf-8"))["eval_loss"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(out).items())


def test_evaluating_a_full_model_asks_for_a_reference(config: Config, tiny_dir: Path, tmp_path: Path) -> None:
    keys = {"do_eval": True, "dataset": None, "eval_dataset": "held", "output_dir": str(tmp_path / "e")}
    with pytest.raises(ConfigError, match="ref_model"):
        run(config(**keys))
    assert run(config(**keys, ref_model=str(tiny_dir))).metrics["eval_loss"] == pytest.approx(0.6931472, abs=1e-6)


def test_strict_turns_warnings_into_one_error(config: Config, tmp_path: Path, data_dir: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        run(config(eval_dataset="pairs", strict=True))
    assert "strict" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_check_takes_a_config_that_only_evaluates(config: Config, tiny_dir: Path) -> None:
    cfg = config(do_eval=True, dataset=None, eval_dataset="held", ref_model=str(tiny_dir))
    report = check(cfg)
    assert report.arithmetic.total_steps == 0 and report.disk_needed == 0
