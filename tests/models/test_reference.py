"""References: live, frozen copy and table on disk agree; a table is found again and never mistaken for another."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.models.test_adapters import lora, saved, start, train_a_little
from tests.models.test_layout import random_rows
from tests.models.tiny import tiny_model
from trueup.data.forest import build_forest
from trueup.models.policy import Policy
from trueup.models.reference import LiveReference, MovingReference, ReferenceTable, table_path


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


def test_a_moving_reference_in_bf16_follows_in_small_steps() -> None:
    policy = full_policy()
    policy.base.to(torch.bfloat16)
    moving = MovingReference(policy)
    start = {name: tensor.clone() for name, tensor in moving.past.items()}
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(1.0)
    for _ in range(100):
        moving.follow(1e-3)
    share = 1 - (1 - 1e-3) ** 100
    for name, parameter in policy.trainable().items():
        expected = torch.lerp(start[name], parameter.detach().float(), share)
        torch.testing.assert_close(moving.past[name], expected, atol=1e-5, rtol=1e-4)
        with moving.running():
            assert torch.equal(policy.trainable()[name], moving.past[name].bfloat16())
    again = MovingReference(policy)
    again.load(moving.past)
    for name, tensor in moving.past.items():
        assert torch.equal(again.past[name], tensor)
        assert torch.equal(again.running_past[name], moving.running_past[name])


def test_a_table_is_read_again_and_knows_its_gaps(tmp_path: Path) -> None:
    table = ReferenceTable([3, 0, 2, 4], tmp_path / "t.safetensors")
    batches = [np.array([2, 0]), np.array([3, 2])]
    assert [list(b) for b in table.missing(batches)] == [[2, 0], [3, 2]]
    table.put(np.array([2, 0]), torch.arange(5.0))
    table.save()

    again = ReferenceTable([3, 0, 2, 4], tmp_path / "t.safetensors")
    assert torch.equal(again.get([0, 1, 2]), torch.tensor([2.0, 3.0, 4.0, 0.0, 1.0]))
    assert [list(b) for b in again.missing(batches)] == [[3, 2]]
    again.put(np.array([3, 2]), torch.full((6,), 9.0))
    assert torch.equal(again.get([2, 3]), torch.full((6,), 9.0))


def test_runs_that_fill_one_table_keep_each_others_values(tmp_path: Path) -> None:
    file = tmp_path / "t.safetensors"
    one, other = ReferenceTable([3, 2], file), ReferenceTable([3, 2], file)
    one.put(np.array([0]), torch.arange(3.0))
    one.save()
    other.put(np.array([1]), torch.arange(2.0))
    other.save()
    assert not ReferenceTable([3, 2], file).missing([np.array([0, 1])])


@pytest.mark.parametrize("damage", ["flipped", "truncated", "zeroed", "foreign", "other size", "no digest"])
def test_a_damaged_table_is_said_and_computed_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    file = tmp_path / "t.safetensors"
    table = ReferenceTable([3, 2], file)
    table.put(np.array([0, 1]), torch.arange(5.0))
    table.save()
    data = file.read_bytes()
    match damage:
        case "flipped":
            file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        case "truncated":
            file.write_bytes(data[:-3])
        case "zeroed":  # as a power cut may leave it
            file.write_bytes(bytes(len(data)))
        case "foreign":
            file.write_text("{}", encoding="utf-8")
        case "other size":
            save_file({"logps": torch.zeros(4)}, file)
        case "no digest":
            save_file({"logps": torch.arange(5.0)}, file)
    caplog.clear()
    again = ReferenceTable([3, 2], file)
    assert "computed again" in caplog.text and str(file) in caplog.text
    assert [list(batch) for batch in again.missing([np.array([0, 1])])] == [[0, 1]]
    again.put(np.array([0, 1]), torch.arange(5.0))
    again.save()
    assert torch.equal(ReferenceTable([3, 2], file).values, torch.arange(5.0))


def test_a_process_killed_while_it_writes_leaves_the_table_that_was(tmp_path: Path, monkeypatch) -> None:
    """What it leaves behind is nobody's table, and is removed when it is old."""

    class Killed(BaseException):
        pass

    def torn(tensors: dict, path: Path, metadata: dict) -> None:
        path.write_bytes(b"half a table")
        monkeypatch.setattr(Path, "unlink", lambda *a, **k: None)  # the dead clean nothing up
        raise Killed

    file = tmp_path / "t.safetensors"
    table = ReferenceTable([2], file)
    table.put(np.array([0]), torch.arange(2.0))
    table.save()
    with monkeypatch.context() as patched:
        patched.setattr("trueup.models.reference.save_file", torn)
        with pytest.raises(Killed):
            table.save()
        monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 2
    assert torch.equal(ReferenceTable([2], file).values, torch.arange(2.0))
    for stage in tmp_path.glob(".*"):
        os.utime(stage, (1, 1))
    table.save()
    assert list(tmp_path.iterdir()) == [file]


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
    assert len({table_path(before, *rest) for rest in [("a", "b"), ("other", "b"), ("a", "other")]}) == 3


def test_the_fingerprint_follows_what_turns_weights_into_values(tmp_path: Path) -> None:
    def fingerprint(**config) -> str:
        return LiveReference(Policy(tiny_model("llama", **config))).fingerprint()

    assert fingerprint() == fingerprint()
    assert fingerprint() != fingerprint(rms_norm_eps=1e-3)
    assert fingerprint() != fingerprint(rope_parameters={"rope_type": "default", "rope_theta": 100.0})
    prints = set()
    for alpha in (8, 64):
        saved(tmp_path / str(alpha), wanted=lora(4, ["q_proj"], alpha=alpha), seed=3)
        prints.add(LiveReference.of(*start([tmp_path / str(alpha)], lora(2))).fingerprint())
    assert len(prints) == 2
