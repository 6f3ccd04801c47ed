"""Examples → forest batches, and the order in which a run sees them.

Order and batches are functions of (dataset lengths, seed, epoch, step): there is no sampler state, so a resumed run
needs only a step number, and neither processes nor micro-batches change which examples a step holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from trueup.types import Forest, Segment

if TYPE_CHECKING:
    from trueup.data.encode import Answer, Encoded


def predicted(example: Encoded, answer: Answer) -> np.ndarray:
    """Mask [A] of the answer tokens that are in the loss *and* have a token before them to be read from."""
    mask = answer.mask.astype(bool, copy=True)
    if not len(example.prompt):
        mask[:1] = False
    return mask


def num_predictions(example: Encoded) -> int:
    """How many log-probabilities the example contributes to a batch."""
    return sum(int(predicted(example, answer).sum()) for answer in example.answers)


def build_forest(examples: Sequence[Encoded]) -> Forest:
    """Lay examples out as one forest: each prompt once, then its answers; sequences in reading order.

    The first token of an answer is read from the prompt's last position, so siblings share that position and no
    token is duplicated.
    """
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    read_at: list[np.ndarray] = []
    target: list[np.ndarray] = []
    owner: list[np.ndarray] = []
    segments: list[Segment] = []
    paths: list[tuple[int, ...]] = []
    cursor = 0

    def append(tokens: np.ndarray, depth: int, parent: int) -> int:
        nonlocal cursor
        segments.append(Segment(cursor, cursor + len(tokens), parent))
        ids.append(tokens)
        positions.append(np.arange(depth, depth + len(tokens)))
        cursor += len(tokens)
        return len(segments) - 1

    for example in examples:
        depth = len(example.prompt)
        root = append(example.prompt, 0, -1) if depth else -1
        fork = cursor - 1  # the prompt's last position
        for answer in example.answers:
            readers = np.arange(cursor - 1, cursor - 1 + len(answer.ids))
            readers[:1] = fork
            mask = predicted(example, answer)
            read_at.append(readers[mask])
            target.append(answer.ids[mask])
            owner.append(np.full(int(mask.sum()), len(paths)))
            leaf = append(answer.ids, depth, root)
            paths.append((root, leaf) if depth else (leaf,))

    def tensor(parts: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))

    return Forest(
        tensor(ids), tensor(positions), tuple(segments), tensor(read_at), tensor(target), tensor(owner),
        len(paths), tuple(paths),
    )  # fmt: skip


@dataclass(frozen=True)
class BatchPlan:
    """Which examples every optimizer step holds, and how they split into processes and micro-batches.

    A *unit* is what `rows_per_micro_batch` counts: one example or, with packing, a pack of examples whose tokens
    fit `pack_tokens` together (they never see each other: the forest keeps them apart).

    Args:
        lengths: [n] tokens of each example in the shared layout.
        rows_per_micro_batch: units in one forward pass, on one process.
        rows_per_step: units in one optimizer step, over all processes and accumulation.
        micro_batch_tokens: token budget of a micro-batch; replaces `rows_per_micro_batch` when given.
        pack_tokens: pack examples up to this many tokens; None keeps one example a unit.
        drop_last: leave out the last, incomplete step of an epoch.
    """

    lengths: np.ndarray
    rows_per_micro_batch: int
    rows_per_step: int
    seed: int
    shuffle: bool = True
    micro_batch_tokens: int | None = None
    pack_tokens: int | None = None
    drop_last: bool = False

    @cached_property
    def units(self) -> list[np.ndarray]:
        """Arrays of example indices. Packs are made once, so that every epoch has the same number of them."""
        order = np.arange(len(self.lengths))
        if self.pack_tokens is None:
            return list(order[:, None])
        if self.shuffle:
            order = np.random.default_rng(self.seed).permutation(order)
        return _first_fit(order, self.lengths, self.pack_tokens)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in every epoch."""
        whole, rest = divmod(len(self.units), self.rows_per_step)
        return whole if self.drop_last or not rest else whole + 1

    def steps(self, epoch: int) -> list[list[np.ndarray]]:
        """The epoch's optimizer steps, each a list of units."""
        order = np.arange(len(self.units))
        if self.shuffle:
            order = np.random.default_rng([self.seed, epoch]).permutation(order)
        size = self.rows_per_step
        return [[self.units[i] for i in order[step * size : (step + 1) * size]] for step in range(self.steps_per_epoch)]

    def micro_batches(self, units: list[np.ndarray], rank: int = 0, world_size: int = 1) -> list[np.ndarray]:
        """This process's micro-batches (arrays of example indices) of one step; may be empty.

        The step is cut into micro-batches first and dealt out to the processes in turn, so that the forward
        passes are the same ones however many processes there are.
        """
        groups: list[list[np.ndarray]] = []
        tokens = 0
        for unit in units:
            size = int(self.lengths[unit].sum())
            if self.micro_batch_tokens is None:
                full = bool(groups) and len(groups[-1]) >= self.rows_per_micro_batch
            else:
                full = bool(groups) and tokens + size > self.micro_batch_tokens
            if not groups or full:
                groups.append([])
                tokens = 0
            groups[-1].append(unit)
            tokens += size
        return [np.concatenate(group) for group in groups[rank::world_size]]


def _first_fit(order: np.ndarray, lengths: np.ndarray, capacity: int, open_packs: int = 64) -> list[np.ndarray]:
    """Pack examples in the given order into the first of the last `open_packs` packs with room (online first-fit)."""
    packs: list[list[int]] = []
    room: list[int] = []
    for index in order.tolist():
        size = int(lengths[index])
        first = max(0, len(packs) - open_packs)
        for pack in range(first, len(packs)):
            if room[pack] >= size:
                packs[pack].append(index)
                room[pack] -= size
                break
        else:
            packs.append([index])
            room.append(capacity - size)
    return [np.array(pack) for pack in packs]
