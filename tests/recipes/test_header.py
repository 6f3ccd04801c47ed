"""The arithmetic people read before a run: units, plurals, sizes."""

from __future__ import annotations

import numpy as np
import pytest

from trueup.config.load import load_config
from trueup.data.encoded import Answer, Encoded, EncodedDataset
from trueup.models.memory import Recomputation
from trueup.quantities import sized
from trueup.recipes.batches import STEPS_SAMPLED, count_tokens, in_layout, plan_batches
from trueup.recipes.header import batch_words, counted, memory_words, steps_words, tokens_words

BASE = {"model_name_or_path": "m", "dataset": "d", "per_device_train_batch_size": 2, "cutoff_len": 100}


def words(world_size: int = 1, **keys) -> tuple[str, str]:
    _, arithmetic = plan_batches(load_config({**BASE, **keys}), np.full(10, 50), world_size)
    return batch_words(arithmetic), steps_words(arithmetic)


def test_rows_are_rows_and_packs_are_packs():
    assert words() == (
        "2 × 1 accumulation × 1 process = 2 rows a step",
        "10 rows → 5 steps an epoch, 15 in all (3 epochs)",
    )
    assert words(packing=True, num_train_epochs=1) == (
        "2 × 1 accumulation × 1 process = 2 packs a step",
        "10 rows in 5 packs → 3 steps an epoch, 3 in all (1 epoch)",
    )


def test_processes_token_budgets_and_parts_of_epochs_are_told():
    assert words(2, batch_tokens=1000, max_steps=1) == (
        "2 × 1 accumulation × 2 processes = 4 rows a step, in micro-batches of at most 1,000 tokens",
        "10 rows → 3 steps an epoch, 1 in all (0.333 epochs)",
    )


@pytest.mark.parametrize(("number", "text"), [(1, "1 process"), (2, "2 processes"), (1200, "1,200 processes")])
def test_plurals(number: int, text: str):
    assert counted(number, "process") == text


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (5e5, "488 KB"), (1.2e7, "11.4 MB"), (1.05e9, "1,001 MB"), (3.5e9, "3.26 GB")]
)
def test_sizes_have_the_unit_that_shows_them(size: float, text: str):
    assert sized(size) == text


def pair(prompt: int, *answers: int) -> Encoded:
    ids = np.zeros(100, np.int32)
    return Encoded("r", ids[:prompt], tuple(Answer(ids[:n], np.ones(n, bool)) for n in answers))


def test_tokens_saved_are_counted_exactly():
    dataset = EncodedDataset.of([pair(50, 10, 20), pair(30, 5, 5), pair(0, 60)])
    cfg = load_config({**BASE, "disable_shuffling": True, "num_train_epochs": 2})
    plan, arithmetic = plan_batches(cfg, dataset.lengths)
    tokens = count_tokens(dataset, plan, arithmetic.epochs)
    assert (tokens.epoch, tokens.largest) == (80 + 40 + 60, 120)
    assert (tokens.epoch_padded, tokens.sampled) == (4 * 70 + 60, False)
    assert count_tokens(dataset, in_layout(plan, dataset, shared=False), 1).largest == 280
    assert tokens_words(tokens, arithmetic) == "180 an epoch instead of 340 padded (1.9 times fewer)"
    assert tokens_words(tokens, arithmetic, shared=False) == "340 an epoch, padded"


def many(count: int) -> EncodedDataset:
    sizes = np.random.default_rng(0).integers(1, 30, size=(count, 3))
    return EncodedDataset.of([pair(*row) for row in sizes.tolist()])


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    "keys", [{}, {"packing": True}, {"gradient_accumulation_steps": 3, "dataloader_drop_last": True}]
)
def test_counts_are_those_of_the_planned_micro_batches(shared: bool, keys: dict):
    dataset = many(50)
    plan, arithmetic = plan_batches(load_config({**BASE, **keys}), dataset.lengths)
    plan = in_layout(plan, dataset, shared)
    tokens = count_tokens(dataset, plan, arithmetic.epochs)
    planned = [[b for units in plan.steps(e) for b in plan.micro_batches(units)] for e in range(arithmetic.epochs)]
    padded = in_layout(plan, dataset, shared=False)
    assert tokens.epoch == sum(int(dataset.lengths[batch].sum()) for batch in planned[0])
    assert tokens.epoch_padded == sum(padded.tokens(batch) for batch in planned[0])
    assert tokens.largest == max(plan.tokens(batch) for of_epoch in planned for batch in of_epoch)


@pytest.mark.parametrize("shared", [True, False])
def test_with_a_token_budget_few_steps_are_planned_and_the_rest_is_called_an_estimate(monkeypatch, shared: bool):
    dataset = many(400)
    cfg = load_config({**BASE, "batch_tokens": 150, "gradient_accumulation_steps": 4})
    plan, arithmetic = plan_batches(cfg, dataset.lengths)
    plan = in_layout(plan, dataset, shared)
    every = [plan.micro_batches(units) for epoch in range(3) for units in plan.steps(epoch)]
    seen, micro_batches = [], type(plan).micro_batches
    monkeypatch.setattr(type(plan), "micro_batches", lambda *given: seen.append(1) or micro_batches(*given))
    tokens = count_tokens(dataset, plan, arithmetic.epochs)
    assert len(seen) == STEPS_SAMPLED < plan.steps_per_epoch
    assert max(plan.tokens(batch) for batches in every for batch in batches) <= tokens.largest
    assert tokens.largest <= max(150, *(plan.tokens(unit) for unit in plan.units))
    assert tokens.epoch == int(dataset.lengths.sum())
    assert "about" in tokens_words(tokens, arithmetic, shared)


def test_what_recomputes_is_told_with_its_reason():
    gb = 1024**3
    assert memory_words(Recomputation(0, 24)) == "activations kept"
    assert memory_words(Recomputation(0, 24, 3 * gb, 3 * gb, 9 * gb)) == "activations 3 GB of 9 GB free: kept"
    some = memory_words(Recomputation(14, 24, 12 * gb, 9 * gb, 9 * gb))
    assert some == "activations 12 GB of 9 GB free: checkpointing 14 of 24 layers"
    assert "may not fit" in memory_words(Recomputation(24, 24, 90 * gb, 19 * gb, 9 * gb))
