"""`batch_tokens: auto`: micro-batches as the device takes them, at the effective batch that was asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from trueup.config.load import load_config
from trueup.config.schema import RunConfig
from trueup.errors import ConfigError
from trueup.models import estimate
from trueup.models.memory import LayerCosts
from trueup.recipes import budget
from trueup.recipes.budget import settled, tokens_that_fit
from trueup.recipes.check import check
from trueup.recipes.run import run
from trueup.training.run_files import read_config

Config = Callable[..., RunConfig]
CPU, GPU = torch.device("cpu"), torch.device("cuda")
COSTS = LayerCosts(layers=10, kept=100, entry=10, outside=5, passing=20)


def small(monkeypatch: pytest.MonkeyPatch, tokens: int, enough: int = 1024) -> None:
    """A device on which no more tokens than this fit, recomputed or not."""
    monkeypatch.setattr(budget, "ENOUGH", {"cpu": enough})
    monkeypatch.setattr(budget, "tokens_that_fit", lambda *given: tokens)


def losses(directory: Path) -> list[float]:
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_as_many_tokens_as_are_worth_it_and_fit() -> None:
    assert tokens_that_fit("auto", COSTS, 1 << 40, CPU) == 4096 < tokens_that_fit("auto", COSTS, 1 << 40, GPU)
    assert tokens_that_fit("off", COSTS, COSTS.needed(4096) - 1, CPU) == 2048
    assert tokens_that_fit("auto", COSTS, COSTS.needed(512), CPU) == 512


def test_layers_recompute_before_micro_batches_become_thin() -> None:
    room = COSTS.needed(512) - 1
    assert COSTS.needed(2048, 10) <= room < COSTS.needed(4096, 10)
    assert tokens_that_fit("auto", COSTS, room, CPU) == 2048
    assert tokens_that_fit("off", COSTS, room, CPU) == 256
    assert tokens_that_fit("auto", COSTS, 0, CPU) == 64


def test_a_step_learns_from_the_same_rows_whatever_fits(config: Config, tmp_path, monkeypatch, capsys) -> None:
    keys = {"max_steps": 2, "gradient_accumulation_steps": 2}
    run(config(output_dir=str(tmp_path / "rows"), **keys))
    told = {}
    automatic = {"per_device_train_batch_size": "auto", "gradient_accumulation_steps": 1}  # of 8 rows
    for tokens, asked in ((1024, {"auto_find_batch_size": True}), (64, automatic)):
        small(monkeypatch, tokens)
        capsys.readouterr()
        run(config(output_dir=str(tmp_path / f"{tokens}"), **{**keys, **asked}))
        told[tokens] = " ".join(capsys.readouterr().out.split())
        assert losses(tmp_path / f"{tokens}") == pytest.approx(losses(tmp_path / "rows"), rel=1e-4)
        assert read_config(tmp_path / f"{tokens}")["batch_tokens"] == tokens
    assert "= 8 rows a step, in micro-batches of at most 64 tokens" in told[64]


def test_a_resume_keeps_what_the_run_had(config: Config, tmp_path, monkeypatch) -> None:
    keys = {
        "batch_tokens": "auto",
        "max_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "lr_scheduler_type": "constant",
    }
    small(monkeypatch, 64)
    run(config(output_dir=str(tmp_path / "whole"), **keys))
    cut = tmp_path / "cut"
    run(config(output_dir=str(cut), **{**keys, "max_steps": 1}))
    small(monkeypatch, 1024)
    for resume in ("auto", str(cut / "checkpoint-1")):
        assert settled(config(output_dir=str(cut), resume_from_checkpoint=resume, **keys)).data.batch_tokens == 64
    assert settled(config(output_dir=str(cut), **keys)).data.batch_tokens == 1024
    run(config(output_dir=str(cut), resume_from_checkpoint="auto", **keys))
    assert losses(cut)[1:] == losses(tmp_path / "whole")[1:]


def test_check_says_what_the_run_will_do(config: Config, monkeypatch) -> None:
    monkeypatch.setattr(estimate, "free_memory", lambda device: 1 << 40)
    report = check(config(batch_tokens="auto", finetuning_type="full", lora_rank=None))
    assert report.cfg.data.batch_tokens == budget.ENOUGH["cpu"]
    assert "in micro-batches of at most 4,096 tokens" in report.render()


def test_an_automatic_batch_size_leaves_the_rows_of_a_step_as_they_are(tmp_path: Path) -> None:
    """It is another spelling of `batch_tokens: auto`, and the last word on either key counts."""
    keys = {"model_name_or_path": "m", "dataset": "dpo_en_demo"}

    def read(words: tuple[str, ...] = (), **more) -> tuple:
        cfg = load_config({**keys, **more}, words)
        return cfg.train.per_device_train_batch_size, cfg.data.batch_tokens

    assert read(per_device_train_batch_size="auto") == (8, "auto")
    assert read(("per_device_train_batch_size=auto",), per_device_train_batch_size=4) == (4, "auto")
    assert read(("per_device_train_batch_size=4",), per_device_train_batch_size="auto") == (4, None)
    assert read(("batch_tokens=512",), per_device_train_batch_size="auto") == (8, 512)
    with pytest.raises(ConfigError, match="with different values"):
        read(per_device_train_batch_size="auto", batch_tokens=512)


def test_answers_still_to_be_written_are_not_counted() -> None:
    keys = {"stage": "grpo", "model_name_or_path": "m", "dataset": "alpaca_en_demo", "reward_funcs": "f.py:g"}
    for key in ("batch_tokens", "per_device_train_batch_size"):
        with pytest.raises(ConfigError, match="still to be written"):
            load_config({**keys, key: "auto"})
