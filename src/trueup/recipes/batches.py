"""How rows become optimizer steps: the run's batch plan and the arithmetic that is shown to the user."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from trueup.config.methods import ONLINE
from trueup.config.schema import RunConfig
from trueup.data.encode import EncodedDataset
from trueup.data.forest import BatchPlan
from trueup.errors import ConfigError


@dataclass(frozen=True)
class Batch:
    """A micro-batch by name: which examples of which set. Its forest is laid out when it is needed."""

    split: str  # "train" or an evaluation set's name
    indices: np.ndarray  # [B] int64


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
    largest: int  # micro-batch
    largest_padded: int


#: Epochs that are searched for the largest micro-batch: they differ in nothing but the order of the rows.
EPOCHS_SEARCHED = 10


def count_tokens(dataset: EncodedDataset, plan: BatchPlan, epochs: int) -> Tokens:
    """The tokens of a run's training micro-batches."""
    rows = np.maximum((dataset.answer_lengths > 0).sum(1), 1)
    longest = dataset.prompt_lengths + dataset.answer_lengths.max(1, initial=0)
    shared: list[list[int]] = []
    padded: list[list[int]] = []
    for epoch in range(max(1, min(epochs, EPOCHS_SEARCHED))):
        batches = [batch for units in plan.steps(epoch) for batch in plan.micro_batches(units)]
        shared.append([int(dataset.lengths[batch].sum()) for batch in batches])
        padded.append([int(rows[batch].sum() * longest[batch].max()) for batch in batches])
    return Tokens(sum(shared[0]), sum(padded[0]), max(map(max, shared)), max(map(max, padded)))


def plan_batches(cfg: RunConfig, lengths: np.ndarray, world_size: int = 1) -> tuple[BatchPlan, Arithmetic]:
    """The run's batch plan and its arithmetic.

    Raises:
        ConfigError: the numbers give no step at all (C13).
    """
    train, data = cfg.train, cfg.data
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
        drop_last=train.dataloader_drop_last,
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
    steps_per_epoch *= passes
    if train.max_steps > 0:
        total = train.max_steps
        epochs = math.ceil(total / steps_per_epoch)
    else:
        total = math.ceil(train.num_train_epochs * steps_per_epoch)
        epochs = math.ceil(train.num_train_epochs)
    sizes = (train.per_device_train_batch_size, train.gradient_accumulation_steps, world_size)
    packs = len(plan.units) if plan.pack_tokens else None
    counts = steps_per_epoch, epochs, total, packs, plan.micro_batch_tokens, passes
    return plan, Arithmetic(len(lengths), *sizes, *counts)


def largest_answered(cfg: RunConfig, dataset: EncodedDataset, plan: BatchPlan) -> int:
    """Tokens of the largest micro-batch if every answer that the model writes is as long as it may be."""
    answers = (cfg.online.num_generations or 1) * cfg.generate.max_new_tokens
    plan = replace(plan, lengths=dataset.prompt_lengths + answers)
    return max(int(plan.lengths[batch].sum()) for units in plan.steps(0) for batch in plan.micro_batches(units))


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
