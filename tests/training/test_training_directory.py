"""The run directory: who may write there, what is in it, and what survives."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from processes import fork, has_checkpoint, needs_fork, wait, wait_until
from toy_program import ToyProgram, run_toy

from trueup.errors import ConfigError, CorruptStateError, ResourceError
from trueup.training.backend import Single
from trueup.training.compatibility import check_resumable
from trueup.training.environment import describe_environment
from trueup.training.evaluation import evaluate_run
from trueup.training.loop import resume_command
from trueup.training.run_directory import (
    RunDirectory,
    check_target,
    read_metrics,
    read_status,
)
from trueup.training.run_lock import boot_id, is_alive, this_process
from trueup.training.signals import Stopped, StopRequest, sigterm_cleans_up

# --- who may write ----------------------------------------------------------------------------


@needs_fork
def test_a_second_trainer_is_told_the_owners_pid(tmp_path):
    def hold():
        with RunDirectory.open(tmp_path / "run"):
            time.sleep(60)

    owner = fork(hold)
    wait_until(lambda: read_status(tmp_path / "run")["state"] == "starting")
    with pytest.raises(ResourceError) as caught:
        RunDirectory.open(tmp_path / "run", resume="auto")
    assert f"pid {owner}" in str(caught.value)
    assert caught.value.exit_code == 4
    with pytest.raises(ResourceError):
        RunDirectory.open(tmp_path / "run", overwrite=True)
    os.kill(owner, signal.SIGKILL)
    wait(owner)
    assert read_status(tmp_path / "run")["state"] == "killed"
    with RunDirectory.open(tmp_path / "run", resume="auto") as run:  # a dead owner's lock is free
        assert run.checkpoint is None


def test_owner_on_another_machine_is_believed_while_its_heart_beats(tmp_path):
    run = tmp_path / "run"
    with RunDirectory.open(run):
        pass
    (run / ".owner.json").write_text('{"pid": 77, "host": "elsewhere"}', "utf-8")
    status = {"state": "running", "pid": 77, "host": "elsewhere", "heartbeat": time.time()}
    (run / "status.json").write_text(json.dumps(status), "utf-8")
    with pytest.raises(ResourceError, match="pid 77 on elsewhere"):
        RunDirectory.open(run, resume="auto")
    status["heartbeat"] -= 1000
    (run / "status.json").write_text(json.dumps(status), "utf-8")
    RunDirectory.open(run, resume="auto").close()


def test_a_directory_in_use_is_refused_with_the_ways_out(tmp_path):
    run_toy(tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=1)
    before = sorted(p.name for p in (tmp_path / "run").rglob("*"))
    with pytest.raises(ConfigError) as caught:
        run_toy(tmp_path / "run", max_steps=2)
    text = str(caught.value)
    assert "contains run run at step 2 (finished)" in text
    for way in ("resume_from_checkpoint: auto", "new_run", "overwrite_output_dir"):
        assert way in text
    assert caught.value.exit_code == 2
    assert sorted(p.name for p in (tmp_path / "run").rglob("*")) == before


def fail_at(path: Path, steps: int, **keys) -> None:
    """A run that ends with an error after so many logged steps, having saved nothing."""
    with pytest.raises(RuntimeError), RunDirectory.open(path, **keys) as run:
        for step in range(steps):
            run.append("metrics.jsonl", {"step": step + 1})
        run.write_json("divergence.json", {})
        raise RuntimeError("broken")


def test_a_run_that_failed_before_its_first_step_is_replaced(tmp_path, caplog):
    caplog.set_level("INFO", "trueup")
    (tmp_path / "run").mkdir()
    fail_at(tmp_path / "run", 0)
    (tmp_path / "run" / "notes.txt").write_text("mine", "utf-8")
    run_toy(tmp_path / "run", max_steps=1)
    assert "failed before its first step is replaced" in caplog.text
    assert (tmp_path / "run" / "notes.txt").read_text("utf-8") == "mine"
    assert not (tmp_path / "run" / "divergence.json").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_the_log_of_a_run_that_failed_before_its_first_checkpoint_is_kept(tmp_path, caplog):
    fail_at(tmp_path / "run", 3)
    run_toy(tmp_path / "run", max_steps=1)
    assert len(read_metrics(tmp_path / "run.set-aside-1")) == 3
    assert "before its first checkpoint" in caplog.text


def test_a_run_that_died_with_a_checkpoint_is_protected(tmp_path):
    run_toy(tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=1)
    (tmp_path / "run" / "model.safetensors").unlink()
    status = {"state": "running", "pid": 2**22 + 1, "host": socket.gethostname(), "boot_id": boot_id()}
    (tmp_path / "run" / "status.json").write_text(json.dumps(status), "utf-8")
    with pytest.raises(ConfigError, match="at step 2 .killed."):
        check_target(tmp_path / "run")


def test_a_pid_from_before_a_reboot_is_not_believed(tmp_path, monkeypatch):
    mine = this_process()
    assert is_alive(mine)
    monkeypatch.setattr("trueup.training.run_lock.boot_id", lambda: "another")
    assert not is_alive(mine)
    assert is_alive({**mine, "host": "elsewhere", "heartbeat": time.time()})


def test_foreign_files_are_refused_too(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work", "utf-8")
    with pytest.raises(ConfigError, match="thesis.txt"):
        check_target(tmp_path)


def test_hidden_files_and_logs_do_not_occupy(tmp_path):
    (tmp_path / ".gitignore").write_text("*", "utf-8")
    (tmp_path / "logs").mkdir()
    check_target(tmp_path)


def test_overwrite_moves_aside_and_deletes_nothing(tmp_path):
    run_toy(tmp_path / "run", max_steps=2)
    old = (tmp_path / "run" / "model.safetensors").read_bytes()
    run_toy(tmp_path / "run", overwrite=True, max_steps=1)
    assert (tmp_path / "run.set-aside-1" / "model.safetensors").read_bytes() == old
    assert len(read_metrics(tmp_path / "run")) == 1


def test_resuming_another_runs_checkpoint_does_not_go_over_a_run(tmp_path):
    keys = dict(max_steps=1, save_strategy="steps", save_steps=1)
    run_toy(tmp_path / "one", **keys)
    run_toy(tmp_path / "two", **keys)
    other = str(tmp_path / "one" / "checkpoint-1")
    with pytest.raises(ConfigError, match="contains run two"):
        run_toy(tmp_path / "two", resume=other, **keys)
    config = {"output_dir": str(tmp_path / "one")}
    run_toy(tmp_path / "three", resume=other, config=config, **{**keys, "max_steps": 2})
    assert (tmp_path / "three" / "checkpoint-2").is_dir()


def test_auto_without_a_valid_checkpoint_moves_results_aside(tmp_path, caplog):
    run_toy(tmp_path / "run", max_steps=2)
    run_toy(tmp_path / "run", resume="auto", max_steps=1)
    assert (tmp_path / "run.set-aside-1" / "model.safetensors").is_file()
    assert "starts afresh" in caplog.text
    assert len(read_metrics(tmp_path / "run")) == 1


def test_a_refused_resume_makes_no_directory(tmp_path):
    foreign = tmp_path / "checkpoint-1"
    foreign.mkdir()
    with pytest.raises(CorruptStateError):
        RunDirectory.open(tmp_path / "run", resume=str(foreign))
    assert not (tmp_path / "run").exists()


def test_new_run_takes_the_next_free_name(tmp_path):
    for name in ("run", "run-2", "run-3"):
        with RunDirectory.open(tmp_path / "run", {"a": 1}, new_run=True) as run:
            assert run.path == tmp_path / name


def test_run_yaml_leads_back_to_the_directory_that_new_run_found(tmp_path):
    config = {"output_dir": str(tmp_path / "run")}
    for name in ("run", "run-2"):
        with RunDirectory.open(tmp_path / "run", config, new_run=True) as run:
            assert run.path == tmp_path / name
        written = yaml.safe_load((tmp_path / name / "run.yaml").read_text("utf-8"))
        assert written["output_dir"] == str(tmp_path / name)


def test_a_disk_that_refuses_any_file_is_a_resource_error(tmp_path, monkeypatch):
    with RunDirectory.open(tmp_path / "run") as run:
        monkeypatch.setattr("trueup.training.durable.write_text", _no_space)
        for write in (lambda: run.write_json("a.json", {}), lambda: run.write_text("b.txt", "")):
            with pytest.raises(ResourceError, match="No space left"):
                write()


def _no_space(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_join_adds_to_a_finished_run(tmp_path):
    run_toy(tmp_path / "run", max_steps=2)
    kept = [tmp_path / "run" / name for name in ("run.yaml", "status.json", "metrics.jsonl")]
    before = [path.read_bytes() for path in kept]
    with pytest.raises(RuntimeError), RunDirectory.open(tmp_path / "run", {"other": 1}, join=True) as run:
        run.status(state="running", step=0)
        run.write_results("eval", {"eval_loss": 0.5})
        run.append("metrics.jsonl", {"step": 0})
        raise RuntimeError("an evaluation that fails is no failure of the training")
    assert [path.read_bytes() for path in kept] == before
    results = json.loads((tmp_path / "run" / "all_results.json").read_text("utf-8"))
    assert results["eval_loss"] == 0.5 and "train_loss" in results
    assert read_metrics(tmp_path / "run")


def test_an_evaluation_in_a_directory_of_its_own_is_a_run(tmp_path):
    for _ in range(2):
        with RunDirectory.open(tmp_path / "eval", {"do_train": False}, join=True) as run:
            run.status(state="finished", exit_code=0)
        assert read_status(tmp_path / "eval")["state"] == "finished"
        assert yaml.safe_load((tmp_path / "eval" / "run.yaml").read_text("utf-8")) == {"do_train": False}


def test_a_checkpoint_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match="checkpoint-9"):
        check_target(tmp_path, resume=str(tmp_path / "checkpoint-9"))


def test_a_directory_that_cannot_be_made_is_a_resource_error(tmp_path):
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(ConfigError, match="is a file"):
        RunDirectory.open(tmp_path / "file")
    with pytest.raises(ResourceError, match="cannot be written"):
        RunDirectory.open(tmp_path / "file" / "below")


# --- what is in it ----------------------------------------------------------------------------


def test_run_yaml_is_complete_and_without_secrets(tmp_path):
    config = {"hf_hub_token": "hf_secret", "dataset": ["a", "b"], "beta": 0.1, "path": Path("x")}
    with RunDirectory.open(tmp_path / "run", config):
        pass
    stored = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text("utf-8"))
    assert stored == {"dataset": ["a", "b"], "beta": 0.1, "path": "x"}


def test_every_artefact_of_a_finished_run(tmp_path):
    from toy_program import settings

    from trueup.training.observers import standard_observers

    observers = standard_observers(settings(), _Writer(tmp_path / "run"), quiet=True)
    run_toy(
        tmp_path / "run", observers=observers, num_train_epochs=2, save_strategy="epoch",
        eval_strategy="epoch", logging_steps=1,
        config={"stage": "dpo", "model_name_or_path": "toy", "dataset": ["pairs"]},
    )  # fmt: skip
    run = tmp_path / "run"
    names = """run.yaml status.json environment.json metrics.jsonl trainer_log.jsonl README.md
        training_loss.png training_eval_loss.png training_rewards_accuracies.png trainer_state.json
        train_results.json eval_results.json all_results.json model.safetensors checkpoint-6
        checkpoint-12"""
    assert set(names.split()) <= {p.name for p in run.iterdir()}
    results = json.loads((run / "all_results.json").read_text("utf-8"))
    assert {"train_loss", "train_runtime", "eval_loss", "epoch"} <= results.keys()
    status = read_status(run)
    assert (status["state"], status["step"], status["pid"]) == ("finished", 12, os.getpid())
    assert time.time() - status["heartbeat"] < 60
    line = json.loads((run / "trainer_log.jsonl").read_text("utf-8").splitlines()[3])
    assert {"current_steps", "total_steps", "loss", "accuracy", "lr", "epoch", "percentage"} <= (line.keys())
    assert {"elapsed_time", "remaining_time", "throughput", "total_tokens"} <= line.keys()
    card = (run / "README.md").read_text("utf-8")
    assert "base_model: toy" in card and "training_loss.png" in card
    environment = json.loads((run / "environment.json").read_text("utf-8"))
    assert environment["packages"]["torch"].startswith(torch.__version__[:4])


class _Writer(RunDirectory):
    """Writes results and logs of a run that another object holds open."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, {"stage": "dpo", "model_name_or_path": "toy"}, checkpoint=None, writer=True)


