"""What a run will need, from shapes alone: parameters, memory, disk. Nothing is downloaded but the model's config."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from transformers import PretrainedConfig, PreTrainedModel

from trueup import memory
from trueup.config.schema import ModelSection, RunConfig
from trueup.models.adapters import attach_trained, make_room
from trueup.models.device_memory import free_memory, resident
from trueup.models.expansion import keep_to_blocks
from trueup.models.hub import resolve_model
from trueup.models.load import (
    hub_access,
    pick_device,
    pick_dtype,
    read_model_config,
    unfreeze,
)
from trueup.models.memory import (
    FP32,
    USABLE,
    LayerCosts,
    Recomputation,
    decide,
    head_bytes,
    layer_costs,
    moments_bytes,
    optimizer_bytes,
)
from trueup.models.policy import Policy
from trueup.models.quantise import expected_bytes
from trueup.models.rope import fit_rope
from trueup.models.tuners import ADAPTERS, adapter_config

#: What loading, the first forward and the kernels' own caches take on a CPU, whatever the model (docs/log.md).
LOADING = 40 * 2**20


@dataclass(frozen=True)
class Estimate:
    """Bytes by purpose, and what they were computed from (docs/log.md has them beside what runs took)."""

    parameters: int
    trainable: int
    device: str
    dtype: str
    weights: int
    optimizer: int  # fp32 masters and gradients of what trains, and the optimizer's state
    activations: int
    head: int  # one tile of logits, in compute dtype and in fp32, and a trained head's gradient
    checkpoint: int  # one checkpoint on disk
    recomputation: Recomputation  # what `gradient_checkpointing` comes to
    reference: int = 0  # one that stays beside the model
    program: int = 0  # what the program itself takes of a machine's memory, before any model

    @property
    def peak(self) -> int:
        """Of the whole process, as the system counts it; on a GPU, of the device."""
        return self.memory + self.program

    @property
    def memory(self) -> int:
        return self.weights + self.optimizer + self.activations + self.head + self.reference

    def to_dict(self) -> dict:
        return {**asdict(self), "memory": self.memory, "peak": self.peak}


def shape_only(cfg: RunConfig, kind: type[Policy] = Policy) -> PreTrainedModel:
    """The model with its real shapes and no weights (meta device)."""
    names = cfg.model.model_name_or_path, cfg.model.adapter_name_or_path
    name, location, starts = resolve_model(*names, hub_access(cfg.model))
    config = read_model_config(location, cfg.model, name)
    kind.prepare(config)
    if not memory.is_name(location):
        fit_rope(config, cfg.model, starts, name)
    shape = without_weights(config, cfg.model, kind)
    make_room(shape, starts)
    return shape


def without_weights(config: PretrainedConfig, model: ModelSection, kind: type[Policy] = Policy) -> PreTrainedModel:
    """A model that is not loaded, by its config alone (meta device)."""
    with torch.device("meta"):
        return kind.auto_class.from_config(config, trust_remote_code=model.trust_remote_code)


@dataclass(frozen=True)
class Needs:
    """What a run takes whatever its micro-batches are (bytes), and what is left for these."""

    parameters: int
    trainable: int
    device: torch.device
    dtype: torch.dtype
    weights: int
    optimizer: int
    head: int
    reference: int
    checkpoint: int
    costs: LayerCosts
    room: int  # for activations


def needs_of(
    cfg: RunConfig,
    base: PreTrainedModel,
    kind: type[Policy] = Policy,
    reference: Callable[[PreTrainedModel, torch.dtype], int] = lambda *_: 0,
    new_rows: Sequence[int] = (),
    free: int | None = None,
) -> Needs:
    """What a run of `base` takes (its shapes are enough); the model is set up for training on the way.

    Args:
        reference: bytes of what stays beside the model, once it is set up for training in that format.
        new_rows: of embeddings and head, which have to train.
        free: bytes that were free before the model was loaded; by default those that are now.
    """
    device = pick_device(cfg.model.device)
    dtype = pick_dtype(device, cfg.train.bf16, cfg.train.fp16)
    base.requires_grad_(False)
    parameters = sum(p.numel() for p in base.parameters())
    weights = expected_bytes(base, cfg.model, dtype)
    if cfg.tuning.finetuning_type in ADAPTERS:
        wanted = adapter_config(cfg.tuning, base, kind, new_rows)
        if cfg.tuning.use_llama_pro:
            keep_to_blocks(wanted, base, cfg.tuning.freeze_trainable_layers)
        model = attach_trained(base, wanted, [], "estimate").model
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        saved = trainable
    else:
        unfreeze(base, cfg.tuning, kind, new_rows)
        trainable = sum(p.numel() for p in base.parameters() if p.requires_grad)
        saved = parameters
    optimizer = optimizer_bytes(base, cfg.train, dtype, device)
    head = head_bytes(base, dtype, device)
    beside = reference(base, dtype)
    free = free_memory(device) if free is None else free
    return Needs(
        parameters=parameters,
        trainable=trainable,
        device=device,
        dtype=dtype,
        weights=weights,
        optimizer=optimizer,
        head=head,
        reference=beside,
        checkpoint=(saved + trainable) * FP32 + moments_bytes(base, cfg.train),
        costs=layer_costs(base, cfg.tuning, dtype, device, cfg.model.booster, cfg.train.activation_offloading),
        room=max(int(USABLE * free) - weights - optimizer - head - beside, 0),
    )


def estimate(
    cfg: RunConfig,
    base: PreTrainedModel,
    micro_batch_tokens: int,
    kind: type[Policy] = Policy,
    reference: Callable[[PreTrainedModel, torch.dtype], int] = lambda *_: 0,
    new_rows: Sequence[int] = (),
) -> Estimate:
    """Estimate a run of `base` (its shapes are enough).

    Args:
        micro_batch_tokens: of the longest micro-batch, shared.
        reference: bytes of what stays beside the model, once it is set up for training in that format.
        new_rows: of embeddings and head, which have to train.
    """
    needs = needs_of(cfg, base, kind, reference, new_rows)
    recomputation = decide(cfg.train.gradient_checkpointing, needs.costs, micro_batch_tokens, needs.room)
    return Estimate(
        parameters=needs.parameters,
        trainable=needs.trainable,
        device=str(needs.device),
        dtype=str(needs.dtype).removeprefix("torch."),
        weights=needs.weights,
        optimizer=needs.optimizer,
        activations=recomputation.needed,
        head=needs.head,
        checkpoint=needs.checkpoint,
        recomputation=recomputation,
        reference=needs.reference,
        program=resident() + LOADING if needs.device.type == "cpu" else 0,
    )
