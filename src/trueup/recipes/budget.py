"""`batch_tokens: auto`: how many tokens a micro-batch may have on this device.

What a step learns from is what was asked for (`per_device_train_batch_size` × `gradient_accumulation_steps` ×
processes); only how it is cut into forward passes follows from memory. The number is part of the run: it stands in
run.yaml, and a resume takes it from there, whatever is free then.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from trueup.config.schema import RunConfig
from trueup.models.estimate import needs_of, shape_only
from trueup.models.load import load_tokenizer
from trueup.models.memory import LayerCosts
from trueup.models.vocabulary import fit_vocabulary
from trueup.quantities import sized
from trueup.recipes.references import reference_bytes
from trueup.recipes.reward import kind_of
from trueup.training.backend import Backend
from trueup.training.run_files import read_config
from trueup.training.run_target import is_auto

log = logging.getLogger("trueup")

#: Tokens beyond which a larger micro-batch makes no step faster (docs/log.md; on GPUs unmeasured). Below an eighth of
#: them, layers recompute before products get thinner still.
ENOUGH = {"cpu": 4096}
ENOUGH_ON_GPUS = 16384
THIN = 1 / 8
FEWEST = 64


def settled(cfg: RunConfig, backend: Backend | None = None, free: int | None = None) -> RunConfig:
    """The config with a number in place of `batch_tokens: auto`, the same on all processes; others as they are.

    Args:
        free: bytes that were free before the model was loaded, if it is.
    """
    if cfg.data.batch_tokens != "auto":
        return cfg
    kept = begun_with(cfg, "batch_tokens")
    if not isinstance(kept, int):
        kind = kind_of(cfg)
        shape = shape_only(cfg, kind)
        new_rows = fit_vocabulary(shape, cfg.model, load_tokenizer(cfg.model))
        needs = needs_of(cfg, shape, kind, functools.partial(reference_bytes, cfg), new_rows, free)
        kept = tokens_that_fit(cfg.train.gradient_checkpointing, needs.costs, needs.room, needs.device)
        log.info(
            "batch_tokens: auto is %s tokens a micro-batch (%s free for activations)", f"{kept:,}", sized(needs.room)
        )
    everywhere = backend.gather(kept) if backend else [kept]
    return cfg.replace(batch_tokens=min(everywhere))


def tokens_that_fit(mode: str, costs: LayerCosts, room: int, device: torch.device) -> int:
    """The largest worthwhile micro-batch whose activations fit, by halves; a thin one only where nothing else does.

    Args:
        mode: `gradient_checkpointing`; auto recomputes layers rather than make micro-batches thin.
        room: bytes for activations.
    """
    enough = ENOUGH.get(device.type, ENOUGH_ON_GPUS)
    some, every = costs.layers // 2, costs.layers
    ways = {"off": [0], "full": [every], "selective": [some, every], "auto": [0, every]}[mode]
    worthwhile = list(_halves(enough, int(THIN * enough)))
    tried = [(tokens, recomputing) for recomputing in ways for tokens in worthwhile]
    tried += [(tokens, ways[-1]) for tokens in _halves(worthwhile[-1], FEWEST)]
    return next((tokens for tokens, recomputing in tried if costs.needed(tokens, recomputing) <= room), FEWEST)


def _halves(largest: int, smallest: int) -> Iterator[int]:
    while largest >= smallest:
        yield largest
        largest //= 2


def begun_with(cfg: RunConfig, key: str) -> Any:
    """What the run that is gone on with had for a key; None for a new one."""
    resume = cfg.train.resume_from_checkpoint
    if not resume:
        return None
    directory = Path(str(cfg.train.output_dir)) if is_auto(resume) else Path(str(resume)).parent
    return read_config(directory).get(key)
