"""Metric accumulators: (sum, count) on the device, read with one synchronisation per logging
interval.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trueup.training.backend import HostMetrics
from trueup.types import Metrics


class MetricSums:
    """Adds up metrics without waiting for the device. Sums are fp64 where the device has it (all
    but mps).
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.dtype = torch.float32 if self.device.type == "mps" else torch.float64
        self._sums: dict[str, Tensor] = {}  # name -> [2] sum and count

    def add(self, name: str, value: Tensor | float, count: Tensor | float = 1.0) -> None:
        """Add one observation, or the sum of `count` of them."""
        if name not in self._sums:
            self._sums[name] = torch.zeros(2, dtype=self.dtype, device=self.device)
        total = self._sums[name]
        total[0] += value.detach() if isinstance(value, Tensor) else value
        total[1] += count.detach() if isinstance(count, Tensor) else count

    def update(self, metrics: Metrics) -> None:
        """Add what one micro-batch returned."""
        for name, (value, count) in metrics.items():
            self.add(name, value, count)

    def __bool__(self) -> bool:
        return bool(self._sums)

    def clear(self) -> None:
        self._sums.clear()

    def read(self) -> HostMetrics:
        """Sums and counts on the host: one device synchronisation."""
        if not self._sums:
            return {}
        rows = torch.stack(list(self._sums.values())).tolist()
        return {name: (row[0], row[1]) for name, row in zip(self._sums, rows, strict=True)}

    def load(self, sums: HostMetrics) -> None:
        """Go on from sums read before; exact, because a host float holds every fp64."""
        self._sums = {name: torch.tensor(pair, dtype=self.dtype, device=self.device) for name, pair in sums.items()}


def means(sums: HostMetrics) -> dict[str, float]:
    """sum / count of each metric; those that nothing was counted for are left out."""
    return {name: value / count for name, (value, count) in sums.items() if count}
