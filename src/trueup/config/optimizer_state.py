"""What an optimizer keeps for a weight, in bytes, from the weight's name and shape alone: beside its fp32 master and
gradient, which every optimizer has. Torch-free. tests/training/test_training_optimizers.py compares all of them with
what they really keep.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

FP32 = 4
BLOCK = 256  # numbers of 8 bits that share a scale in bitsandbytes
SMALLEST_IN_8_BITS = 4096  # elements; smaller tensors keep fp32 moments there
PROJECTED = {"rank": 128, "proj_type": "std"}  # GaLore's and APOLLO's, unless optim_args say otherwise

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed|wte|wpe|lora_embedding)")

Shapes = Mapping[str, Sequence[int]]


def layer_of(name: str) -> int | None:
    """Which decoder layer a parameter is in."""
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def is_embedding(name: str) -> bool:
    """Whether it embeds tokens or positions."""
    return _EMBEDDING.search(name) is not None


def is_matrix_of_a_layer(name: str, dimensions: int) -> bool:
    """Whether it is one of the layers' matrices: not an embedding, not the head, not a norm."""
    return dimensions == 2 and layer_of(name) is not None and not is_embedding(name)


def projected(shapes: Shapes, targets: Sequence[str]) -> set[str]:
    """Names of the matrices a projecting optimizer works on: all of the layers', or those named."""
    matrices = {name for name, shape in shapes.items() if is_matrix_of_a_layer(name, len(shape))}
    names = [target for target in targets if target not in ("all", "all-linear")]
    return {name for name in matrices if any(re.search(target, name) for target in names)} if names else matrices


def state_bytes(shapes: Shapes, optim: str, arguments: Mapping[str, Any], targets: Sequence[str] = ()) -> int:
    """Bytes of the state for all weights.

    Args:
        shapes: of the trained weights, by name.
        arguments: of `optim_args`, read.
        targets: `optim_target_modules`.
    """
    aside = projected(shapes, targets) if optim.startswith(("galore", "apollo")) else set()
    return sum(
        _of_projected(shape, optim, {**PROJECTED, **arguments})
        if name in aside
        else _of_weight(name, shape, optim, arguments)
        for name, shape in shapes.items()
    )


def _of_weight(name: str, shape: Sequence[int], optim: str, arguments: Mapping[str, Any]) -> int:
    size = math.prod(shape)
    moment = FP32 * size
    if "8bit" in optim and size >= arguments.get("min_8bit_size", SMALLEST_IN_8_BITS):
        return _moments(optim) * (size + FP32 * math.ceil(size / BLOCK))
    if optim in ("sgd", "schedule_free_sgd"):
        return moment if optim != "sgd" or arguments.get("momentum") else 0
    if optim == "rmsprop":
        return moment * (1 + bool(arguments.get("momentum")) + bool(arguments.get("centered")))
    if optim in ("adafactor", "galore_adafactor"):
        return _factored(shape)
    if optim == "adam_mini":  # one second moment a row; a head or a whole tensor has fewer still
        return 2 * moment if "bias" in name else moment + FP32 * (shape[0] if len(shape) > 1 else 1)
    if optim == "muon" and is_matrix_of_a_layer(name, len(shape)):
        return moment
    return _moments(optim) * moment


def _moments(optim: str) -> int:
    """How many numbers of a weight's own shape there are, where nothing makes them fewer."""
    few = {"lion": 1, "rmsprop": 1, "adagrad": 1, "ademamix": 3}
    return next((number for kind, number in few.items() if kind in optim), 2)


def _factored(shape: Sequence[int]) -> int:
    """A number a row and a column, in place of one an element (Adafactor, arXiv 1804.04235)."""
    if len(shape) < 2:
        return FP32 * math.prod(shape)
    return FP32 * (math.prod(shape[:-1]) + math.prod(shape[:-2]) * shape[-1])


def _of_projected(shape: Sequence[int], optim: str, arguments: Mapping[str, Any]) -> int:
    """The projection, and moments of the gradient it projects (GaLore, arXiv 2403.03507, table 1)."""
    rows, columns = shape
    rank = int(arguments["rank"])
    if optim.startswith("galore") or arguments.get("proj") == "svd":
        rank = min(rank, rows, columns)  # an SVD has no more directions
    kind = arguments["proj_type"]
    if kind == "full":
        projection, low = rank * (rows + columns), (rank, rank)
    elif kind == "right" or (kind in ("std", "reverse_std") and (rows >= columns) == (kind == "std")):
        projection, low = rank * columns, (rows, rank)
    else:
        projection, low = rows * rank, (rank, columns)
    return FP32 * projection + (_factored(low) if optim == "galore_adafactor" else 2 * FP32 * math.prod(low))
