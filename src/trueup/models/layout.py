"""Who sees whom in a forest, as attention kernels need it; made once per batch, used by every layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from trueup.types import Segment


@dataclass(frozen=True)
class Gathering:
    """A forest as sequences of several lengths: each segment's queries, and the keys of its whole path."""

    positions: Tensor | None  # [K] where those keys lie; None where every path is one segment: as they are
    starts_q: Tensor  # [segments + 1] int32, cumulative
    starts_k: Tensor
    longest_q: int
    longest_k: int


class ForestLayout:
    """Who sees whom in a batch, and the masks that say so; made once per batch, used by every layer.

    Args:
        gathered: give the kernel each segment's keys gathered from its path (`kernels_for`: where that is possible).
    """

    def __init__(self, segments: Sequence[Segment], device: torch.device, gathered: bool = False) -> None:
        self.device = device
        self.gathered = gathered
        self.lengths = [segment.stop - segment.start for segment in segments]
        self.paths: list[list[int]] = []  # segment → its ancestors from the root down, and itself
        for index, segment in enumerate(segments):
            before = self.paths[segment.parent] if segment.parent >= 0 else []
            self.paths.append([*before, index])
        self.windows: set[int] = set()  # sliding windows that the model passed with this layout
        self.calls = 0  # attention layers that asked for the forest's kernel
        self._masks: dict[tuple[int, int, int | None], Tensor] = {}

    @cached_property
    def gathering(self) -> Gathering:
        """For kernels over sequences of several lengths."""
        starts = [0, *accumulate(self.lengths)]
        visible = [sum(self.lengths[i] for i in path) for path in self.paths]
        positions = None
        if any(len(path) > 1 for path in self.paths):
            spans = [torch.arange(starts[i], starts[i + 1]) for path in self.paths for i in path]
            positions = torch.cat(spans).to(self.device)

        def cumulative(lengths: list[int]) -> Tensor:
            return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=self.device)

        return Gathering(positions, cumulative(self.lengths), cumulative(visible), max(self.lengths), max(visible))

    def visits(self) -> Iterator[tuple[list[int], slice]]:
        """Each segment's path from the root, and where its own tokens lie in the batch."""
        start = 0
        for path in self.paths:
            stop = start + self.lengths[path[-1]]
            yield path, slice(start, stop)
            start = stop

    def bound_by(self, window: int | None) -> bool:
        """Whether a sliding window hides anything from anyone in this batch."""
        return window is not None and any(sum(self.lengths[s] for s in path) > window for path in self.paths)

    def mask(self, index: int, window: int | None) -> Tensor | None:
        """Bool mask [queries, keys] of a segment, True = may attend; None where plain causal attention is meant."""
        length = self.lengths[index]
        total = sum(self.lengths[segment] for segment in self.paths[index])
        if window is not None and total <= window:
            window = None
        if total == length and window is None:
            return None
        key = (length, total, window)
        if key not in self._masks:
            self._masks[key] = causal_mask(length, total, window, self.device)
        return self._masks[key]


def causal_mask(length: int, total: int, window: int | None, device: torch.device) -> Tensor:
    """Bool [length, total]: the queries are the last `length` of `total` positions on a root-to-leaf path."""
    key = torch.arange(total, device=device)
    query = key[total - length :, None]
    mask = key <= query
    return mask & (key > query - window) if window is not None else mask
