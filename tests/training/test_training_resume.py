"""A run that was interrupted ends with the same bits as one that was not."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil

import pytest
import torch
from processes import needs_fork, run_ranks
from toy_program import ToyProgram, run_toy, settings

from trueup.errors import CorruptStateError
from trueup.training.backend import Single, make_backend
from trueup.training.loop import WALL_CLOCK, fit
from trueup.training.run_directory import RunDirectory, read_metrics

# 44 rows at 8 a step: six steps an epoch, the last with half the micro-batches; 15 steps in all
KEYS = dict(
    num_train_epochs=2.5,
    save_strategy="steps",
    save_steps=1,
    logging_steps=4,
    eval_strategy="steps",
    eval_steps=5,
)
LAST = 15


def fingerprint(directory, last=LAST):
    """Hashes of weights, optimizer and generators, and metrics without the clock's fields."""
    state = directory / f"checkpoint-{last}"
    names = ["model.safetensors", "optimizer.safetensors", "random.safetensors"]
    hashes = {name: hashlib.sha256((state / name).read_bytes()).hexdigest() for name in names}
    hashes["final"] = hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()
    return hashes, steady(directory)


def steady(directory):
    rows = read_metrics(directory)
    return [{k: v for k, v in row.items() if k not in WALL_CLOCK} for row in rows]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def whole(request, tmp_path_factory):
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp(request.param) / "whole"
    program = {"dtype": getattr(torch, request.param)}
    run_toy(directory, program=program, **KEYS)
    return directory, program


@pytest.mark.parametrize(
    "step", [2, 6, 5, 9, 10, 15], ids=lambda k: {6: "epoch-end", 5: "before-partial"}.get(k, str(k))
)
def test_resume_is_exact_to_the_bit(whole, tmp_path, step):
    directory, program = whole
    run = tmp_path / "run"
    run.mkdir()
    shutil.copytree(directory / f"checkpoint-{step}", run / f"checkpoint-{step}")
    shutil.copy(directory / "metrics.jsonl", run / "metrics.jsonl")  # with rows past the checkpoint
    torch.manual_seed(999)  # whatever state the process is in
    run_toy(run, resume="auto", program=program, config={"output_dir": str(directory)}, **KEYS)
    assert fingerprint(run) == fingerprint(directory)


def test_the_middle_of_a_logging_interval_is_kept_exactly(whole):
    directory, _ = whole
    state = json.loads((directory / "checkpoint-6" / "trainer_state.json").read_text("utf-8"))
    assert state["progress"]["step"] == 6 and state["progress"]["lines"]["metrics.jsonl"] == 2
    steps = [row["step"] for row in steady(directory)]
    assert steps == [4, 5, 8, 10, 12, 15, 15]


def test_evaluation_at_the_start_and_a_resume_before_it_agree(tmp_path):
    run_toy(tmp_path / "whole", eval_on_start=True, **KEYS)
    assert read_metrics(tmp_path / "whole")[0]["step"] == 0
    assert "eval_loss" in read_metrics(tmp_path / "whole")[0]


def test_resume_from_an_explicit_path_sets_the_abandoned_future_aside(tmp_path, caplog):
    run = tmp_path / "run"
    run_toy(run, **KEYS)
    before = fingerprint(run)
    run_toy(run, resume=str(run / "checkpoint-7"), **KEYS)
    assert fingerprint(run) == before
    assert (run / "checkpoint-8.set-aside-1").is_dir()
    assert (run / "checkpoint-8" / "manifest.json").is_file()
    assert "set aside" in caplog.text


def test_auto_starts_afresh_without_a_checkpoint(tmp_path):
    result, _ = run_toy(tmp_path / "run", resume="auto", max_steps=2)
    assert result.steps == 2


def test_program_state_returns(tmp_path):
    _, toy = run_toy(tmp_path / "run", **KEYS)
    _, again = run_toy(tmp_path / "run", resume=str(tmp_path / "run" / "checkpoint-14"), **KEYS)
    assert again.losses_seen == toy.losses_seen


def test_another_thread_count_is_said(tmp_path, caplog):
    run_toy(tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=1)
    torch.set_num_threads(2)
    with caplog.at_level(logging.WARNING, "trueup"):
        run_toy(tmp_path / "run", resume="auto", max_steps=3, save_strategy="steps", save_steps=1)
    assert "threads was 1, is 2" in caplog.text
    assert "not exact to the bit" in caplog.text


def test_a_longer_run_goes_on_from_the_end_of_a_shorter_one(tmp_path, caplog):
    keys = dict(save_strategy="steps", save_steps=2, lr_scheduler_type="constant")
    run_toy(tmp_path / "run", max_steps=4, **keys)
    result, _ = run_toy(tmp_path / "run", resume="auto", max_steps=6, **keys)
    assert result.steps == 6
    assert "max_steps was 4, is 6" in caplog.text


@pytest.mark.parametrize("change", [{"seed": 8}, {"config": {"lora_rank": 16}}, {"config": {"pref_loss": "ipo"}}])
def test_another_experiment_is_refused_unless_allowed(tmp_path, change):
    keys = dict(max_steps=2, save_strategy="steps", save_steps=1)
    run_toy(tmp_path / "run", config={"lora_rank": 8, "pref_loss": "sigmoid"}, **keys)
    before = (tmp_path / "run" / "run.yaml").read_bytes()
    base = {"lora_rank": 8, "pref_loss": "sigmoid"}
    changed = {**change, "config": base | change.get("config", {})}
    with pytest.raises(CorruptStateError, match="another experiment") as caught:
        run_toy(tmp_path / "run", resume="auto", **keys, **changed)
    assert caught.value.exit_code == 7
    assert (tmp_path / "run" / "run.yaml").read_bytes() == before


def test_a_model_that_does_not_fit_the_checkpoint_is_refused(tmp_path):
    class OtherModel(ToyProgram):
        def __init__(self):
            super().__init__()
            self.trainable = {"other": torch.nn.Parameter(torch.zeros(2))}

    run = tmp_path / "run"
    run_toy(run, max_steps=1, save_strategy="steps", save_steps=1)
    opened = RunDirectory.open(run, resume="auto", allow=["all"])
    with opened, pytest.raises(CorruptStateError, match="trained parameters differ"):
        fit(OtherModel(), settings(max_steps=2), opened, Single())


@needs_fork
def test_two_processes_resume_to_the_bit_too(tmp_path):
    keys = dict(max_steps=5, save_strategy="steps", save_steps=1, logging_steps=4)

    def runs(directory, resume=None):
        def one_rank():
            torch.set_num_threads(1)
            backend = make_backend("cpu", 60)
            program = dict(micro=2, accumulate=2, rank=backend.rank, world_size=2)
            config = {"output_dir": "x"}
            run_toy(directory, resume=resume, backend=backend, program=program, config=config, **keys)
            backend.close()

        return one_rank

    assert run_ranks(runs(tmp_path / "whole")) == [0, 0]
    run = tmp_path / "run"
    run.mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", run / "checkpoint-3")
    assert run_ranks(runs(run, "auto")) == [0, 0]
    assert fingerprint(run, 5)[0] == fingerprint(tmp_path / "whole", 5)[0]
    assert steady(run)[-1] == steady(tmp_path / "whole")[-1]
