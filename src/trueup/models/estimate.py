"""What a run will need, from shapes alone: parameters, memory, disk. Nothing is downloaded but the model's config."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from trueup.config.schema import RunConfig
from trueup.models.adapters import attach_lora
from trueup.models.hub import resolve_model
from trueup.models.load import (
    hub_access,
    lora_config,
    pick_device,
    pick_dtype,
    read_model_config,
    unfreeze,
    wants_checkpointing,
)
from trueup.models.logprobs import LARGE_TILE, TILES

FP32 = 4  # bytes


@dataclass(frozen=True)
class Estimate:
    """Bytes by purpose, and what they were computed from. Good to some 30 %: kernels' own buffers are not known."""

    parameters: int
    trainable: int
    device: str
    dtype: str
    weights: int
    optimizer: int  # fp32 masters, gradients and two moments of what trains
    activations: int
    head: int  # one tile of logits, in compute dtype and in fp32
    checkpoint: int  # one checkpoint on disk

    @property
    def memory(self) -> int:
        return self.weights + self.optimizer + self.activations + self.head

    def to_dict(self) -> dict:
        return {**asdict(self), "memory": self.memory}


def shape_only(cfg: RunConfig) -> PreTrainedModel:
    """The model with its real shapes and no weights (meta device)."""
    names = cfg.model.model_name_or_path, cfg.model.adapter_name_or_path
    name, location, _ = resolve_model(*names, hub_access(cfg.model))
    config = read_model_config(location, cfg.model, name)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=cfg.model.trust_remote_code)


def estimate(cfg: RunConfig, base: PreTrainedModel, micro_batch_tokens: int) -> Estimate:
    """Estimate a run of `base` (its shapes are enough) whose longest micro-batch holds so many tokens, shared."""
    device = pick_device(cfg.model.device)
    dtype = pick_dtype(device, cfg.train.bf16, cfg.train.fp16)
    width = dtype.itemsize
    rows, columns = TILES.get(device.type, LARGE_TILE)
    base.requires_grad_(False)
    text = base.config.get_text_config()
    parameters = sum(p.numel() for p in base.parameters())
    if cfg.tuning.finetuning_type == "lora":
        model = attach_lora(base, lora_config(cfg.tuning), [], "estimate").model
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        saved = trainable
    else:
        unfreeze(base, cfg.tuning)
        trainable = sum(p.numel() for p in base.parameters() if p.requires_grad)
        saved = parameters
    return Estimate(
        parameters=parameters,
        trainable=trainable,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        weights=parameters * width,
        optimizer=trainable * 4 * FP32,
        activations=_activations(text, micro_batch_tokens, width, wants_checkpointing(cfg.train, device)),
        head=rows * min(columns, text.vocab_size) * (width + FP32),
        checkpoint=saved * FP32 + 3 * trainable * FP32,
    )


def _activations(text, tokens: int, width: int, checkpointing: bool) -> int:
    """What autograd keeps per decoder layer: inputs of norms and projections, q, k, v, o, and the MLP's three."""
    hidden, layers = text.hidden_size, text.num_hidden_layers
    inner = getattr(text, "intermediate_size", None) or 4 * hidden
    per_layer = (8 * hidden + 4 * inner) * width
    if checkpointing:
        return tokens * (layers * hidden * width + per_layer)
    return tokens * layers * per_layer
