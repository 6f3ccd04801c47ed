"""What to change in a config whose run would not fit: the cheapest ways first, each with what it would then take."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from trueup.config.schema import RunConfig
from trueup.models.estimate import estimate, shape_only
from trueup.models.tuners import ADAPTERS
from trueup.recipes.references import reference_bytes
from trueup.recipes.reward import kind_of

#: How many are told.
SHOWN = 3


@dataclass(frozen=True)
class Remedy:
    """A change, what it costs beside memory, and the bytes a run would take with it."""

    change: str
    price: str
    memory: int
    fits: bool


def remedies(cfg: RunConfig, largest: int, free: int) -> list[Remedy]:
    """The cheapest changes that save memory; those that are enough come first.

    Args:
        largest: tokens of the largest micro-batch as it is.
        free: bytes that a run may take.
    """

    def needed(tokens: int, **changes: Any) -> int:
        changed = cfg.replace(**changes)
        kind = kind_of(changed)
        beside = functools.partial(reference_bytes, changed)
        return estimate(changed, shape_only(changed, kind), tokens, kind, beside).memory

    now = needed(largest)
    found = [Remedy(*told, memory, memory <= free) for *told, memory in _tried(cfg, largest, free, needed)]
    saving = [remedy for remedy in found if remedy.memory < 0.97 * now]
    return sorted(saving, key=lambda remedy: not remedy.fits)[:SHOWN]  # stable: else as they are listed, by price


def _tried(cfg: RunConfig, largest: int, free: int, needed: Callable[..., int]) -> Iterator[tuple[str, str, int]]:
    train, same = cfg.train, "the same result"
    if train.gradient_checkpointing in ("off", "selective"):
        yield "gradient_checkpointing: full", f"{same}, slower", needed(largest, gradient_checkpointing="full")
    rows = train.per_device_train_batch_size
    while rows > 1 and cfg.data.batch_tokens is None:
        rows //= 2
        memory = needed(math.ceil(largest * rows / train.per_device_train_batch_size))
        if memory <= free or rows == 1:
            more = math.ceil(train.gradient_accumulation_steps * train.per_device_train_batch_size / rows)
            yield f"per_device_train_batch_size: {rows}, gradient_accumulation_steps: {more}", same, memory
            break
    if cfg.objective.precompute_ref_log_probs is False:
        yield "precompute_ref_log_probs: true", same, needed(largest, precompute_ref_log_probs=True)
    if cfg.tuning.finetuning_type in ADAPTERS and not cfg.model.quantization_bit:
        yield "quantization_bit: 4", "a base of four bits", needed(largest, quantization_bit=4)
    if cfg.tuning.finetuning_type == "full":
        yield "finetuning_type: lora", "an adapter in place of all weights", needed(largest, finetuning_type="lora")
    half = cfg.data.cutoff_len // 2
    if largest > half >= 64:
        yield (
            f"cutoff_len: {half}",
            "longer rows are cut",
            needed(min(largest, math.ceil(largest / 2)), cutoff_len=half),
        )
