"""The table of reference log-probabilities: shared by runs, filled by all processes, resumed after a stop."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from trueup.config.schema import RunConfig
from trueup.recipes import references
from trueup.recipes.offline import run
from trueup.recipes.references import rows_to_compute, table_batches
from trueup.training.run_directory import read_status
from trueup.training.signals import Stopped

Config = Callable[..., RunConfig]


def tables() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path(os.environ["TRUEUP_CACHE"]).rglob("*.safetensors")}


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the forward passes that fill tables; a row a pass."""
    sizes: list[int] = []
    compute = references._finite_logps

    def counted(live, dataset, batch):
        sizes.append(len(batch))
        return compute(live, dataset, batch)

    monkeypatch.setattr(references, "_finite_logps", counted)
    monkeypatch.setattr(references, "TABLE_TOKENS", 1)
    return sizes


def test_runs_with_other_batches_seeds_and_epochs_share_one_table(config: Config, passes, tmp_path: Path) -> None:
    run(config(max_steps=6))
    assert len(passes) == 21
    first = tables()
    other = {"per_device_train_batch_size": 2, "seed": 7, "data_seed": 8, "num_train_epochs": 1}
    run(config(output_dir=str(tmp_path / "other"), **other))
    assert len(passes) == 21 and tables() == first


def test_a_run_that_needs_few_rows_computes_few(config: Config, passes) -> None:
    run(config(max_steps=2))
    assert len(passes) == 8


def test_a_stop_keeps_what_is_computed_and_the_same_command_goes_on(
    config: Config, passes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = references._finite_logps

    def interrupted(live, dataset, batch):
        if len(passes) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return compute(live, dataset, batch)

    with monkeypatch.context() as patched:
        patched.setattr(references, "_finite_logps", interrupted)
        with pytest.raises(Stopped, match="same command") as caught:
            run(config())
    assert caught.value.exit_code == 143
    status = read_status(tmp_path / "out")
    assert (status["state"], status["exit_code"]) == ("stopped", 143)
    assert len(passes) == 6
    run(config())
    assert len(passes) == 21
    assert read_status(tmp_path / "out")["state"] == "finished"


def test_a_kill_costs_what_was_computed_since_the_last_save(config: Config, passes, monkeypatch) -> None:
    class Killed(BaseException):
        pass

    compute = references._finite_logps

    def killed(live, dataset, batch):
        if len(passes) == 9:
            raise Killed
        return compute(live, dataset, batch)

    with monkeypatch.context() as patched:
        patched.setattr(references, "SAVE_SECONDS", 0.0)
        patched.setattr(references, "_finite_logps", killed)
        with pytest.raises(Killed):
            run(config())
    run(config(new_run=True))
    assert len(passes) == 21


def test_the_rounding_is_told(config: Config, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "trueup")
    run(config(max_steps=1))
    assert "cached and live" in caplog.text


def test_a_pass_holds_rows_of_like_length_up_to_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references, "TABLE_TOKENS", 10)
    lengths = np.array([4, 30, 5, 5, 9, 1])
    assert [batch.tolist() for batch in table_batches(np.arange(6), lengths)] == [[1], [4], [2, 3], [0, 5]]
    assert [batch.tolist() for batch in table_batches(np.array([0, 4]), lengths)] == [[4], [0]]


def test_all_rows_are_computed_unless_a_run_needs_less_than_half() -> None:
    asked = [np.array([3, 1]), np.array([1, 2])]
    assert rows_to_compute(asked, 6).tolist() == [0, 1, 2, 3, 4, 5]
    assert rows_to_compute(asked, 7).tolist() == [1, 2, 3]


class Rank:
    """One of two processes that fill a table, met by turns."""

    world_size = 2
    rank = 0

    def __init__(self, other: torch.Tensor) -> None:
        self.other = other

    def sum_gradients(self, buckets: list[torch.Tensor]) -> None:
        buckets[0] += torch.nan_to_num(self.other)
        buckets[1] += (~torch.isnan(self.other)).float()


def test_processes_give_each_other_what_they_computed(tmp_path: Path) -> None:
    nan = float("nan")
    table = references.ReferenceTable([2, 1, 1], tmp_path / "t.safetensors")
    gaps = torch.isnan(table.values)
    table.put(np.array([0]), torch.tensor([1.0, 2.0]))
    gaps = references._share(table, gaps, Rank(torch.tensor([nan, nan, 3.0, nan])))
    assert table.values[:3].tolist() == [1.0, 2.0, 3.0] and gaps.tolist() == [False, False, False, True]
