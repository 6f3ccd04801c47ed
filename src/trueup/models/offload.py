"""Activations that wait for the backward in the host's memory instead of the device's (`activation_offloading`).

Only what autograd keeps is moved, not weights, and each value once however many nodes keep it. Copies run in the order
of the computation, through page-locked memory on a GPU; what they cost there is unmeasured.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

SMALLEST = 2**20  # bytes: below, a copy costs more than it frees


@dataclass(frozen=True)
class _OnHost:
    values: Tensor
    device: torch.device


@contextmanager
def offloading(model: nn.Module, smallest: int = SMALLEST) -> Iterator[None]:
    """What a forward in here keeps for its backward goes to the host, but for weights and what is small."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    moved: dict[tuple, tuple[StorageWeakRef, _OnHost]] = {}  # while its storage lives, an address means one value

    def pack(tensor: Tensor) -> Tensor | _OnHost:
        storage = tensor.untyped_storage()
        if tensor.nbytes < smallest or type(tensor) is not Tensor or storage.data_ptr() in weights:
            return tensor
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version)
        known = moved.get(key)
        if known is None or known[0].expired():
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda).copy_(
                tensor, non_blocking=True
            )
            known = moved[key] = StorageWeakRef(storage), _OnHost(host, tensor.device)
        return known[1]

    def unpack(kept: Tensor | _OnHost) -> Tensor:
        return kept.values.to(kept.device, non_blocking=True) if isinstance(kept, _OnHost) else kept

    with saved_tensors_hooks(pack, unpack):
        yield
