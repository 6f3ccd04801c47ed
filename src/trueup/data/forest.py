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


#: Common beginnings shorter than this are not worth a segment of their own (docs/log.md, 2026-11-21). A prompt is
#: always shared by its own answers.
SHORTEST_SHARED = 16


def build_forest(examples: Sequence[Encoded]) -> Forest:
    """Lay sequences (prompt + answer) out as a radix tree: whatever several of them begin with is there once.

    Answers share their prompt, pairs on one prompt share it too, and different prompts share a system prompt.
    The first token of an answer is read from the position before it, wherever that lies, so no token is duplicated.
    """
    root = _Node(np.zeros(0, dtype=np.int32), depth=0)
    leaves: list[_Node] = []
    for example in examples:
        fork = root.insert(example.prompt) if len(example.prompt) else root
        leaves += [fork.insert(answer.ids) for answer in example.answers]
    nodes = root.lay_out()
    segments = tuple(
        Segment(node.start, node.start + len(node.tokens), -1 if node.parent is root else node.parent.index)
        for node in nodes
    )
    paths: list[tuple[int, ...]] = []
    read_at: list[np.ndarray] = []
    target: list[np.ndarray] = []
    owner: list[np.ndarray] = []
    answers = ((example, answer) for example in examples for answer in example.answers)
    for leaf, (example, answer) in zip(leaves, answers, strict=True):
        path = leaf.path()
        at = np.concatenate(
            [np.zeros(0, dtype=np.int64)] + [np.arange(node.start, node.start + len(node.tokens)) for node in path]
        )
        mask = predicted(example, answer)
        before = np.arange(len(answer.ids)) + len(example.prompt) - 1
        read_at.append(at[before[mask]])
        target.append(answer.ids[mask])
        owner.append(np.full(int(mask.sum()), len(paths)))
        paths.append(tuple(node.index for node in path))

    def tensor(parts: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *parts]).astype(np.int64))

    return Forest(
        tensor([node.tokens for node in nodes]),
        tensor([np.arange(node.depth, node.depth + len(node.tokens)) for node in nodes]),
        segments, tensor(read_at), tensor(target), tensor(owner), len(paths), tuple(paths),
    )  # fmt: skip


class _Node:
    """A stretch of tokens in the tree, `depth` tokens from the root."""

    def __init__(self, tokens: np.ndarray, depth: int, parent: _Node | None = None) -> None:
        self.tokens, self.depth, self.parent = tokens, depth, parent
        self.children: dict[bytes, _Node] = {}  # by their beginning: siblings share less than it is long
        self.index = self.start = -1  # set by lay_out

    def insert(self, tokens: np.ndarray) -> _Node:
        """The node at which these tokens, following this one, end; what is new of them is added to the tree."""
        node = self
        while len(tokens):
            child = node.children.get(_beginning(tokens))
            if child is None:
                child = _Node(tokens, node.depth + len(node.tokens), node)
                node.children[_beginning(tokens)] = child
                return child
            common = _common(child.tokens, tokens)
            node = child if common == len(child.tokens) else child._split(common)
            tokens = tokens[common:]
        return node

    def _split(self, at: int) -> _Node:
        """Cut this node in two; the front takes its place, the rest becomes the front's child."""
        assert self.parent is not None
        front = _Node(self.tokens[:at], self.depth, self.parent)
        self.parent.children[_beginning(front.tokens)] = front
        self.tokens, self.depth, self.parent = self.tokens[at:], self.depth + at, front
        front.children[_beginning(self.tokens)] = self
        return front

    def lay_out(self) -> list[_Node]:
        """All nodes below this one, parents first, with their place in the batch."""
        nodes: list[_Node] = []
        start = 0
        waiting = list(self.children.values())[::-1]
        while waiting:
            node = waiting.pop()
            node.index, node.start = len(nodes), start
            start += len(node.tokens)
            nodes.append(node)
            waiting += list(node.children.values())[::-1]
        return nodes

    def path(self) -> list[_Node]:
        """From below the root down to this node."""
        nodes: list[_Node] = []
        node: _Node | None = self
        while node is not None and node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]


