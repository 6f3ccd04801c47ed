"""Where the time goes: phases do not overlap, cost nothing when nobody asks, and end up in a file and a table."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from toy_program import ToyProgram, settings

from trueup.training.backend import Single
from trueup.training.loop import fit
from trueup.training.observers import standard_observers
from trueup.training.profile import PHASES, PROFILE_FILE, Profile, phase, profiling, table
from trueup.training.run_directory import RunDirectory

CPU = torch.device("cpu")


def trained(path: Path, profile: bool, **changes) -> RunDirectory:
    keys = settings(profile=profile, max_steps=4, plot_loss=False, save_strategy="steps", save_steps=2, **changes)
    with RunDirectory.open(path, vars(keys)) as run:
        fit(ToyProgram(), keys, run, Single(), standard_observers(keys, run))
        return run


def test_an_inner_phase_is_not_counted_twice() -> None:
    profile = Profile(CPU)
    with profile.phase("forward"):
        time.sleep(0.02)
        with profile.phase("reference"):
            time.sleep(0.05)
    phases = profile.summary(steps=2)["phases"]
    assert phases["reference"]["seconds"] >= 0.05 > phases["forward"]["seconds"] >= 0.02
    assert phases["reference"]["seconds_per_step"] == pytest.approx(phases["reference"]["seconds"] / 2, rel=1e-3)
    assert sum(of["share"] for of in phases.values()) == pytest.approx(1, abs=1e-3)


def test_nothing_is_made_when_nobody_asks() -> None:
    assert phase("forward") is phase("backward")
    with profiling(False, CPU):
        assert phase("forward") is phase("backward")


def test_a_run_tells_where_its_time_went(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(tmp_path / "run", profile=True, do_eval=True)
    summary = json.loads((tmp_path / "run" / PROFILE_FILE).read_text(encoding="utf-8"))
    assert summary["steps"] == 4
    assert list(summary["phases"]) == list(PHASES)
    spent = {name for name, of in summary["phases"].items() if of["seconds"]}
    assert {"data", "forward", "backward", "optimizer", "save"} <= spent
    shown = capsys.readouterr().out
    assert table(summary) in shown
    assert max(map(len, table(summary).splitlines())) <= 80


def test_a_profile_changes_no_number(tmp_path: Path) -> None:
    def losses(profile: bool) -> list[float]:
        run = trained(tmp_path / str(profile), profile=profile)
        rows = (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(row)["loss"] for row in rows]

    assert losses(True) == losses(False)
    assert not (tmp_path / "False" / PROFILE_FILE).exists()
