"""What is told before a run instead of in its middle: schedules that cannot be made, metrics nobody reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trueup.config.load import load_config
from trueup.config.schema import RunConfig
from trueup.errors import ConfigError
from trueup.recipes.check import check
from trueup.recipes.offline import run
from trueup.recipes.reported import metric_names

TINY = {
    "model_name_or_path": "builtin:sql-tiny",
    "dataset": "sql_pairs_demo",
    "max_samples": 8,
    "val_size": 4,
    "cutoff_len": 128,
    "max_steps": 1,
    "report_to": "none",
    "plot_loss": False,
}
BEST = {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"}


def config(directory: Path, **keys) -> RunConfig:
    return load_config({**TINY, "stage": "dpo", "output_dir": str(directory / "run"), **keys})


@pytest.mark.parametrize(
    "keys",
    [
        {"lr_scheduler_type": "cosine_with_min_lr"},
        {"lr_scheduler_type": "warmup_stable_decay"},
        {"lr_scheduler_kwargs": {"no_such_argument": 1}},
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1.0}},
    ],
)
def test_a_schedule_that_cannot_be_made_is_refused_before_anything_is_written(tmp_path: Path, keys):
    for work in (check, run):
        with pytest.raises(ConfigError, match="lr_scheduler_type"):
            work(config(tmp_path, **keys))
    assert not (tmp_path / "run").exists()


def test_a_metric_that_nobody_reports_is_refused_with_the_nearest_one(tmp_path: Path):
    for work in (check, run):
        with pytest.raises(ConfigError) as caught:
            work(config(tmp_path, metric_for_best_model="eval_rewards/acuracies", **BEST))
        assert caught.value.problems[0].fix == "did you mean rewards/accuracies?"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("keys", [{"pref_ftx": 0.5}, {"stage": "sft", "dataset": "alpaca_en_demo"}])
def test_the_names_told_before_a_run_are_those_it_reports(tmp_path: Path, keys):
    cfg = config(tmp_path, **keys)
    run(cfg)
    results = json.loads((tmp_path / "run" / "eval_results.json").read_text(encoding="utf-8"))
    timed = {"eval_runtime", "eval_samples_per_second", "epoch"}
    assert {f"eval_{name}" for name in metric_names(cfg)} == results.keys() - timed
