"""When a run logs, evaluates, saves and ends: plain arithmetic on the step number, so that a resume
needs no memory.

The keys and their meaning are those of transformers' TrainingArguments: an interval below 1 is a
share of all steps, `max_steps` overrides epochs, `eval_steps` defaults to `logging_steps`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers.optimization import get_scheduler

from trueup.errors import ConfigError
from trueup.training.optimizers import check_optimizer

Strategy = Literal["no", "steps", "epoch", "best"]


@dataclass(frozen=True)
class Interval:
    """Something that happens every `every` steps, or at each epoch's end."""

    strategy: Strategy
    every: int
    steps_per_epoch: int
    total_steps: int

    def due(self, step: int) -> bool:
        """Whether it happens after optimizer step `step` (counted from 1)."""
        if self.strategy == "steps":
            return step % self.every == 0
        if self.strategy == "epoch":
            return step % self.steps_per_epoch == 0 or step == self.total_steps
        return False


@dataclass(frozen=True)
class Plan:
    """The calendar of a run. Steps count from 1; "after step 0" is before training."""

    total_steps: int
    steps_per_epoch: int
    logging: Interval
    evaluation: Interval
    saving: Interval
    log_first_step: bool
    evaluate_on_start: bool
    evaluation_delay: float
    load_best: bool

    def position(self, steps_done: int) -> tuple[int, int]:
        """(epoch, step within it) of the next optimizer step, both counted from 0."""
        return divmod(steps_done, self.steps_per_epoch)

    def epoch(self, steps_done: int) -> float:
        """Epochs done, as a fraction, rounded to 4 digits for people."""
        return round(steps_done / self.steps_per_epoch, 4)

    def logs(self, step: int) -> bool:
        """Whether to log after `step`. The last step always logs, so that no step goes unseen."""
        if self.logging.strategy == "no":
            return False
        first = self.log_first_step and step == 1
        return first or self.logging.due(step) or step == self.total_steps

    def evaluates(self, step: int) -> bool:
        """Whether to evaluate after `step`. `eval_delay` counts steps or epochs, as the strategy
        does.
        """
        if step == 0:
            return self.evaluate_on_start
        waited = step / self.steps_per_epoch if self.evaluation.strategy == "epoch" else step
        return waited >= self.evaluation_delay and self.evaluation.due(step)

    def saves(self, step: int, ending: bool = False) -> bool:
        """Whether to save after `step`; the last is saved unless nothing is, or only the best."""
        at_end = ending and self.saving.strategy in ("steps", "epoch")
        return step > 0 and (at_end or self.saving.due(step))

    @property
    def saves_best(self) -> bool:
        """Whether an improved evaluation is saved even between the intervals."""
        return self.saving.strategy == "best" or (self.load_best and self.saving.strategy != "no")


def make_plan(settings: Any, steps_per_epoch: int) -> Plan:
    """The calendar from the train section's keys. Raises ConfigError if there is no step to do."""
    if steps_per_epoch < 1:
        raise ConfigError(
            "there are 0 steps in an epoch",
            expected="at least one optimizer step",
            fix="give more data, or a smaller batch or gradient_accumulation_steps",
        )
    if settings.max_steps and settings.max_steps > 0:
        total = int(settings.max_steps)
    else:
        total = math.ceil(settings.num_train_epochs * steps_per_epoch)

    def interval(strategy: Strategy, every: float | None) -> Interval:
        return Interval(strategy, _steps(every, total), steps_per_epoch, total)

    return Plan(
        total_steps=total,
        steps_per_epoch=steps_per_epoch,
        logging=interval(settings.logging_strategy, settings.logging_steps),
        evaluation=interval(settings.eval_strategy, settings.eval_steps or settings.logging_steps),
        saving=interval(settings.save_strategy, settings.save_steps),
        log_first_step=bool(settings.logging_first_step),
        evaluate_on_start=bool(settings.eval_on_start),
        evaluation_delay=float(settings.eval_delay or 0),
        load_best=bool(settings.load_best_model_at_end),
    )


def warmup_steps(settings: Any, total_steps: int) -> int:
    """Warm-up length: `warmup_steps` (below 1: a share of all steps), else `warmup_ratio`."""
    steps = settings.warmup_steps or 0
    if steps >= 1:
        return int(steps)
    return math.ceil(total_steps * (steps or settings.warmup_ratio or 0.0))


def check_schedule(settings: Any) -> None:
    """Make the optimizer and the learning rate's schedule on a parameter of its own, and ask that for the whole run's
    rates.

    Raises:
        ConfigError: `lr_scheduler_kwargs` lacks or holds what the schedule of that name does not take; the optimizer's
            package is missing.
    """
    check_optimizer(settings)
    total = settings.max_steps if settings.max_steps > 0 else 100
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=settings.learning_rate)
    try:
        schedule = get_scheduler(
            settings.lr_scheduler_type,
            optimizer,
            num_warmup_steps=warmup_steps(settings, total),
            num_training_steps=total,
            scheduler_specific_kwargs=dict(settings.lr_scheduler_kwargs),
        )
        if isinstance(schedule, LambdaLR):
            for step in (0, total // 2, total):
                float(schedule.lr_lambdas[0](step))
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ConfigError(
            f"`lr_scheduler_type: {settings.lr_scheduler_type}` does not work with these kwargs: {error}",
            where="lr_scheduler_kwargs",
            expected="the arguments of transformers' schedule of that name",
        ) from error


def _steps(every: float | None, total: int) -> int:
    if not every or every <= 0:
        return max(1, total)
    return max(1, math.ceil(total * every)) if every < 1 else int(every)