def test_a_torn_last_line_does_not_hurt(tmp_path):
    run_toy(tmp_path / "run", max_steps=4, logging_steps=1, save_strategy="steps", save_steps=2)
    path = tmp_path / "run" / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 5, "lo')
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3, 4]
    run_toy(
        tmp_path / "run", resume="auto", max_steps=6, logging_steps=1, save_strategy="steps",
        save_steps=2,
    )  # fmt: skip
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    for line in path.read_text("utf-8").splitlines():
        json.loads(line)


def test_numbers_that_are_not_finite_are_null_in_json(tmp_path):
    with RunDirectory.open(tmp_path / "run") as run:
        run.append("metrics.jsonl", {"step": 1, "kl": float("nan"), "x": [float("inf")]})
    assert read_metrics(tmp_path / "run") == [{"step": 1, "kl": None, "x": [None]}]


def test_status_of_a_failure_is_kept(tmp_path):
    with pytest.raises(RuntimeError), RunDirectory.open(tmp_path / "run"):
        raise RuntimeError("broken")
    status = read_status(tmp_path / "run")
    assert (status["state"], status["message"], status["exit_code"]) == ("failed", "broken", 1)


def test_listing_runs_needs_no_torch():
    code = "import sys, trueup.training.run_directory; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=_environment())


