"""`trueup runs`: the state of runs, told from their files alone."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from trueup.cli import main
from trueup.inference.runs import RunList, age, find_runs


def make_run(path: Path, state: str = "finished", pid: int = 0, ago: float = 0, **status) -> Path:
    path.mkdir(parents=True)
    row = {
        "step": 10,
        "loss": 0.52345,
        "rewards/accuracies": 0.875,
        "rewards/margins": 1.5,
        "kl": 0.01,
    }
    status = {
        "state": state,
        "pid": pid,
        "host": socket.gethostname(),
        "heartbeat": time.time() - ago,
        "step": 10,
        "total_steps": 40,
        **status,
    }
    (path / "status.json").write_text(json.dumps(status), encoding="utf-8")
    (path / "run.yaml").write_text("stage: dpo\nmodel_name_or_path: some/tiny-model\n", encoding="utf-8")
    rows = [row, {"step": 10, "eval_rewards/accuracies": 0.75}]
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"torn', encoding="utf-8")
    return path


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_a_run_is_told_in_a_line(tmp_path: Path):
    make_run(tmp_path / "lora" / "first")
    [run] = find_runs(tmp_path)
    assert (run.state, run.stage, run.step, run.total_steps) == ("finished", "dpo", 10, 40)
    assert run.metrics["rewards/accuracies"] == 0.875
    assert run.metrics["eval_rewards/accuracies"] == 0.75


def test_a_run_whose_process_is_gone_has_died(tmp_path: Path):
    make_run(tmp_path / "gone", state="running", pid=dead_pid())
    make_run(tmp_path / "here", state="running", pid=os.getpid())
    assert {run.path.name: run.state for run in find_runs(tmp_path)} == {
        "gone": "died",
        "here": "running",
    }


def test_the_latest_comes_first_and_what_is_inside_a_run_is_not_a_run(tmp_path: Path):
    make_run(tmp_path / "old", ago=5000)
    new = make_run(tmp_path / "new")
    make_run(new / "checkpoint-5")
    assert [run.path.name for run in find_runs(tmp_path)] == ["new", "old"]


def test_a_directory_of_another_tool_and_a_broken_one_are_listed(tmp_path: Path):
    foreign = tmp_path / "llamafactory"
    foreign.mkdir()
    (foreign / "trainer_log.jsonl").write_text('{"current_steps": 5, "loss": 1.25}\n', encoding="utf-8")
    broken = make_run(tmp_path / "broken")
    (broken / "run.yaml").write_text("a: [", encoding="utf-8")
    (broken / "status.json").write_text("{", encoding="utf-8")
    found = {run.path.name: run for run in find_runs(tmp_path)}
    assert found["llamafactory"].metrics == {"loss": 1.25}
    assert (found["broken"].state, found["broken"].model) == ("unknown", "")


def test_the_table_and_the_json_show_the_same_runs(tmp_path: Path):
    make_run(tmp_path / "first")
    table = CliRunner().invoke(main, ["runs", str(tmp_path)]).output
    for word in ("first", "finished", "dpo", "tiny-model", "10/40", "0.5234", "0.875"):
        assert word in table
    listed = json.loads(CliRunner().invoke(main, ["runs", str(tmp_path), "--json"]).output)["result"]
    assert listed[0]["path"] == str(tmp_path / "first")
    assert listed[0]["metrics"]["kl"] == 0.01


@pytest.mark.parametrize("width", [40, 80, 120])
def test_every_terminal_shows_whole_words(tmp_path: Path, width: int):
    make_run(tmp_path / "Qwen2.5-0.5B-Instruct" / "lora" / "dpo")
    make_run(tmp_path / "Qwen2.5-0.5B-Instruct" / "lora" / "dpo-2", state="running", pid=os.getpid())
    terminal = Console(file=io.StringIO(), width=width)
    terminal.print(RunList(find_runs(tmp_path), tmp_path))
    lines = terminal.file.getvalue().splitlines()
    assert len(lines) <= 10 and max(map(len, lines)) <= width
    text = " ".join(" ".join(lines).split())
    for words in ("Qwen2.5-0.5B-Instruct/lora/dpo", "running", "tiny-model", "10/40", "0.5234", "0.875", "0.75"):
        assert words in text


def test_no_runs_is_no_error_but_no_directory_is(tmp_path: Path):
    empty = CliRunner().invoke(main, ["runs", str(tmp_path)])
    assert (empty.exit_code, "no runs" in empty.output) == (0, True)
    result = CliRunner().invoke(main, ["runs", str(tmp_path / "nowhere")])
    assert result.exit_code == 2
    assert "there is no directory" in result.stderr and "nowhere" in result.stderr


@pytest.mark.parametrize(("seconds", "text"), [(-3, "0s"), (59, "59s"), (60, "1m"), (7200, "2h"), (200000, "2d")])
def test_age_in_its_largest_unit(seconds: float, text: str):
    assert age(seconds) == text
