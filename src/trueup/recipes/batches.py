"""How rows become optimizer steps: the run's batch plan and the arithmetic that is shown to the user."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from trueup.config.methods import ONLINE
from trueup.config.schema import RunConfig
from trueup.data.encode import EncodedDataset
from trueup.data.forest import BatchPlan, Padded
from trueup.errors import ConfigError


@dataclass(frozen=True)
class Batch:
    """A micro-batch by name: which examples of which set. Its forest is laid out when it is needed."""

    split: str  # "train" or an evaluation set's name
    indices: np.ndarray  # [B] int64


def cut_indices(indices: np.ndarray, pieces: int) -> list[np.ndarray]:
    """Up to so many parts of like size, none of them empty."""
    return [part for part in np.array_split(indices, pieces) if len(part)]


@dataclass(frozen=True)
class Arithmetic:
    """How rows become steps; what the header and `check` print."""

    examples: int
    rows_per_micro_batch: int
    accumulation: int
    world_size: int
    steps_per_epoch: int
    epochs: int
    total_steps: int
    packs: int | None = None  # what a "row" of the three counts above is when rows are packed
    tokens_per_micro_batch: int | None = None  # a budget in place of rows_per_micro_batch
    passes: int = 1  # over each batch, where the model answers prompts itself and learns from the answers
    streamed: bool = False  # the examples are those of the first buffer only

    @property
    def rows_per_step(self) -> int:
        return self.rows_per_micro_batch * self.accumulation * self.world_size


@dataclass(frozen=True)
class Tokens:
    """What goes through the backbone: prompts once an example, against each micro-batch as padded rows of one answer.

    Beginnings that different examples have in common are shared too, which is not counted here.
    """

    epoch: int  # the first one
    epoch_padded: int
    largest: int  # micro-batch, as the model runs it
    sampled: bool = False  # epoch_padded is an estimate from the first steps
    at_most: bool = False  # answers are still to be written, and counted at their longest
    epoch_separate: int = 0  # a row an answer, none padded

    @property
    def by_layout(self) -> dict[str, int]:
        """An epoch's, for the data report."""
        return {"padded": self.epoch_padded, "separate": self.epoch_separate, "shared": self.epoch}


#: Epochs that are searched for the largest micro-batch: they differ in nothing but the order of the rows.
EPOCHS_SEARCHED = 10
#: Steps that are planned to see what padding would cost where micro-batches are cut by tokens.
STEPS_SAMPLED = 32


def in_layout(plan: BatchPlan, dataset: EncodedDataset, shared: bool) -> BatchPlan:
    """The plan for a model whose layout is known: a token budget counts what that layout computes."""
    return plan if shared else replace(plan, padded=Padded.of(dataset.prompt_lengths, dataset.answer_lengths))


def count_tokens(dataset: EncodedDataset, plan: BatchPlan, epochs: int) -> Tokens:
    """The tokens of a run's training micro-batches."""
    padded = Padded.of(dataset.prompt_lengths, dataset.answer_lengths)
    tokens = _count(plan, padded, epochs)
    repeated = dataset.prompt_lengths * (padded.rows - 1)
    return replace(tokens, epoch_separate=tokens.epoch + int(repeated[_examples(plan, plan.order(0))].sum()))


def answered_tokens(cfg: RunConfig, dataset: EncodedDataset, plan: BatchPlan, epochs: int) -> Tokens:
    """The same if every answer that the model writes is as long as it may be."""
    answers, longest = cfg.online.num_generations or 1, cfg.generate.max_new_tokens
    padded = Padded(np.full(len(dataset), answers), dataset.prompt_lengths + longest)
    lengths = dataset.prompt_lengths + answers * longest
    plan = replace(plan, lengths=lengths, padded=None if plan.padded is None else padded)
    return replace(_count(plan, padded, epochs), at_most=True)


