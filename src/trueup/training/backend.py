"""Where a training runs: one process, or several that sum their gradients once per step.

Everything a rank tells the others goes through here. Host values (counts, metrics, flags) travel as
small Python objects in rank order, so their sums do not depend on timing; gradients travel as flat
fp32 buckets.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from trueup.errors import ResourceError

#: (sum, count) of each metric, as exact host floats.
HostMetrics = dict[str, tuple[float, float]]


class Backend(Protocol):
    """The processes of a run. Every method but the properties is called by all ranks, in the same
    order.
    """

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def device(self) -> torch.device: ...

    def gather(self, value: Any) -> list[Any]:
        """One host value of every rank, in rank order."""
        ...

    def sum_counts(self, counts: Mapping[str, float]) -> dict[str, float]:
        """Sums over ranks; a rank may lack names that others have."""
        ...

    def sum_metrics(self, metrics: HostMetrics) -> HostMetrics:
        """Sums of both members over ranks; a rank may lack names that others have."""
        ...

    def sum_gradients(self, buckets: Sequence[Tensor]) -> None:
        """Sum flat buckets over ranks, in place."""
        ...

    def copy_from_first(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite tensors with rank 0's, in place."""
        ...

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        ...

    def on_first(self, action: Callable[[], None]) -> None:
        """Run `action` on rank 0 while the others wait; its failure ends every rank."""
        ...

    def barrier(self) -> None: ...
    def close(self) -> None: ...


class Single:
    """One process on one device."""

    rank = 0
    world_size = 1

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def sum_counts(self, counts: Mapping[str, float]) -> dict[str, float]:
        return dict(counts)

    def sum_metrics(self, metrics: HostMetrics) -> HostMetrics:
        return metrics

    def sum_gradients(self, buckets: Sequence[Tensor]) -> None:
        pass

    def copy_from_first(self, tensors: Sequence[Tensor]) -> None:
        pass

    def any(self, flag: bool) -> bool:
        return flag

    def on_first(self, action: Callable[[], None]) -> None:
        action()

    def barrier(self) -> None:
        pass

    def close(self) -> None:
        pass


class DDP:
    """Processes started by torchrun, each with a whole copy of the model. Raises ResourceError if
    they cannot meet.

    Host values always go through gloo, so that no collective on them waits for a GPU.
    """

    def __init__(self, device: torch.device | str = "cpu", timeout_seconds: float = 1800) -> None:
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.device = torch.device(device)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", local_rank)
            torch.cuda.set_device(self.device)
        if not dist.is_initialized():
            kind = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            try:
                dist.init_process_group(kind, timeout=timedelta(seconds=timeout_seconds))
            except (RuntimeError, ValueError) as error:
                raise ResourceError(
                    f"the processes of this run could not meet: {error}",
                    where="torch.distributed",
                    fix="start them with torchrun, and free the port named by MASTER_PORT",
                ) from error
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def sum_counts(self, counts: Mapping[str, float]) -> dict[str, float]:
        totals: dict[str, float] = {}
        for of_rank in self.gather(dict(counts)):
            for name, value in of_rank.items():
                totals[name] = totals.get(name, 0.0) + value
        return totals

    def sum_metrics(self, metrics: HostMetrics) -> HostMetrics:
        totals: HostMetrics = {}
        for of_rank in self.gather(metrics):
            for name, (value, count) in of_rank.items():
                old_value, old_count = totals.get(name, (0.0, 0.0))
                totals[name] = (old_value + value, old_count + count)
        return totals

    def sum_gradients(self, buckets: Sequence[Tensor]) -> None:
        for work in [dist.all_reduce(bucket, async_op=True) for bucket in buckets]:
            if work is not None:
                work.wait()

    def copy_from_first(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)

    def any(self, flag: bool) -> bool:
        vote = torch.tensor([int(flag)])
        dist.all_reduce(vote, op=dist.ReduceOp.MAX)
        return bool(vote.item())

    def on_first(self, action: Callable[[], None]) -> None:
        failure: Exception | None = None
        if self.rank == 0:
            try:
                action()
            except Exception as error:  # told to the others first, or they would wait for ever
                failure = error
        code = getattr(failure, "exit_code", 1)
        told = self.gather(None if failure is None else (str(failure), code))[0]
        if failure is not None:
            raise failure
        if told is not None:
            error = ResourceError(f"rank 0 failed, so this rank stops: {told[0]}")
            error.exit_code = told[1]  # whichever process ends first, the run ends with this code
            raise error

    def barrier(self) -> None:
        self.gather(None)

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def make_backend(device: torch.device | str = "cpu", timeout_seconds: float = 1800) -> Backend:
    """`DDP` when torchrun's environment says that there are several processes, else `Single`."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return DDP(device, timeout_seconds)
    return Single(device)
