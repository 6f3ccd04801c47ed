"""What is about to run, in a few lines a person reads before it starts."""

from __future__ import annotations

import os

import torch

from trueup.config.methods import ONLINE
from trueup.config.schema import RunConfig
from trueup.data.encode import Prepared
from trueup.models.load import Loaded
from trueup.models.memory import Recomputation
from trueup.models.quantise import count_parameters, describe, resident_bytes
from trueup.models.rope import stretch_of
from trueup.quantities import sized
from trueup.recipes.batches import Arithmetic, Tokens
from trueup.recipes.objective import describe_objective
from trueup.recipes.online_words import describe_online


def header(
    cfg: RunConfig, loaded: Loaded, prepared: Prepared, arithmetic: Arithmetic, tokens: Tokens | None = None
) -> str:
    """What is about to run, in a few lines."""
    a = arithmetic
    start = {True: "continuing its adapter", False: "a new adapter on top of"}
    begun = ""
    if loaded.starts:
        how = start[loaded.adapters.continued] if loaded.adapters else "merged with"
        begun = f", {how} {', '.join(loaded.starts)}"
    lines = {
        "model": f"{loaded.base_name}{begun}",
        **({"positions": str(stretch)} if (stretch := stretch_of(loaded.policy.base)) else {}),
        **({"base": quantised} if (quantised := quantised_words(loaded)) else {}),
        "training": f"{cfg.tuning.finetuning_type}, {loaded.num_trainable:,} of {loaded.num_parameters:,} parameters",
        "objective": _objective(cfg),
        "batch": batch_words(a),
        "steps": steps_words(a),
        **({"tokens": tokens_words(tokens, a, shared=loaded.policy.shared)} if tokens else {}),
        "device": _device(loaded, a.world_size),
        **({"booster": loaded.boosted} if loaded.boosted else {}),
        **({"memory": memory_words(loaded.recomputation)} if loaded.recomputation else {}),
        "template": prepared.template.name,
        "output": str(cfg.train.output_dir),
    }
    return _aligned(lines)


def quantised_words(loaded: Loaded) -> str | None:
    """`4-bit weights (bitsandbytes nf4): 463 MB instead of 988 MB`; None for a base that is not quantised."""
    base = loaded.policy.base
    kind = describe(base)
    if kind is None:
        return None
    plain = count_parameters(base) * loaded.dtype.itemsize
    return f"{kind}: {sized(resident_bytes(base))} instead of {sized(plain)}"


def batch_words(a: Arithmetic) -> str:
    """How an optimizer step comes about: `8 × 2 accumulation × 1 process = 16 rows a step`."""
    unit = "row" if a.packs is None else "pack"
    product = f"{a.rows_per_micro_batch} × {a.accumulation} accumulation × {counted(a.world_size, 'process')}"
    budget = f", in micro-batches of at most {a.tokens_per_micro_batch:,} tokens" if a.tokens_per_micro_batch else ""
    return f"{product} = {counted(a.rows_per_step, unit)} a step{budget}"


def steps_words(a: Arithmetic) -> str:
    """How many steps there are, and why."""
    if a.streamed:
        unit = "row" if a.packs is None else "pack"
        return f"{a.total_steps:,} in all, of {counted(a.total_steps * a.rows_per_step, unit)} read while training"
    packed = "" if a.packs is None else f" in {counted(a.packs, 'pack')}"
    passes = "" if a.passes == 1 else f" × {counted(a.passes, 'pass')}"
    epochs = f"{a.total_steps / a.steps_per_epoch:.3g}"
    return (
        f"{counted(a.examples, 'row')}{packed}{passes} → {counted(a.steps_per_epoch, 'step')} an epoch, "
        f"{a.total_steps:,} in all ({epochs} epoch{'' if epochs == '1' else 's'})"
    )


def tokens_words(tokens: Tokens, a: Arithmetic, shared: bool = True) -> str:
    """What goes through the model in an epoch, and what sharing prompts and not padding save."""
    most, about = "at most " if tokens.at_most else "", "about " if tokens.sampled else ""
    if not shared:
        return f"{most}{about}{tokens.epoch_padded:,} an epoch, padded"
    times = tokens.epoch_padded / max(tokens.epoch, 1)
    if a.packs is not None or times < 1.05:  # others pack too
        return f"{most}{tokens.epoch:,} an epoch"
    return f"{most}{tokens.epoch:,} an epoch instead of {about}{tokens.epoch_padded:,} padded ({times:.1f} times fewer)"


def memory_words(r: Recomputation) -> str:
    """Which layers recompute their activations, and why."""
    chosen = f"checkpointing {r.recomputing} of {r.layers} layers" if r.recomputing else "kept"
    if not r.activations:
        return f"activations {chosen}"
    scarce = "; this may not fit, so lower per_device_train_batch_size or cutoff_len" if r.needed > r.room else ""
    return f"activations {sized(r.activations)} of {sized(r.room)} free: {chosen}{scarce}"


def counted(number: int, noun: str) -> str:
    """`1 row`, `2,000 rows`, `2 processes`."""
    plural = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{plural}"


def evaluation_header(cfg: RunConfig, loaded: Loaded, prepared: Prepared) -> str:
    """The same for a run that only evaluates."""
    sets = ", ".join(f"{name} ({counted(len(dataset), 'row')})" for name, dataset in prepared.eval.items())
    lines = {
        "model": " + ".join([loaded.base_name, *loaded.starts]),
        **({"positions": str(stretch)} if (stretch := stretch_of(loaded.policy.base)) else {}),
        "objective": _objective(cfg),
        "data": sets,
        "device": _device(loaded, int(os.environ.get("WORLD_SIZE", "1"))),
        "template": prepared.template.name,
        "output": str(cfg.train.output_dir),
    }
    return _aligned(lines)


def _objective(cfg: RunConfig) -> str:
    return describe_online(cfg) if cfg.objective.stage in ONLINE else describe_objective(cfg)


def _device(loaded: Loaded, world_size: int) -> str:
    sharing = f"not shared: {loaded.layout_note}" if loaded.layout_note else "shared"
    gpus = torch.cuda.device_count() if loaded.device.type == "cuda" else 0
    idle = f" (one of {gpus} GPUs; NPROC_PER_NODE={gpus} trains on all)" if gpus > world_size == 1 else ""
    return f"{loaded.device}{idle}, {str(loaded.dtype).removeprefix('torch.')}, prompts {sharing}"


def _aligned(lines: dict[str, str]) -> str:
    return "\n".join(f"{name:<10}{text}" for name, text in lines.items())