# --- the table of changes ---------------------------------------------------------------------


def test_free_changes_pass_silently(caplog):
    check_resumable({"logging_steps": 1, "a": 1}, {"logging_steps": 9, "a": 1})
    assert caplog.text == ""


def test_other_changes_are_said(caplog):
    check_resumable({"learning_rate": 1.0}, {"learning_rate": 2.0})
    assert "learning_rate was 1.0, is 2.0" in caplog.text


def test_the_effective_batch_may_be_cut_otherwise_but_not_changed(tmp_path):
    keys = dict(max_steps=2, save_strategy="steps", save_steps=1)
    run_toy(tmp_path / "run", program={"micro": 2, "accumulate": 4}, **keys)
    keys["max_steps"] = 3
    with pytest.raises(CorruptStateError, match="effective_batch was 8, is 4"):
        run_toy(tmp_path / "run", resume="auto", program={"micro": 2, "accumulate": 2}, **keys)
    run_toy(tmp_path / "run", resume="auto", program={"micro": 8, "accumulate": 1}, **keys)


def test_all_refused_changes_are_listed_and_can_be_allowed():
    then, now = {"seed": 1, "template": "qwen"}, {"seed": 2, "template": "llama3"}
    with pytest.raises(CorruptStateError) as caught:
        check_resumable(then, now)
    assert len(caught.value.problems) == 2
    check_resumable(then, now, allow=["seed", "template"])
    check_resumable(then, now, allow=["all"])


