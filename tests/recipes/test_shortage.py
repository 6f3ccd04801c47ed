"""Out of memory in the middle of a run: the step is done again in smaller pieces, and the result is the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.recipes.test_equivalence import program_of
from trueup.config.schema import RunConfig
from trueup.errors import ResourceError
from trueup.recipes.online_program import OnlineBatch, OnlineProgram
from trueup.recipes.program import OfflineProgram
from trueup.recipes.run import run
from trueup.training.backend import Single
from trueup.training.metrics import MetricSums, means
from trueup.training.optim import MasterOptimizer
from trueup.training.step import Program, train_step

Config = Callable[..., RunConfig]
ERRORS = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory."),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
}


def limit(monkeypatch: pytest.MonkeyPatch, rows: int, error: Exception = ERRORS["cuda"], begin: int = 0) -> list[int]:
    """Let micro-batches of more than `rows` examples fail, in their backward too, from the `begin`th on; the sizes of
    those that were tried.
    """
    tried: list[int] = []
    whole = OfflineProgram.loss

    def loss(self: Program, batch, totals):
        if batch.split != "train":
            return whole(self, batch, totals)
        tried.append(len(batch.indices))
        if len(tried) > begin and len(batch.indices) > rows:
            raise error
        return whole(self, batch, totals)

    monkeypatch.setattr(OfflineProgram, "loss", loss)
    return tried


def steps_of(cfg: RunConfig, count: int = 3) -> list[tuple]:
    """Loss, gradient norm, metrics and pieces of the first steps."""
    program = program_of(cfg)
    optimizer = MasterOptimizer.from_settings(program.trainable, cfg.train, count)
    pieces, told = 1, []
    torch.manual_seed(0)
    for number in range(count):
        sums = MetricSums()
        result = train_step(program, optimizer, Single("cpu"), number, sums, pieces)
        pieces = result.pieces
        told.append((result.loss, result.grad_norm, means(sums.read()), pieces))
    optimizer.close()
    return told


def assert_close(one: list[tuple], other: list[tuple]) -> None:
    for (loss, norm, values, _), (same_loss, same_norm, same_values, _) in zip(one, other, strict=True):
        assert (loss, norm) == pytest.approx((same_loss, same_norm), rel=2e-5, abs=1e-6)
        assert values == pytest.approx(same_values, rel=2e-4, abs=1e-5)


KINDS = {
    "plain": {}, "coupled": {"pref_loss": "aot"}, "running mean": {"pref_loss": "bco_pair"},
    "moving reference": {"sync_ref_model": True, "ref_model_sync_steps": 1},
    "kto": {"stage": "kto", "dataset": "labels"}, "sft": {"stage": "sft", "dataset": "chats"},
    "packed": {"stage": "sft", "dataset": "chats", "packing": True, "cutoff_len": 64},
    "tokens": {"batch_tokens": 120},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_steps_go_on_as_if_they_had_begun_with_smaller_micro_batches(
    config: Config, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    cfg = config(**KINDS[kind])
    whole = steps_of(cfg)
    tried = limit(monkeypatch, 1 if kind in ("packed", "tokens") else 2, begin=1)
    short = steps_of(cfg)
    assert_close(short, whole)
    assert short[-1][-1] > 1
    if kind == "plain":
        assert tried[:4] == [4, 4, 2, 2]  # one step whole, one that fails, and that in two


def test_with_dropout_the_step_that_is_done_again_draws_what_it_would_have_drawn(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"lora_dropout": 0.3, "disable_shuffling": True}
    two = steps_of(config(**keys, per_device_train_batch_size=2, gradient_accumulation_steps=2))
    limit(monkeypatch, 2)
    assert_close(steps_of(config(**keys)), two)


def test_rollouts_are_cut_too_and_their_metrics_told_once() -> None:
    told = {"reward": (torch.tensor(3.0), 2.0)}
    batch = OnlineBatch("train", np.arange(5), None, told)
    parts = OnlineProgram.cut(None, batch, 2)  # type: ignore[arg-type]
    assert [len(part.indices) for part in parts] == [3, 2] and [part.extra for part in parts] == [told, {}]


def test_a_resume_knows_and_does_not_run_out_again(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    keys = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "lora_dropout": 0.2}
    limit(monkeypatch, 2)
    run(config(output_dir=str(tmp_path / "whole"), **keys))
    (said,) = [message for message in caplog.messages if "out of memory" in message]
    assert "step 1:" in said and "2 pieces, at the same effective batch" in said
    status = json.loads((tmp_path / "whole" / "status.json").read_text(encoding="utf-8"))
    assert status["state"] == "finished" and said in [warning["text"] for warning in status["warnings"]]
    state = json.loads((tmp_path / "whole/checkpoint-2/trainer_state.json").read_text(encoding="utf-8"))
    assert state["progress"]["pieces"] == 2
    tried = limit(monkeypatch, 2)
    at = str(tmp_path / "whole/checkpoint-2")
    run(config(output_dir=str(tmp_path / "resumed"), resume_from_checkpoint=at, **keys))
    assert max(tried) == 2
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("whole", "resumed")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("kind", ERRORS)
def test_one_example_that_does_not_fit_ends_the_run_with_what_to_do(
    config: Config, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    limit(monkeypatch, 0, ERRORS[kind])
    with pytest.raises(ResourceError, match="one example at a time") as caught:
        run(config())
    assert "gradient_checkpointing" in str(caught.value.problems[0].fix)


def test_another_error_is_no_shortage(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, 2, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        run(config())
