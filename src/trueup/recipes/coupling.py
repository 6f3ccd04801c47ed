"""What the examples of an optimizer step must know of each other, however the step is cut into micro-batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trueup.training.backend import Backend


def gather_values(mine: Sequence[dict[str, Tensor]], backend: Backend) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Values of all micro-batches of a step, and where those of this process stand among them.

    Args:
        mine: for each of this process's micro-batches a [B] value per name.

    Returns:
        Name → [M] on the CPU, process after process, and [B] places for each of this process's micro-batches.
    """
    told = backend.gather([{name: value.float().cpu().tolist() for name, value in part.items()} for part in mine])
    values: dict[str, list[float]] = {}
    for part in (part for of_rank in told for part in of_rank):
        for name, some in part.items():
            values.setdefault(name, []).extend(some)
    sizes = [[len(next(iter(part.values()))) for part in of_rank] for of_rank in told]
    start = sum(map(sum, sizes[: backend.rank]))
    places = []
    for size in sizes[backend.rank]:
        places.append(torch.arange(start, start + size))
        start += size
    return {name: torch.tensor(some) for name, some in values.items()}, places


class RunningMean:
    """The mean of everything seen in all steps so far, on all processes.

    What a step adds is on the device until the next step begins, so that no step depends on its own values.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.sum, self.count = 0.0, 0.0
        self._new: list[tuple[Tensor, int]] = []

    @property
    def mean(self) -> float:
        return self.sum / self.count if self.count else 0.0

    def see(self, values: Tensor) -> None:
        """Add values of this step."""
        self._new.append((values.detach().double().sum(), values.numel()))

    def forget(self) -> None:
        """Leave out what was seen since the last fold: the step is done again."""
        self._new = []

    def fold(self) -> None:
        """Count what was seen; every process calls it."""
        new = self.backend.sum_counts(
            {"sum": float(sum(float(total) for total, _ in self._new)), "count": float(sum(n for _, n in self._new))}
        )
        self.sum += new["sum"]
        self.count += new["count"]
        self._new = []

    def state(self) -> dict[str, float]:
        """JSON-able; every process calls it."""
        self.fold()
        return {"sum": self.sum, "count": self.count}

    def load(self, state: dict[str, float]) -> None:
        self.sum, self.count, self._new = state["sum"], state["count"], []
