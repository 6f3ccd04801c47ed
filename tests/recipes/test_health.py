"""Runs that go wrong say so while it happens, runs that go well say nothing: the built-in model on its own pairs.

The settings are those of a trial with a model of this kind: two of them reach accuracy 1 with a beautiful margin, and
generate garbage. The quickstart's own settings run whole with `make prove`, and their first steps always.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from trueup.builtin import QUICKSTART_CONFIG
from trueup.config.load import load_config
from trueup.recipes.run import run
from trueup.training.run_directory import read_status

prove = pytest.mark.prove


def warnings_of(tmp_path: Path, **keys) -> list[tuple[int, str]]:
    """(step, text) of what a run of the quickstart's config with these keys has warned of."""
    watched = {"logging_steps": 2, "eval_strategy": "no", "save_strategy": "no", "do_eval": False, "plot_loss": False,
               "eval_dataset": ""}  # fmt: skip
    words = [f"{key}={value}" for key, value in {**watched, **keys, "output_dir": tmp_path / "out"}.items()]
    result = run(load_config(QUICKSTART_CONFIG, words))
    return [(found["step"], found["text"]) for found in read_status(result.output_dir).get("warnings", [])]


TRIAL = {"lr_scheduler_type": "constant", "warmup_ratio": 0, "pref_ftx": 0}


@pytest.mark.parametrize(
    "keys, steps",
    [({"learning_rate": 1e-3, "pref_beta": 0.1}, 30),  # of 150
     pytest.param({"learning_rate": 3e-4, "pref_beta": 0.1}, 60, marks=prove),  # of 300
     pytest.param({"learning_rate": 1e-3, "pref_beta": 0.02}, 40, marks=prove)],
)  # fmt: skip
def test_settings_that_collapse_warn_early(tmp_path: Path, keys: dict, steps: int):
    said = warnings_of(tmp_path, **TRIAL, **keys, max_steps=steps)
    assert any("chosen reward falls below zero" in text for _, text in said), said


@pytest.mark.parametrize(
    "keys",
    [{"max_steps": 20},
     pytest.param({}, marks=prove),
     pytest.param({**TRIAL, "learning_rate": 1e-4, "pref_beta": 0.1, "max_steps": 80}, marks=prove),
     pytest.param({**TRIAL, "learning_rate": 2e-4, "pref_beta": 0.1, "pref_ftx": 1.0, "max_steps": 120}, marks=prove),
     pytest.param({**TRIAL, "learning_rate": 3e-4, "pref_beta": 0.3, "pref_ftx": 0.3, "max_steps": 150}, marks=prove)],
)  # fmt: skip
def test_settings_that_go_well_never_warn(tmp_path: Path, keys: dict):
    assert warnings_of(tmp_path, **keys) == []