def _count(plan: BatchPlan, padded: Padded, epochs: int) -> Tokens:
    """Sums over stretches of each epoch's order; micro-batches are planned only for some steps, and only where tokens
    cut them: planning a million rows takes minutes.
    """
    sizes, units = _by_unit(plan, padded)
    order = plan.order(0)
    epoch = int(sizes[order].sum())
    if plan.micro_batch_tokens is not None:
        steps = plan.steps(0, STEPS_SAMPLED)
        seen = sum(padded.tokens(batch) for step in steps for batch in plan.micro_batches(step))
        biggest = int((sizes if plan.padded is None else units.rows * units.longest).max())
        largest = max(biggest, min(plan.micro_batch_tokens, biggest * plan.rows_per_step))
        sampled = len(steps) < plan.steps_per_epoch
        return Tokens(epoch, seen * plan.steps_per_epoch // len(steps), largest, sampled)
    starts = np.arange(0, len(order), plan.rows_per_micro_batch)
    in_padded, largest = [], 0
    for number in range(max(1, min(epochs, EPOCHS_SEARCHED))):
        order = plan.order(number)
        rows = np.add.reduceat(units.rows[order], starts) * np.maximum.reduceat(units.longest[order], starts)
        in_padded.append(int(rows.sum()))
        own = np.add.reduceat(sizes[order], starts) if plan.padded is None else rows
        largest = max(largest, int(own.max()))
    return Tokens(epoch, in_padded[0], largest)


def _examples(plan: BatchPlan, units: np.ndarray) -> np.ndarray:
    """Which examples some of the plan's units hold."""
    return units if plan.pack_tokens is None else np.concatenate([plan.units[unit] for unit in units])


def _by_unit(plan: BatchPlan, padded: Padded) -> tuple[np.ndarray, Padded]:
    """Tokens of each of the plan's units in the shared layout, and in padded rows."""
    if plan.pack_tokens is None:
        return plan.lengths, padded
    order, starts = np.concatenate(plan.units), np.cumsum([0, *map(len, plan.units[:-1])])
    rows, longest = np.add.reduceat(padded.rows[order], starts), np.maximum.reduceat(padded.longest[order], starts)
    return np.add.reduceat(plan.lengths[order], starts), Padded(rows, longest)


def plan_batches(cfg: RunConfig, lengths: np.ndarray, world_size: int = 1) -> tuple[BatchPlan, Arithmetic]:
    """The run's batch plan and its arithmetic.

    Raises:
        ConfigError: the numbers give no step at all (C13).
    """
    train, data = cfg.train, cfg.data
    assert data.batch_tokens != "auto", "recipes.budget.settled comes first"
    rows_per_step = train.per_device_train_batch_size * train.gradient_accumulation_steps * world_size
    packing = data.packing if data.packing is not None else cfg.objective.stage == "pt"
    plan = BatchPlan(
        lengths=lengths,
        rows_per_micro_batch=train.per_device_train_batch_size,
        rows_per_step=rows_per_step,
        seed=train.data_seed if train.data_seed is not None else train.seed,
        shuffle=not data.disable_shuffling,
        micro_batch_tokens=data.batch_tokens,
        pack_tokens=data.cutoff_len if packing or data.neat_packing else None,
        drop_last=train.dataloader_drop_last and not data.streaming,  # a stream has no last step
    )
    steps_per_epoch = plan.steps_per_epoch
    if steps_per_epoch == 0:
        unit = "packs" if plan.pack_tokens else "rows"
        raise ConfigError(
            f"{len(plan.units)} {unit}, {rows_per_step} {unit} a step "
            f"({train.per_device_train_batch_size} per device × {train.gradient_accumulation_steps} accumulation × "
            f"{world_size} process{'' if world_size == 1 else 'es'}) → 0 steps with dataloader_drop_last",
            where="per_device_train_batch_size",
            fix="lower per_device_train_batch_size or gradient_accumulation_steps, or set dataloader_drop_last: false",
        )
    passes = (cfg.online.ppo_epochs or 1) if cfg.objective.stage in ONLINE else 1
    steps_per_epoch = train.max_steps if data.streaming else steps_per_epoch * passes
    if train.max_steps > 0:
        total = train.max_steps
        epochs = math.ceil(total / steps_per_epoch)
    else:
        total = math.ceil(train.num_train_epochs * steps_per_epoch)
        epochs = math.ceil(train.num_train_epochs)
    sizes = (train.per_device_train_batch_size, train.gradient_accumulation_steps, world_size)
    packs = len(plan.units) if plan.pack_tokens else None
    counts = steps_per_epoch, epochs, total, packs, plan.micro_batch_tokens, passes, data.streaming
    return plan, Arithmetic(len(lengths), *sizes, *counts)


def train_batches(plan: BatchPlan, arithmetic: Arithmetic) -> Iterator[np.ndarray]:
    """Every training micro-batch of the run, over all processes, in order."""
    for step in range(arithmetic.total_steps):
        epoch, position = divmod(step, arithmetic.steps_per_epoch)
        if position == 0:
            steps = plan.steps(epoch)
        yield from plan.micro_batches(steps[position])


def eval_batches(cfg: RunConfig, dataset: EncodedDataset) -> list[np.ndarray]:
    """An evaluation set in its own order, in row-count batches."""
    size = cfg.train.per_device_eval_batch_size
    return [np.arange(i, min(i + size, len(dataset))) for i in range(0, len(dataset), size)]
