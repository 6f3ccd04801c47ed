"""References: live, frozen copy and table on disk agree; a table is found again and never mistaken for another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.models.test_adapters import lora, saved, start, train_a_little
from tests.models.test_layout import random_rows
from tests.models.tiny import tiny_model
from trueup.data.forest import build_forest
from trueup.models.policy import Policy
from trueup.models.reference import LiveReference, ReferenceTable, table_path


def full_policy() -> Policy:
    policy = Policy(tiny_model("llama"))
    policy.verify_layout()
    return policy


def test_full_training_keeps_a_frozen_copy_of_the_start() -> None:
    policy = full_policy()
    forest = build_forest(random_rows())
    reference = LiveReference.of(policy, None)
    before = policy.token_logps(forest).detach()
    train_a_little(policy)
    assert torch.equal(reference.token_logps(forest), before)
    assert not torch.equal(policy.token_logps(forest), before)


def test_a_table_is_read_again_and_fills_only_its_gaps(tmp_path: Path) -> None:
    table = ReferenceTable([3, 0, 2, 4], tmp_path / "t.safetensors")
    batches = [np.array([2, 0]), np.array([3, 2])]
    assert [list(b) for b in table.missing(batches)] == [[2, 0], [3, 2]]
    table.put(np.array([2, 0]), torch.arange(5.0))
    table.save()

    again = ReferenceTable([3, 0, 2, 4], tmp_path / "t.safetensors")
    assert torch.equal(again.get([0, 1, 2]), torch.tensor([2.0, 3.0, 4.0, 0.0, 1.0]))
    assert [list(b) for b in again.missing(batches)] == [[3, 2]]
    again.put(np.array([3, 2]), torch.full((6,), 9.0))
    assert torch.equal(again.get([2, 3]), torch.tensor([0.0, 1.0, 9.0, 9.0, 9.0, 9.0]))


def test_an_unwritable_cache_costs_nothing_but_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a directory", encoding="utf-8")
    ReferenceTable([1], blocked / "t.safetensors").save()
    assert "could not be cached" in caplog.text


def test_the_fingerprint_follows_the_reference_not_the_policy(tmp_path: Path) -> None:
    saved(tmp_path / "sft", wanted=lora(4, ["q_proj"]))
    policy, adapters = start([tmp_path / "sft"], lora(2))
    reference = LiveReference.of(policy, adapters)
    before = reference.fingerprint()
    train_a_little(policy)
    assert reference.fingerprint() == before
    bare, bare_adapters = start()
    assert LiveReference.of(bare, bare_adapters).fingerprint() != before
    assert table_path(before, "data") != table_path(before, "other data")
