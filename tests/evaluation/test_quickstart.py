"""`trueup eval` finds what `trueup quickstart` found: the same models, the same requests, the same figures."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from tests.conftest import ROOT
from trueup.config.load import load_config
from trueup.errors import DivergenceError
from trueup.recipes.evaluation.evaluate import evaluate
from trueup.recipes.evaluation.report import EvaluationReport
from trueup.recipes.quickstart import QuickstartResult, quickstart

GRADES = ("formatted", "commented", "right", "all_three")


def evaluated(adapter: Path, output: Path, *words: str) -> EvaluationReport:
    """The example's evaluation, of a quickstart's adapter."""
    words = (f"eval_models=start,{adapter}", f"output_dir={output}", *words)
    return evaluate(load_config(ROOT / "examples" / "builtin_eval.yaml", words, verb="eval"))


def assert_same(report: EvaluationReport, done: QuickstartResult, slack: int = 1) -> None:
    """Every figure of the quickstart's table; `slack` answers that hang on a rounding may fall the other way."""
    for model, told in zip(report.models, (done.before, done.after), strict=True):
        for name in GRADES:
            expected = told.all if name == "all_three" else getattr(told, name)
            found = model.figures[f"score/{name}"]
            assert found.count == told.count
            assert found.value == pytest.approx(expected, abs=(slack + 0.01) / told.count), (model.name, name)
    start, end = (model.figures["accuracy"] for model in report.models)
    assert (start.value, end.value) == (0.5, pytest.approx(done.accuracy, abs=(slack + 0.01) / 100))


@pytest.fixture(autouse=True)
def at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)  # the example names its rewards from there
    monkeypatch.setenv("TRUEUP_CACHE", str(tmp_path / "cache"))


@pytest.mark.prove
def test_the_quickstarts_numbers_come_out_of_an_evaluation(tmp_path: Path):
    done = quickstart([f"output_dir={tmp_path / 'dpo'}"], Console(quiet=True))
    report = evaluated(done.output_dir, tmp_path / "eval")
    assert_same(report, done)
    print({model.name: {key: str(model.figures[f"score/{key}"]) for key in GRADES} for model in report.models})


def test_a_short_quickstart_and_an_evaluation_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Three steps: not what the quickstart reaches, but the same figures both ways."""
    kept: list[QuickstartResult] = []
    monkeypatch.setattr("trueup.recipes.quickstart.show", lambda console, cfg, outcome, *more: kept.append(outcome))
    short = [
        "bf16=false",
        "max_steps=3",
        "eval_strategy=no",
        "save_strategy=no",
        "regression_report=false",
        "plot_loss=false",
    ]
    few = ["eval_measures=preference,answers", "bootstrap_samples=0"]
    with pytest.raises(DivergenceError):  # it does not get where a whole one does
        quickstart([f"output_dir={tmp_path / 'dpo'}", *short], Console(quiet=True))
    report = evaluated(kept[0].output_dir, tmp_path / "eval", "bf16=false", *few)
    assert_same(report, kept[0], slack=3)
