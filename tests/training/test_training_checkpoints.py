"""Checkpoints are transactions: whatever happens while one is written, a valid one remains."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from processes import fork, has_checkpoint, needs_fork, run_forked, wait
from toy_program import run_toy

from trueup.errors import CorruptStateError, ResourceError
from trueup.training import checkpoint as checkpoints
from trueup.training import durable
from trueup.training import state as states
from trueup.training.loop import WALL_CLOCK
from trueup.training.run_directory import read_metrics, read_status

KEYS = dict(max_steps=6, save_strategy="steps", save_steps=2, logging_steps=1)


def result_of(directory: Path):
    rows = [{k: v for k, v in row.items() if k not in WALL_CLOCK} for row in read_metrics(directory)]
    return (directory / "model.safetensors").read_bytes(), rows


def commit(parent: Path, step: int, reason: str = "schedule", text: str = "x"):
    return checkpoints.commit(parent, step, lambda d: (d / "a.txt").write_text(text, "utf-8"), reason=reason)


# --- the manifest -----------------------------------------------------------------------------


def test_manifest_names_size_and_hash_of_every_file(tmp_path):
    run_toy(tmp_path / "run", **KEYS)
    path = tmp_path / "run" / "checkpoint-2"
    manifest = json.loads((path / "manifest.json").read_text("utf-8"))
    on_disk = {p.name for p in path.iterdir()} - {"manifest.json"}
    assert {entry["name"] for entry in manifest["files"]} == on_disk
    assert manifest["format_version"] == 1 and manifest["data_fingerprint"] == "toy"
    assert len(manifest["config_hash"]) == 64
    for entry in manifest["files"]:
        assert entry["sha256"] == durable.sha256(path / entry["name"])


def test_files_in_subdirectories_count(tmp_path):
    def write(directory: Path) -> None:
        (directory / "adapters" / "reference").mkdir(parents=True)
        (directory / "adapters" / "reference" / "a.txt").write_text("x", "utf-8")

    checkpoints.commit(tmp_path, 1, write)
    assert checkpoints.verify(tmp_path / "checkpoint-1").manifest["files"][0]["name"] == ("adapters/reference/a.txt")
    (tmp_path / "checkpoint-1" / "adapters" / "reference" / "a.txt").write_text("y", "utf-8")
    with pytest.raises(CorruptStateError):
        checkpoints.verify(tmp_path / "checkpoint-1")


def test_no_pickle_in_a_checkpoint(tmp_path):
    run_toy(tmp_path / "run", **KEYS)
    suffixes = {p.suffix for p in (tmp_path / "run" / "checkpoint-2").rglob("*")}
    assert suffixes == {".json", ".safetensors"}


# --- corruption -------------------------------------------------------------------------------

FILES = ["model", "masters", "optimizer", "random"]
FILES = [f"{name}.safetensors" for name in FILES] + ["trainer_state.json", "manifest.json"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("saved") / "run"
    run_toy(directory, **KEYS)
    return directory


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_falls_back_to_the_previous_checkpoint(saved, tmp_path, caplog, name, damage):
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    file = run / "checkpoint-6" / name
    data = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        middle = len(data) // 2
        file.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    else:
        file.unlink()
    with pytest.raises(CorruptStateError) as caught:
        checkpoints.verify(run / "checkpoint-6")
    assert name in str(caught.value)
    if damage == "flipped" and name != "manifest.json":
        assert durable.sha256(file) in str(caught.value)
        assert durable.sha256(saved / "checkpoint-6" / name) in str(caught.value)
    run_toy(run, resume="auto", config={"output_dir": str(saved)}, **KEYS)
    assert "checkpoint-6 cannot be trusted and is passed over" in caplog.text
    assert result_of(run) == result_of(saved)


def test_a_damaged_checkpoint_that_was_named_is_an_error(saved, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    with open(run / "checkpoint-6" / "optimizer.safetensors", "ab") as file:
        file.write(b"more")
    with pytest.raises(CorruptStateError) as caught:
        run_toy(run, resume=str(run / "checkpoint-6"), **KEYS)
    assert caught.value.exit_code == 7
    assert "optimizer.safetensors" in str(caught.value)


def test_another_format_version_is_refused_by_name(saved, tmp_path):
    shutil.copytree(saved / "checkpoint-2", tmp_path / "checkpoint-2")
    file = tmp_path / "checkpoint-2" / "manifest.json"
    file.write_text(file.read_text("utf-8").replace('"format_version": 1', '"format_version": 99'))
    with pytest.raises(CorruptStateError, match="format version 99"):
        checkpoints.verify(tmp_path / "checkpoint-2")


def test_a_foreign_checkpoint_is_no_checkpoint(tmp_path):
    foreign = tmp_path / "checkpoint-5"
    foreign.mkdir()
    (foreign / "trainer_state.json").write_text("{}", "utf-8")
    assert checkpoints.newest_valid(tmp_path) is None
    assert foreign.is_dir()


def test_newest_is_by_number_not_by_time(tmp_path):
    commit(tmp_path, 10)
    commit(tmp_path, 9)
    os.utime(tmp_path / "checkpoint-10", (1, 1))
    newest = checkpoints.newest_valid(tmp_path)
    assert newest is not None and newest.step == 10


# --- a full or failing disk -------------------------------------------------------------------


@pytest.mark.parametrize("code", ["ENOSPC", "EIO"])
@pytest.mark.parametrize("boundary", [2, 5, 9])
def test_a_disk_that_refuses_leaves_the_last_checkpoint(tmp_path, monkeypatch, boundary, code, saved):
    run = tmp_path / "run"
    config = {"output_dir": str(saved)}
    run_toy(run, config=config, **{**KEYS, "max_steps": 2})
    durable._boundaries_passed.clear()
    monkeypatch.setenv("TRUEUP_FAULT_AT", f"checkpoint:write:{boundary}:{code}")
    with pytest.raises(ResourceError) as caught:
        run_toy(run, resume="auto", config=config, **KEYS)
    monkeypatch.delenv("TRUEUP_FAULT_AT")
    assert caught.value.exit_code == 4
    assert os.strerror(getattr(errno, code)) in str(caught.value)
    assert "resume_from_checkpoint: auto" in str(caught.value)
    assert not list(run.glob(".*.tmp-*"))
    newest = checkpoints.newest_valid(run)
    assert newest is not None and newest.step in (2, 4)
    assert read_status(run)["state"] == "failed"
    run_toy(run, resume="auto", config=config, **KEYS)
    assert result_of(run)[0] == result_of(saved)[0]


def test_a_full_disk_under_the_metrics_is_one_clear_error(tmp_path, monkeypatch):
    durable._boundaries_passed.clear()
    monkeypatch.setenv("TRUEUP_FAULT_AT", "metrics:write:2:ENOSPC")
    with pytest.raises(ResourceError, match="metrics.jsonl"):
        run_toy(tmp_path / "run", **KEYS)


# --- kill -9 ----------------------------------------------------------------------------------


def kill_at_every_boundary(tmp_path: Path, whole: Path, stride: int) -> int:
    """Kill a run at each boundary, resume it, compare. Returns how many boundaries there were."""
    config = {"output_dir": str(whole)}
    keys = KEYS | dict(save_total_limit=2)
    number, reached = 1, 0
    while True:
        run = tmp_path / f"killed-{number}"
        code = run_forked(
            lambda run=run: run_toy(run, config=config, **keys),
            TRUEUP_FAULT_AT=f"checkpoint:write:{number}",
        )
        if code == 0:
            return reached
        assert code == -signal.SIGKILL
        valid = checkpoints.all_valid(run)
        run_toy(run, resume="auto", config=config, **keys)
        assert result_of(run) == result_of(whole), number
        assert not list(run.glob(".*.tmp-*")), number
        assert len(valid) <= len(checkpoints.all_valid(run)) or len(valid) >= 2
        shutil.rmtree(run)
        number, reached = number + stride, reached + 1


@needs_fork
def test_killed_at_write_boundaries_resumes_to_the_bit(saved, tmp_path):
    assert kill_at_every_boundary(tmp_path, saved, stride=4) > 8


@pytest.mark.prove
@needs_fork
def test_killed_at_every_write_boundary_resumes_to_the_bit(saved, tmp_path):
    assert kill_at_every_boundary(tmp_path, saved, stride=1) > 32


def kill_at_random_times(run: Path, whole: Path, times: int, keys: dict) -> None:
    """Kill one run again and again while it saves at every step; what is left always goes on."""
    dice = random.Random(5)
    killed = 0
    while killed < times:
        pid = fork(lambda: run_toy(run, resume="auto", config={"output_dir": str(whole)}, **keys))
        time.sleep(dice.uniform(0.0, 0.4))
        os.kill(pid, signal.SIGKILL)
        code = wait(pid)
        assert code in (0, -signal.SIGKILL)
        if code == 0:  # it was done before we were: begin anew
            assert result_of(run) == result_of(whole)
            shutil.rmtree(run)
        else:
            killed += 1
            if has_checkpoint(run):
                assert checkpoints.newest_valid(run) is not None
    run_toy(run, resume="auto", config={"output_dir": str(whole)}, **keys)
    assert result_of(run) == result_of(whole)


@pytest.mark.parametrize("times", [6, pytest.param(60, marks=pytest.mark.prove)], ids=["few", "many"])
@needs_fork
def test_killed_at_random_times_resumes_to_the_bit(tmp_path, times):
    keys = dict(max_steps=30, save_strategy="steps", save_steps=1, save_total_limit=3, logging_steps=4)
    run_toy(tmp_path / "whole", **keys)
    kill_at_random_times(tmp_path / "run", tmp_path / "whole", times, keys)


# --- retention and stale stages ---------------------------------------------------------------


def steps_in(directory: Path) -> list[int]:
    return sorted(checkpoints.step_of(path) for path in checkpoints.checkpoints(directory))


def test_retention_keeps_the_newest_and_the_best(tmp_path):
    valid = [commit(tmp_path, step) for step in (1, 2, 3, 4, 5)]
    remaining = checkpoints.retain(valid, 3, best_step=1)
    assert [c.step for c in remaining] == steps_in(tmp_path) == [1, 3, 4, 5]


def test_retention_never_leaves_fewer_than_two(tmp_path):
    valid = [commit(tmp_path, step) for step in (1, 2, 3)]
    checkpoints.retain(valid, 1, best_step=None)
    assert steps_in(tmp_path) == [2, 3]


def test_without_a_limit_only_superseded_best_ones_go(tmp_path):
    reasons = {1: "schedule", 2: "best", 3: "schedule", 4: "best", 5: "schedule", 6: "schedule"}
    valid = [commit(tmp_path, step, reason) for step, reason in reasons.items()]
    checkpoints.retain(valid, None, best_step=4)
    assert steps_in(tmp_path) == [1, 3, 4, 5, 6]


def test_retention_does_not_count_what_is_damaged(tmp_path):
    run_toy(tmp_path / "run", **KEYS)
    (tmp_path / "run" / "checkpoint-4" / "masters.safetensors").unlink()
    run_toy(
        tmp_path / "run", resume="auto",
        **{**KEYS, "max_steps": 8, "save_total_limit": 2, "lr_scheduler_type": "constant"},
    )  # fmt: skip
    assert steps_in(tmp_path / "run") == [4, 6, 8]  # the damaged one is reported, never deleted


def test_a_resume_reads_every_byte_of_the_last_two_only(tmp_path, monkeypatch):
    for step in (1, 2, 3, 4):
        commit(tmp_path, step)
    (tmp_path / "checkpoint-1" / "a.txt").write_bytes(b"")
    read = []
    whole = durable.sha256
    monkeypatch.setattr(durable, "sha256", lambda path: read.append(path.parent.name) or whole(path))
    assert [found.step for found in checkpoints.all_valid(tmp_path)] == [2, 3, 4]
    assert set(read) == {"checkpoint-3", "checkpoint-4"}


def test_the_best_checkpoint_is_verified_before_it_is_loaded(tmp_path):
    run_toy(tmp_path / "run", **KEYS)
    path = tmp_path / "run" / "checkpoint-2" / "masters.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CorruptStateError, match=r"masters.safetensors"):
        states.load_best_masters(path.parent, None)


def test_a_rename_waits_for_a_reader_on_windows(tmp_path, monkeypatch):
    attempts = []

    def rename(source, target):
        attempts.append(source)
        if len(attempts) < 3:
            raise PermissionError("in use")

    monkeypatch.setattr("os.rename", rename)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(PermissionError):
        durable.rename(tmp_path / "a", tmp_path / "b")
    monkeypatch.setattr("sys.platform", "win32")
    durable.rename(tmp_path / "a", tmp_path / "b")
    assert len(attempts) == 3


def test_a_checkpoint_deleted_by_hand_does_not_hurt(tmp_path):
    valid = [commit(tmp_path, step) for step in (1, 2, 3)]
    shutil.rmtree(tmp_path / "checkpoint-1")
    assert [c.step for c in checkpoints.retain(valid, 2, None)] == [2, 3]


def test_save_total_limit_in_a_run(tmp_path):
    run_toy(tmp_path / "run", **{**KEYS, "save_steps": 1, "save_total_limit": 2})
    assert steps_in(tmp_path / "run") == [5, 6]


def test_saving_over_a_checkpoint_sets_the_old_one_aside(tmp_path):
    commit(tmp_path, 1, text="old")
    commit(tmp_path, 1, text="new")
    assert (tmp_path / "checkpoint-1" / "a.txt").read_text("utf-8") == "new"
    assert (tmp_path / "checkpoint-1.set-aside-1" / "a.txt").read_text("utf-8") == "old"


@needs_fork
def test_stale_stages_go_only_when_their_process_is_dead(tmp_path):
    living = fork(lambda: time.sleep(60))
    dead = fork(lambda: None)
    wait(dead)
    for pid in (living, dead):
        (tmp_path / f".checkpoint-3.tmp-{pid}").mkdir()
    checkpoints.remove_stale_stages(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [f".checkpoint-3.tmp-{living}"]
    os.kill(living, signal.SIGKILL)
    wait(living)


def test_save_only_model_holds_no_state_and_is_not_resumed(tmp_path, caplog):
    run_toy(tmp_path / "run", save_only_model=True, **KEYS)
    names = {p.name for p in (tmp_path / "run" / "checkpoint-2").iterdir()}
    assert names == {"model.safetensors", "config.json", "manifest.json"}
    assert checkpoints.newest_valid(tmp_path / "run") is None
    assert "holds only the model" in caplog.text
    with pytest.raises(CorruptStateError, match="only the model"):
        run_toy(tmp_path / "run", resume=str(tmp_path / "run" / "checkpoint-2"), **KEYS)


def test_final_model_is_replaced_file_by_file(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"old")

    def fails(directory: Path) -> None:
        (directory / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ResourceError):
        checkpoints.replace_files(tmp_path, fails)
    assert (tmp_path / "model.safetensors").read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    checkpoints.replace_files(tmp_path, lambda d: (d / "model.safetensors").write_bytes(b"new"))
    assert (tmp_path / "model.safetensors").read_bytes() == b"new"
