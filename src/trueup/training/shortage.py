"""A device that runs out of memory in the middle of a step: seen, cleared away, and done again in smaller pieces."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from trueup.errors import ResourceError
from trueup.training.backend import Backend


@runtime_checkable
class Cuts(Protocol):
    """A program whose micro-batches can be cut without changing what a step learns."""

    def cut(self, batch: Any, pieces: int) -> Sequence[Any]:
        """A micro-batch in up to so many pieces; itself where it holds one example."""
        ...

    def forget_step(self) -> None:
        """Forget what the losses of a step left behind that is begun again."""
        ...


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine had no memory left; torch has no class of its own for the machine's."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


@dataclass(frozen=True)
class Draws:
    """torch's generators as they stand when a step begins: done again, it draws what it drew."""

    cpu: Tensor
    cuda: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> Draws:
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)

    def restore(self, device: torch.device) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, device)


def clear(backend: Backend) -> None:
    """Give back what the failed attempt held. The error has to be out of scope: its frames hold tensors."""
    gc.collect()
    if backend.device.type == "cuda":
        torch.cuda.empty_cache()


def in_pieces(program: Any, batches: Sequence[Any], pieces: int) -> list[Any]:
    """Micro-batches cut into so many each; as they are where the program cannot cut."""
    if pieces == 1 or not isinstance(program, Cuts):
        return list(batches)
    return [piece for batch in batches for piece in program.cut(batch, pieces)]


def out_of_memory(step: int, backend: Backend) -> ResourceError:
    """Nothing is left to cut."""
    return ResourceError(
        f"{backend.device.type} ran out of memory at step {step}, with one example at a time",
        where="per_device_train_batch_size",
        expected="memory for one example",
        fix="set gradient_checkpointing: full, lower cutoff_len, or set quantization_bit: 4; "
        "`trueup check` says what each needs",
    )