def _beginning(tokens: np.ndarray) -> bytes:
    return tokens[:SHORTEST_SHARED].tobytes()


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two sequences begin with alike."""
    length = min(len(a), len(b))
    differs = np.flatnonzero(a[:length] != b[:length])
    return int(differs[0]) if len(differs) else length


@dataclass(frozen=True)
class Padded:
    """What examples take in a model that cannot share prompts: one row an answer, as long as the longest beside it."""

    rows: np.ndarray  # [n] answers of each example
    longest: np.ndarray  # [n] tokens of its prompt with its longest answer

    @classmethod
    def of(cls, prompts: np.ndarray, answers: np.ndarray) -> Padded:
        """From lengths: [n] of prompts, [n, answers] of answers, 0 where there is none."""
        return cls(np.maximum((answers > 0).sum(1), 1), prompts + answers.max(1, initial=0))

    def tokens(self, examples: np.ndarray) -> int:
        """Of these examples in one micro-batch."""
        return int(self.rows[examples].sum() * self.longest[examples].max())


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
        padded: what the budget counts in a model that runs padded rows; None counts tokens of the shared layout.
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
    padded: Padded | None = None

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

    def order(self, epoch: int) -> np.ndarray:
        """The epoch's units by number, step after step."""
        order = np.arange(len(self.units))
        if self.shuffle:
            order = np.random.default_rng([self.seed, epoch]).permutation(order)
        return order[: self.steps_per_epoch * self.rows_per_step]

    def steps(self, epoch: int, limit: int | None = None) -> list[list[np.ndarray]]:
        """The epoch's optimizer steps, or the first `limit` of them, each a list of units."""
        order, size = self.order(epoch), self.rows_per_step
        count = self.steps_per_epoch if limit is None else min(limit, self.steps_per_epoch)
        return [[self.units[i] for i in order[step * size : (step + 1) * size]] for step in range(count)]

    def micro_batches(self, units: list[np.ndarray], rank: int = 0, world_size: int = 1) -> list[np.ndarray]:
        """This process's micro-batches (arrays of example indices) of one step; may be empty.

        The step is cut into micro-batches first and dealt out to the processes in turn, so that the forward passes
        are the same ones however many processes there are. With a token budget their number is a multiple of the
        processes', and they are dealt out by size, so that nobody waits.
        """
        if self.micro_batch_tokens is None:
            size = self.rows_per_micro_batch
            groups = [units[start : start + size] for start in range(0, len(units), size)]
            return [np.concatenate(group) for group in groups[rank::world_size]]
        if self.padded is None:
            packs = _even_packs([self.tokens(unit) for unit in units], self.micro_batch_tokens, world_size)
        else:
            rows = np.array([self.padded.rows[unit].sum() for unit in units], dtype=np.int64)
            longest = np.array([self.padded.longest[unit].max() for unit in units], dtype=np.int64)
            packs = _alike_packs(rows, longest, self.micro_batch_tokens, world_size)
        groups = [np.concatenate([units[i] for i in pack]) for pack in packs]
        return [groups[number] for number in _deal([self.tokens(group) for group in groups], world_size)[rank]]

    def tokens(self, examples: np.ndarray) -> int:
        """What these examples take in one micro-batch, as the model runs it."""
        return int(self.lengths[examples].sum()) if self.padded is None else self.padded.tokens(examples)


def _even_packs(sizes: list[int], capacity: int, multiple: int) -> list[list[int]]:
    """Few packs of indices within `capacity`, of about the same size; as many as a multiple, if there is enough.

    First-fit decreasing tells how few suffice (at most 11/9 of the fewest, Johnson 1973). Filling as many evenly takes
    less memory than filling all but the last; where that does not fit, the packs stay as they are.
    """
    longest_first = np.argsort(-np.array(sizes, dtype=np.int64), kind="stable")
    packs = [pack.tolist() for pack in _first_fit(longest_first, np.array(sizes), capacity, open_packs=len(sizes))]
    count = min(-(-len(packs) // multiple) * multiple, len(sizes))
    even = _deal(sizes, count)
    fits = all(len(pack) == 1 or sum(sizes[i] for i in pack) <= capacity for pack in even)
    return even if fits else packs


def _alike_packs(rows: np.ndarray, longest: np.ndarray, capacity: int, multiple: int) -> list[list[int]]:
    """Packs of indices of like lengths, whose padded rows stay within `capacity`; as many as a multiple, if there is
    enough.
    """
    packs: list[list[int]] = []
    for i in np.argsort(-longest, kind="stable").tolist():
        if packs and int(rows[[*packs[-1], i]].sum()) * int(longest[packs[-1][0]]) <= capacity:
            packs[-1].append(i)
        else:
            packs.append([i])
    wanted = min(-(-len(packs) // multiple) * multiple, len(rows))
    while len(packs) < wanted:
        heaviest = max((p for p in packs if len(p) > 1), key=lambda p: int(rows[p].sum() * longest[p].max()))
        packs.remove(heaviest)
        packs += [heaviest[: len(heaviest) // 2], heaviest[len(heaviest) // 2 :]]
    return packs


def _deal(sizes: list[int], players: int) -> list[list[int]]:
    """Indices by player, so that the sums are close: the largest first, to whoever has least (Graham 1969)."""
    hands: list[list[int]] = [[] for _ in range(players)]
    sums = [0] * players
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        poorest = sums.index(min(sums))
        hands[poorest].append(i)
        sums[poorest] += sizes[i]
    return hands


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
