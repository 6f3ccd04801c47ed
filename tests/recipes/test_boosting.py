"""`booster: auto`: tried once, told, kept with the run and on the machine; nothing about it stops a run."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.training.processes import needs_fork, run_ranks
from trueup.config.schema import RunConfig
from trueup.models import booster, trial
from trueup.models.fused import fused_modules
from trueup.models.trial import Trial, trial_tokens
from trueup.recipes import boosting, offline
from trueup.recipes.run import run
from trueup.training.run_files import read_config

Config = Callable[..., RunConfig]
FASTER, SLOWER = (0.8,) * 5, (1.4,) * 5


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Trials that end so; a list that grows with each."""
    monkeypatch.setattr(trial, "WORTHWHILE", 0)

    def ending(ratios: tuple[float, ...]) -> list[int]:
        made: list[int] = []

        def time_layer(policy, layer) -> Trial:
            made.append(trial_tokens(layer, policy.device))
            return Trial(made[-1], tuple((ratio, 1.0) for ratio in ratios))

        monkeypatch.setattr(boosting, "time_layer", time_layer)
        return made

    return ending


def told(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


def chosen(directory: Path) -> dict:
    return json.loads((directory / "booster.json").read_text("utf-8"))


def losses(directory: Path) -> list[float]:
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_the_choice_is_told_and_stands_with_the_run(config: Config, found, tmp_path: Path, capsys) -> None:
    found(FASTER)
    run(config(max_steps=1, output_dir=str(tmp_path / "fused")))
    assert "fused layers take 0.80 of the time of the model's own by a trial" in told(capsys)
    assert read_config(tmp_path / "fused")["booster"] == "fused"
    said = chosen(tmp_path / "fused")
    assert said["ratios"] == list(FASTER)
    assert said["seconds"] == [[0.8, 1.0]] * 5
    assert said["agrees"] and said["gap"] <= 1e-4


def test_a_real_trial_ends_in_a_choice(config: Config, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(trial, "WORTHWHILE", 0)
    run(config(max_steps=1, output_dir=str(tmp_path / "run")))
    said = chosen(tmp_path / "run")
    assert read_config(tmp_path / "run")["booster"] == said["booster"]
    assert said["agrees"] and said["failed"] is None


def test_a_resume_keeps_what_the_run_had(config: Config, found, tmp_path: Path, capsys) -> None:
    keys = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}
    found(SLOWER)
    run(config(output_dir=str(tmp_path / "whole"), max_steps=2, **keys))
    cut = tmp_path / "cut"
    run(config(output_dir=str(cut), max_steps=1, **keys))
    assert "auto: transformers' own layers; fused layers take 1.40 of the time" in told(capsys)
    made = found(FASTER)
    run(config(output_dir=str(cut), max_steps=2, resume_from_checkpoint="auto", **keys))
    assert made == []
    assert "attention: transformers' own layers" in told(capsys)
    assert read_config(cut)["booster"] == "attention"
    assert losses(cut)[1:] == losses(tmp_path / "whole")[1:]


def test_the_machine_keeps_a_choice(config: Config, found, tmp_path: Path, capsys) -> None:
    found(SLOWER)
    run(config(max_steps=1, output_dir=str(tmp_path / "first")))
    made = found(FASTER)
    capsys.readouterr()
    run(config(max_steps=1, seed=7, output_dir=str(tmp_path / "second")))
    assert made == []
    assert "by an earlier trial" in told(capsys)
    assert read_config(tmp_path / "second")["booster"] == "attention"
    kept = Path(chosen(tmp_path / "second")["earlier"])  # the file to delete
    run(config(max_steps=1, per_device_train_batch_size=2, output_dir=str(tmp_path / "smaller")))
    assert made == []
    run(config(max_steps=1, finetuning_type="full", lora_rank=None, output_dir=str(tmp_path / "other")))
    assert len(made) == 1
    kept.unlink()
    run(config(max_steps=1, output_dir=str(tmp_path / "third")))
    assert read_config(tmp_path / "third")["booster"] == "fused"


GARBAGE = [
    "", "{", "[]", "null", '{"booster": "liger"}', '{"seconds": 1}', '{"seconds": [[1]]}', '{"seconds": [[0, 1]]}',
    '{"seconds": [[NaN, 1]]}', '{"seconds": [["a", 1]]}', "\x00",
]  # fmt: skip


@pytest.mark.parametrize("text", GARBAGE)
def test_a_file_that_is_none_is_not_taken(text: str, tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    path.write_text(text, encoding="utf-8")
    assert boosting._kept(path) == ()


def test_files_that_cannot_be_read_or_written_are_harmless(tmp_path: Path, config: Config, found, monkeypatch) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x80")
    for path in (tmp_path / "bytes", tmp_path / "nothing", tmp_path):
        assert boosting._kept(path) == ()
    (tmp_path / "file").write_text("no directory", encoding="utf-8")
    monkeypatch.setattr(boosting, "_place", lambda *given: tmp_path / "file" / "booster" / "key.json")
    made = found(SLOWER)
    run(config(max_steps=1, output_dir=str(tmp_path / "run")))
    assert len(made) == 1
    assert read_config(tmp_path / "run")["booster"] == "attention"


def test_a_trial_that_fails_does_not_stop_a_run(config: Config, found, tmp_path: Path, monkeypatch, caplog) -> None:
    def fails(*given) -> Trial:
        raise RuntimeError("out of memory")

    found(SLOWER)
    monkeypatch.setattr(boosting, "time_layer", fails)
    run(config(max_steps=1, output_dir=str(tmp_path / "run")))
    assert "the trial of its layers failed (RuntimeError: out of memory); it trains with fused layers" in caplog.text
    assert read_config(tmp_path / "run")["booster"] == "fused"
    assert chosen(tmp_path / "run")["failed"] == "RuntimeError: out of memory"


@needs_fork
@pytest.mark.parametrize("cause", ["the trial fails", "one process finds other numbers"])
def test_processes_train_with_the_same_layers(cause: str, config: Config, found, tmp_path: Path, monkeypatch) -> None:
    def fails(*given) -> Trial:
        raise RuntimeError("out of memory")

    found(SLOWER)
    if cause == "the trial fails":
        monkeypatch.setattr(boosting, "time_layer", fails)
    else:
        monkeypatch.setattr(booster, "disagreement", lambda policy: math.inf if os.environ["RANK"] == "1" else 0.0)
    fit = offline.fit

    def noted(program, *given, **keywords):
        assert bool(fused_modules(program.policy.model)) == (cause == "the trial fails")
        return fit(program, *given, **keywords)

    monkeypatch.setattr(offline, "fit", noted)
    cfg = config(max_steps=1, per_device_train_batch_size=2, output_dir=str(tmp_path / "run"))
    assert run_ranks(lambda: run(cfg)) == [0, 0]
    assert read_config(tmp_path / "run")["booster"] == ("fused" if cause == "the trial fails" else "attention")


@pytest.mark.parametrize("asked", ["auto", "fused"])
def test_layers_that_compute_something_else_are_not_taken(
    config: Config, found, asked: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    made = found(FASTER)
    run(config(max_steps=1, output_dir=str(tmp_path / "earlier")))
    assert len(made) == 1  # which the machine keeps
    monkeypatch.setattr(booster, "disagreement", lambda policy: math.inf)
    run(config(max_steps=1, booster=asked, output_dir=str(tmp_path / "run")))
    assert len(made) == 1
    assert "fused layers give other numbers than this model's own" in told(capsys)
    assert read_config(tmp_path / "run")["booster"] == "attention"
    text = (tmp_path / "run" / "booster.json").read_text("utf-8")
    assert "Infinity" not in text
    assert not json.loads(text)["agrees"]


def test_micro_batches_are_sized_for_the_layers_that_were_chosen(config: Config, found, tmp_path, monkeypatch) -> None:
    sized: list[str] = []
    settled = offline.settled

    def noted(cfg: RunConfig, *given) -> RunConfig:
        sized.append(cfg.model.booster)
        return settled(cfg, *given)

    monkeypatch.setattr(offline, "settled", noted)
    found(SLOWER)
    run(config(max_steps=1, batch_tokens="auto", output_dir=str(tmp_path / "run")))
    assert sized == ["attention"]


def test_what_is_asked_for_by_name_and_small_models_are_not_tried(config, found, monkeypatch, tmp_path: Path) -> None:
    made = found(SLOWER)
    run(config(max_steps=1, booster="fused", output_dir=str(tmp_path / "named")))
    monkeypatch.setattr(trial, "WORTHWHILE", 10**9)
    run(config(max_steps=1, output_dir=str(tmp_path / "small")))
    assert made == []
    assert read_config(tmp_path / "small").get("booster", "auto") == "auto"
    assert not (tmp_path / "small" / "booster.json").exists()
