"""Micro-batches by token budget: full, few, balanced, and always the same."""

from __future__ import annotations

import numpy as np
import pytest

from trueup.data.forest import BatchPlan, Padded

LENGTHS = np.random.default_rng(0).integers(10, 400, size=67)


def plan(**keys) -> BatchPlan:
    return BatchPlan(**{"lengths": LENGTHS, "rows_per_micro_batch": 4, "rows_per_step": 32, "seed": 1, **keys})


def sizes(groups: list[np.ndarray]) -> list[int]:
    return [int(LENGTHS[group].sum()) for group in groups]


def test_a_budget_changes_neither_steps_nor_what_they_hold():
    by_rows, by_tokens = plan(), plan(micro_batch_tokens=500)
    assert by_tokens.steps_per_epoch == by_rows.steps_per_epoch == 3
    for a, b in zip(by_rows.steps(2), by_tokens.steps(2), strict=True):
        rows, tokens = (np.sort(np.concatenate(p.micro_batches(u))) for p, u in ((by_rows, a), (by_tokens, b)))
        assert (rows == tokens).all()


def test_micro_batches_are_full_and_few():
    for units in plan(micro_batch_tokens=500).steps(0):
        groups = plan(micro_batch_tokens=500).micro_batches(units)
        assert max(sizes(groups)) <= 500
        assert len(groups) <= np.ceil(sum(sizes(groups)) / 500 * 11 / 9) + 1


def test_an_example_beyond_the_budget_is_a_micro_batch_of_its_own():
    groups = plan(micro_batch_tokens=100).micro_batches(plan().steps(0)[0])
    assert all(len(group) == 1 for group, size in zip(groups, sizes(groups), strict=True) if size > 100)


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_a_step_evenly(world_size: int):
    p = plan(micro_batch_tokens=500)
    units = p.steps(1)[0]
    parts = [p.micro_batches(units, rank, world_size) for rank in range(world_size)]
    assert sorted(i for part in parts for group in part for i in group) == sorted(np.concatenate(units))
    assert max(size for part in parts for size in sizes(part)) <= 500
    assert len({len(part) for part in parts}) == 1
    loads = [sum(sizes(part)) for part in parts]
    assert max(loads) <= 1.1 * min(loads)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_budget_counts_padding_where_prompts_are_not_shared(world_size: int):
    rng = np.random.default_rng(1)
    padded = Padded.of(rng.integers(0, 60, size=67), rng.integers(0, 60, size=(67, 2)))
    p = plan(micro_batch_tokens=600, padded=padded)
    for units in p.steps(0):
        parts = [p.micro_batches(units, rank, world_size) for rank in range(world_size)]
        groups = [group for part in parts for group in part]
        assert sorted(i for group in groups for i in group) == sorted(np.concatenate(units))
        assert all(padded.rows[g].sum() * padded.longest[g].max() <= 600 or len(g) == 1 for g in groups)
        assert len({len(part) for part in parts}) == 1
        fewest = sum(padded.rows[u].sum() * padded.longest[u].max() for u in units) / 600
        assert len(groups) <= 1.5 * fewest + 2 * world_size


def test_an_empty_step_has_no_micro_batch():
    assert plan(micro_batch_tokens=500).micro_batches([]) == []
    padded = Padded.of(np.ones(67, int), np.ones((67, 2), int))
    assert plan(micro_batch_tokens=500, padded=padded).micro_batches([]) == []
