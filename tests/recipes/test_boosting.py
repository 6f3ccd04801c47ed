"""`booster: auto`: tried once, told, kept with the run and on the machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from trueup.config.schema import RunConfig
from trueup.models import trial
from trueup.models.trial import Trial
from trueup.recipes import boosting
from trueup.recipes.run import run
from trueup.training.run_files import read_config

Config = Callable[..., RunConfig]
FASTER, SLOWER = (0.8,) * 5, (1.4,) * 5


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Trials that end so; a list that grows with each."""
    monkeypatch.setattr(trial, "WORTHWHILE", 0)

    def ending(ratios: tuple[float, ...], gap: float = 0.0) -> list[int]:
        made: list[int] = []

        def try_layer(policy, layer, tokens) -> Trial:
            made.append(tokens)
            return Trial(tokens, gap, 1e-4, tuple((ratio, 1.0) for ratio in ratios))

        monkeypatch.setattr(boosting, "try_layer", try_layer)
        return made

    return ending


def told(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


def losses(directory: Path) -> list[float]:
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_the_choice_is_told_and_stands_with_the_run(config: Config, found, tmp_path: Path, capsys) -> None:
    found(FASTER)
    run(config(max_steps=1, output_dir=str(tmp_path / "fused")))
    assert "fused layers take 0.80 of the time of the model's own by a trial" in told(capsys)
    assert read_config(tmp_path / "fused")["booster"] == "fused"
    assert json.loads((tmp_path / "fused" / "booster.json").read_text("utf-8"))["ratios"] == list(FASTER)


def test_a_real_trial_ends_in_a_choice(config: Config, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(trial, "WORTHWHILE", 0)
    run(config(max_steps=1, output_dir=str(tmp_path / "run")))
    said = json.loads((tmp_path / "run" / "booster.json").read_text("utf-8"))
    assert read_config(tmp_path / "run")["booster"] == said["booster"]
    assert said["agrees"]


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
    run(config(max_steps=1, finetuning_type="full", lora_rank=None, output_dir=str(tmp_path / "other")))
    assert len(made) == 1


def test_layers_that_compute_something_else_are_not_taken(config: Config, found, tmp_path: Path, caplog) -> None:
    found((), gap=0.5)
    run(config(max_steps=1, output_dir=str(tmp_path / "run")))
    assert (
        "fused layers give other numbers than this model's (0.5 of their size); it trains with its own" in caplog.text
    )
    assert read_config(tmp_path / "run")["booster"] == "attention"


def test_what_is_asked_for_by_name_and_small_models_are_not_tried(config, found, monkeypatch, tmp_path: Path) -> None:
    made = found(SLOWER)
    run(config(max_steps=1, booster="fused", output_dir=str(tmp_path / "named")))
    monkeypatch.setattr(trial, "WORTHWHILE", 10**9)
    run(config(max_steps=1, output_dir=str(tmp_path / "small")))
    assert made == []
    assert read_config(tmp_path / "small").get("booster", "auto") == "auto"
    assert not (tmp_path / "small" / "booster.json").exists()
