"""Adapters that do not start at nothing: PiSSA takes the weights' principal components out of a base, LoftQ makes up
for what quantising has lost.

Either way the first policy is base + initial adapter, and that adapter stays beside it, frozen, as the reference
(Meng et al. 2024, arXiv 2404.02948; Li et al. 2023, arXiv 2310.08659).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils import cached_file

from trueup.errors import ModelError
from trueup.models.hub import HubAccess
from trueup.models.quantise import is_packed, weight_of

_INDEX, _WEIGHTS = "model.safetensors.index.json", "model.safetensors"
_ITERATIONS = 8  # of the fast decomposition that LoftQ uses


@torch.no_grad()
def take_principal(model: PeftModel, name: str, iterations: int) -> None:
    """PiSSA: adapter `name` becomes the base's principal components, and the base what is left of it.

    What is left is computed from the adapter as it was rounded, so that both together are the base again to the
    rounding of one weight.

    Args:
        iterations: of the fast decomposition; -1 computes it exactly.

    Raises:
        ModelError: an adapted layer is quantised, is no linear layer, or shares its weight with the embeddings.
    """
    how = "pissa" if iterations < 0 else f"pissa_niter_{iterations}"
    embeddings = model.get_base_model().get_input_embeddings().weight
    for path, layer in _adapted(model, name):
        base = layer.get_base_layer()
        if is_packed(base):
            raise ModelError(
                "PiSSA changes the base's weights, and these are quantised", where="pissa_init",
                fix="loftq_init: true starts from what quantising has lost; or drop quantization_bit",
            )  # fmt: skip
        if not isinstance(base, nn.Linear) or base.weight is embeddings:
            raise ModelError(
                f"PiSSA cannot take components out of {path}", where="pissa_init",
                expected="linear layers with weights of their own", fix="leave it out of lora_target",
            )  # fmt: skip
        whole = base.weight.data.float()
        layer.pissa_init(name, how)
        for factor in (layer.lora_A[name], layer.lora_B[name]):
            factor.weight.data = factor.weight.data.to(base.weight.dtype)
        base.weight.data = (whole - _product(layer, name)).to(base.weight.dtype)


@torch.no_grad()
def take_lost(model: PeftModel, name: str, originals: Callable[[str], Tensor]) -> None:
    """LoftQ in one step: adapter `name` becomes the best of its rank for what quantising has lost; the base stays.

    Args:
        originals: path of a layer → its weight as it was before.
    """
    for path, layer in _adapted(model, name):
        base = layer.get_base_layer()
        if not is_packed(base):
            continue
        lost = originals(path).to(base.weight.device).float() - weight_of(base, torch.float32)
        u, s, v = torch.svd_lowrank(lost, q=layer.r[name], niter=_ITERATIONS)
        root = torch.sqrt(s / layer.scaling[name])
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        a.data, b.data = (v * root).t().contiguous().to(a.dtype), (u * root).to(b.dtype)


def _product(layer: Any, name: str) -> Tensor:
    return layer.scaling[name] * (layer.lora_B[name].weight.float() @ layer.lora_A[name].weight.float())


def _adapted(model: PeftModel, name: str) -> Iterator[tuple[str, Any]]:
    """(path in the base, layer) of everything that has adapter `name`."""
    for path, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer) and (name in layer.r):
            yield path, layer


def originals_of(location: str, access: HubAccess) -> Callable[[str], Tensor]:
    """What reads single layers' weights from a model's files.

    Raises:
        ModelError: the files are not there, or name their tensors otherwise.
    """
    files = _files_of(location, access)

    def read(path: str) -> Tensor:
        for name in (f"{path}.weight", f"{path.partition('.')[2]}.weight", f"model.{path}.weight"):
            if name in files:
                with safe_open(files[name], "pt") as file:
                    return file.get_tensor(name)
        raise ModelError(
            f"the files of {location} have no tensor for {path}", where="loftq_init",
            fix="drop loftq_init: this model's files name their tensors otherwise",
        )  # fmt: skip

    return read


def _files_of(location: str, access: HubAccess) -> dict[str, str]:
    """Tensor → file."""
    common = dict(revision=access.revision, token=access.token, cache_dir=access.cache_dir)
    missing = {"_raise_exceptions_for_missing_entries": False}
    if single := cached_file(location, _WEIGHTS, **missing, **common):
        with safe_open(single, "pt") as file:
            return dict.fromkeys(file.keys(), single)
    index = cached_file(location, _INDEX, **missing, **common)
    if index is None:
        raise ModelError(f"{location} has no {_WEIGHTS}", where="loftq_init", expected="weights as safetensors")
    parts = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
    paths = {part: cached_file(location, part, **common) for part in set(parts.values())}
    return {name: str(paths[part]) for name, part in parts.items()}
