"""What a run will take: what to change where it does not fit, and estimates against whole processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from benchmarks import planned

from trueup.config.schema import RunConfig
from trueup.recipes import check as checking
from trueup.recipes.check import check
from trueup.recipes.remedies import remedies

Config = Callable[..., RunConfig]


def test_where_it_does_not_fit_the_cheapest_changes_are_named_with_numbers(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(finetuning_type="full", lora_rank=None, gradient_checkpointing="off", per_device_train_batch_size=8)
    monkeypatch.setattr(checking, "free_memory", lambda device: 1000)
    report = check(cfg)
    changes = [remedy.change for remedy in report.remedies]
    assert "per_device_train_batch_size: 1, gradient_accumulation_steps: 8" in changes and len(changes) <= 3
    assert changes == [*dict.fromkeys(changes)]
    assert all(remedy.memory < report.estimate.memory and not remedy.fits for remedy in report.remedies)
    said = report.render()
    assert "does NOT fit" in said and all(f"with {change}: ~" in said for change in changes)


def test_the_smallest_change_that_is_enough_comes_first(config: Config) -> None:
    cfg = config(finetuning_type="full", lora_rank=None, per_device_train_batch_size=8)
    report = check(cfg)
    assert report.remedies == []
    largest = report.tokens.largest
    halved = remedies(cfg, largest, report.estimate.memory - 1)[0]
    assert halved.fits and halved.change == "per_device_train_batch_size: 4, gradient_accumulation_steps: 2"


@pytest.mark.prove
@pytest.mark.parametrize("name", planned.RUNS)
def test_an_estimate_is_what_the_process_takes(name: str, tmp_path: Path) -> None:
    """Within 15 % of the peak that the system counts, and never below it by more than 5 %."""
    found = planned.measure(name, tmp_path)
    assert 0.95 <= found["planned"] / found["peak"] <= 1.15, planned.line(found)
