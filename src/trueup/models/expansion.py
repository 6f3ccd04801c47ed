"""Blocks inserted into a model that leave what it says as it is, to be trained alone: LLaMA-Pro (arXiv 2401.02415).

A new block is a copy of the one below it whose attention and MLP add nothing, for their last projections are 0. Which
blocks are new stands in the model's config, under `NEW_BLOCKS`.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trueup.errors import ModelError
from trueup.models.memory import decoder_layers
from trueup.models.quantise import weight_of
from trueup.models.tuners import check_targets, targets_of

log = logging.getLogger("trueup")

NEW_BLOCKS = "llama_pro_blocks"

#: What the last projections of attention and of MLPs are called.
_LAST = {
    "o_proj", "out_proj", "dense", "c_proj", "wo", "down_proj", "down_proj_bias", "fc2", "fc_out", "w2",
    "dense_4h_to_h", "linear_out",
}  # fmt: skip


def insert_blocks(base: PreTrainedModel, count: int) -> list[int]:
    """One new block after every (depth / count) of a model's own, in place.

    Returns:
        Where they are now, counted from 0.

    Raises:
        ModelError: they cannot be spread evenly, or the architecture builds blocks by their position.
    """
    layers = decoder_layers(base)
    depth = len(layers)
    if depth % count:
        even = ", ".join(str(n) for n in range(1, depth + 1) if depth % n == 0)
        raise ModelError(
            f"{count} blocks cannot be spread evenly over {depth}", where="num_expand", expected=f"one of {even}"
        )
    group = depth // count
    sources = [i for i in range(depth) for _ in range(2 if (i + 1) % group == 0 else 1)]
    new = [place for place in range(1, len(sources)) if sources[place] == sources[place - 1]]
    blocks = [_silent(layers[i]) if place in new else layers[i] for place, i in enumerate(sources)]
    layers.extend(blocks[depth:])
    for place, block in enumerate(blocks):
        layers[place] = block
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place  # type: ignore[assignment]
    _describe(base, sources, new)
    _check_config(base)
    return new


def _silent(block: nn.Module) -> nn.Module:
    """A copy that adds nothing to what passes it."""
    found = copy.deepcopy(block)
    with torch.no_grad():
        for path, parameter in found.named_parameters():
            if _LAST.intersection(path.split(".")):
                parameter.zero_()
    return found


def _describe(base: PreTrainedModel, sources: Sequence[int], new: list[int]) -> None:
    """The config of what the model is now: how deep, which blocks are new, and all it says of each block."""
    text = base.config.get_text_config()
    depth = len(sources) - len(new)
    for name, value in text.to_dict().items():
        if isinstance(value, list) and len(value) == depth and "layer" in name:
            setattr(text, name, [value[i] for i in sources])
    for name in ("num_hidden_layers", "num_layers"):
        if getattr(text, name, None) == depth:
            setattr(text, name, len(sources))
    earlier = set(getattr(text, NEW_BLOCKS, None) or ())
    setattr(text, NEW_BLOCKS, [p for p, i in enumerate(sources) if p in new or i in earlier])


def _check_config(base: PreTrainedModel) -> None:
    """Whether whoever reads the config builds this model."""
    with torch.device("meta"):
        built = type(base)(copy.deepcopy(base.config)).state_dict()
    if {k: v.shape for k, v in built.items()} != {k: v.shape for k, v in base.state_dict().items()}:
        raise ModelError(
            f"{type(base).__name__} builds its blocks by their position: others cannot be put between them",
            where="num_expand", fix="train some of its own layers: finetuning_type: freeze",
        )  # fmt: skip


def trained_blocks(base: PreTrainedModel, count: int) -> list[int]:
    """Where the blocks are that `use_llama_pro` trains: the last of each of `count` equal groups.

    Raises:
        ModelError: the groups are not equal, or one of these blocks is none that was inserted.
    """
    depth = len(decoder_layers(base))
    if count < 1 or depth % count:
        raise ModelError(
            f"{depth} layers are not {count} equal groups, the last layer of each an inserted one",
            where="freeze_trainable_layers", expected="the num_expand that the model was exported with",
            fix="export the model once with num_expand, and train what comes of it",
        )  # fmt: skip
    chosen = list(range(depth // count - 1, depth, depth // count))
    known = getattr(base.config.get_text_config(), NEW_BLOCKS, None)
    if known and (others := sorted(set(chosen) - set(known))):
        raise ModelError(
            f"layers {', '.join(map(str, others))} would train, which were not inserted", where="use_llama_pro",
            expected=f"freeze_trainable_layers: {len(known)}, for the blocks {', '.join(map(str, known))}",
        )  # fmt: skip
    log.info("use_llama_pro: %d of %d blocks train: %s", count, depth, ", ".join(map(str, chosen)))
    return chosen


def keep_to_blocks(adapter: Any, base: PreTrainedModel, count: int) -> None:
    """Let an adapter be only in the blocks that `use_llama_pro` trains, named by whole paths as LLaMA-Factory does it.

    Args:
        adapter: peft's config, changed in place.

    Raises:
        ModelError: a target is in none of them, or is experts' weights in one tensor.
    """
    check_targets(base, adapter)
    if getattr(adapter, "target_parameters", None):
        raise ModelError(
            "adapters on experts go on every block or on none", where="lora_target",
            fix="leave the experts out of lora_target, or drop use_llama_pro",
        )  # fmt: skip
    found = targets_of(base, adapter) & _paths_within(base, trained_blocks(base, count))
    names = [] if isinstance(adapter.target_modules, str) else adapter.target_modules
    outside = sorted(name for name in names if not any(f".{path}".endswith(f".{name}") for path in found))
    if outside or not found:
        raise ModelError(
            f"{', '.join(outside) or 'nothing that lora_target matches'} is not in the inserted blocks, which alone "
            "use_llama_pro trains", where="lora_target", fix="name layers of blocks; additional_target trains others",
        )  # fmt: skip
    adapter.target_modules = found


def check_outlet(base: PreTrainedModel, adapted: Collection[str]) -> None:
    """Whether adapters at these paths can learn: no gradient comes through last projections that are 0.

    Raises:
        ModelError: their blocks still add nothing, and no last projection has an adapter.
    """
    if any(_LAST.intersection(path.split(".")) for path in adapted):
        return
    layers = decoder_layers(base)
    modules = {id(base.get_submodule(path)) for path in adapted}
    places = [i for i, layer in enumerate(layers) if modules.intersection(map(id, layer.modules()))]
    inside = {path: base.get_submodule(path) for path in _paths_within(base, places)}
    last = [
        module
        for path, module in inside.items()
        if _LAST.intersection(path.split(".")) and isinstance(module, nn.Linear | Conv1D)
    ]
    if not any(weight_of(module, base.dtype).any() for module in last):
        raise ModelError(
            "nothing would learn: the last projections of the inserted blocks are 0, and get no adapter",
            where="lora_target", expected="all, or names with such projections among them, such as o_proj, down_proj",
        )  # fmt: skip


def _paths_within(base: PreTrainedModel, places: Sequence[int]) -> set[str]:
    """Paths of the modules that some of a model's blocks are made of."""
    layers = decoder_layers(base)
    inside = {id(module) for place in places for module in layers[place].modules()}
    return {path for path, module in base.named_modules() if id(module) in inside}