# --- signals ----------------------------------------------------------------------------------


def _environment() -> dict[str, str]:
    source = str(Path(__file__).parents[2] / "src")
    return {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}


@needs_fork
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_finishes_the_step_saves_and_tells_how_to_go_on(tmp_path, name):
    keys = dict(max_steps=100_000, logging_steps=50, lr_scheduler_type="constant")
    child = fork(lambda: run_toy(tmp_path / "run", **keys))
    wait_until(lambda: bool(read_metrics(tmp_path / "run")))
    os.kill(child, getattr(signal, name))
    assert wait(child) == {"SIGINT": 130, "SIGTERM": 143}[name]
    status = read_status(tmp_path / "run")
    assert status["state"] == "stopped"
    assert (tmp_path / "run" / f"checkpoint-{status['step']}" / "manifest.json").is_file()


def test_the_second_signal_ends_at_once():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop() and stop.signum == signal.SIGINT
        with pytest.raises(SystemExit) as caught:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
    assert caught.value.code == 143


def test_what_a_launcher_passes_on_is_no_second_signal(monkeypatch):
    """Slurm and systemd signal every process; torchrun then passes on what it got itself."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a run")
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop() and stop.signum == signal.SIGTERM
        stop._ignored_until = time.monotonic()  # some seconds later
        with pytest.raises(SystemExit):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)


def test_sigterm_outside_of_steps_cleans_up(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught, sigterm_cleans_up(), RunDirectory.open(tmp_path / "run"):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    assert caught.value.code == 143
    status = read_status(tmp_path / "run")
    assert (status["state"], status["exit_code"]) == ("stopped", 143)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_stops_an_evaluation_in_order(tmp_path):
    class Interrupted(ToyProgram):
        def loss(self, batch, totals):
            os.kill(os.getpid(), signal.SIGINT)
            return super().loss(batch, totals)

    with pytest.raises(Stopped, match="the evaluation was stopped") as caught:  # noqa: SIM117
        with RunDirectory.open(tmp_path / "run", {"do_train": False}, join=True) as run:
            evaluate_run(Interrupted(), run, Single())
    assert caught.value.exit_code == 130
    assert read_status(tmp_path / "run")["state"] == "stopped"
    assert not (tmp_path / "run" / "eval_results.json").exists()


def test_the_resume_command_starts_as_many_processes(monkeypatch):
    words = "trueup train 'my run/run.yaml' resume_from_checkpoint=auto"
    assert resume_command(Path("my run"), 1) == words
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert resume_command(Path("my run"), 4) == f"NPROC_PER_NODE=4 {words}"
    assert resume_command(Path("my run"), 8).startswith("NNODES=2 ")


def test_stopped_in_the_middle_resumes_to_the_bit(tmp_path):
    class StopAfter:
        def __init__(self, step):
            self.step = step

        def observe(self, event):
            if type(event).__name__ == "Stepped" and event.step == self.step:
                os.kill(os.getpid(), signal.SIGTERM)

    keys = dict(max_steps=7, logging_steps=3)
    config = {"output_dir": "x"}
    run_toy(tmp_path / "whole", config=config, **keys)
    with pytest.raises(Stopped) as caught:
        run_toy(tmp_path / "run", observers=[StopAfter(4)], config=config, **keys)
    assert caught.value.exit_code == 143
    assert "stopped at step 4 of 7" in str(caught.value)
    assert f"resume with: trueup train {tmp_path}/run/run.yaml resume_from_checkpoint=auto" in (str(caught.value))
    run_toy(tmp_path / "run", resume="auto", config=config, **keys)
    weights = [tmp_path / name / "model.safetensors" for name in ("whole", "run")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert [r["loss"] for r in read_metrics(tmp_path / "run")] == [r["loss"] for r in read_metrics(tmp_path / "whole")]


def test_stopped_while_it_evaluates_evaluates_after_the_resume(tmp_path):
    class StopInEvaluation:
        def observe(self, event):
            if type(event).__name__ == "EvaluationProgress" and event.step == 4:
                os.kill(os.getpid(), signal.SIGINT)

    keys = dict(max_steps=6, logging_steps=2, eval_strategy="steps", eval_steps=2)
    config = {"output_dir": "x"}
    run_toy(tmp_path / "whole", config=config, **keys)
    with pytest.raises(Stopped):
        run_toy(tmp_path / "run", observers=[StopInEvaluation()], config=config, **keys)
    assert has_checkpoint(tmp_path / "run")
    run_toy(tmp_path / "run", resume="auto", config=config, **keys)
    losses = [[r.get("eval_loss") for r in read_metrics(tmp_path / n)] for n in ("whole", "run")]
    assert losses[0] == losses[1]


def test_a_signal_during_the_last_step_still_finishes(tmp_path):
    class StopAtEnd:
        def observe(self, event):
            if type(event).__name__ == "Stepped" and event.step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped, match="finished and saved") as caught:
        run_toy(tmp_path / "run", observers=[StopAtEnd()], max_steps=3)
    assert caught.value.exit_code == 143
    assert (tmp_path / "run" / "model.safetensors").is_file()
    assert read_status(tmp_path / "run")["state"] == "finished"


def test_a_token_on_the_command_line_is_not_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["trueup", "train", "--hf_hub_token", "hf_1", "hf_hub_token=hf_2", "--ms-hub-token=hf_3", "seed=1"]
    monkeypatch.setattr("sys.argv", words)
    command = describe_environment()["command"]
    assert "hf_" not in " ".join(command).replace("hf_hub_token", "")
    assert command[-1] == "seed=1"
