"""Pairs built from the built-in model's own answers teach it what the rules ask for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import ROOT
from trueup.builtin import QUICKSTART_CONFIG
from trueup.builtin.sql import grade
from trueup.config.load import load_config
from trueup.recipes.preferences import build
from trueup.recipes.quickstart import answer, heldout
from trueup.recipes.run import run

EXAMPLE = ROOT / "examples" / "builtin_build.yaml"


def taught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int, **keys):
    """(report of the build, config of the training, its result): DPO on built pairs, as the quickstart trains."""
    monkeypatch.chdir(ROOT)  # where the example's files are
    words = [f"{key}={value}" for key, value in {"output_dir": tmp_path / "build", **keys}.items()]
    report = build(load_config(EXAMPLE, words, verb="build"))
    cfg = load_config(
        QUICKSTART_CONFIG,
        [f"dataset={report.output}", f"output_dir={tmp_path / 'dpo'}", f"max_steps={steps}", "learning_rate=5e-4",
         "eval_strategy=no", "save_strategy=no", "do_train=true", "do_eval=true", "plot_loss=false"],
    )  # fmt: skip
    return report, cfg, run(cfg)


@pytest.mark.slow
def test_pairs_by_rules_teach_held_out_preferences(tmp_path, monkeypatch):
    """The held-out pairs are the bundled ones: other prompts, and answers that this model did not write."""
    report, _, result = taught(tmp_path, monkeypatch, steps=24)
    assert report.kept >= 40 and report.complete
    assert result.metrics["eval_rewards/accuracies"] >= 0.9


@pytest.mark.prove
def test_and_it_answers_so(tmp_path, monkeypatch):
    report, cfg, result = taught(tmp_path, monkeypatch, steps=120, max_samples=960, num_generations=8)
    tasks = heldout(100)
    before, after = grade(answer(cfg, tasks), tasks), grade(answer(cfg, tasks, result.output_dir), tasks)
    accuracy = result.metrics["eval_rewards/accuracies"]
    print(f"{report.kept} pairs, held-out accuracy {accuracy:.2f}; greedy answers before {before}, after {after}")
    assert accuracy >= 0.9 and before.formatted <= 0.05
    assert after.formatted >= 0.9 and after.right >= 0.9
