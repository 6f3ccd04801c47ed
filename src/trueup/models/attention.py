"""Attention over a forest, for every architecture that asks transformers' AttentionInterface for its kernel.

A segment's queries see their ancestors' keys in full and their own causally. The layout travels as the keyword
`forest` through the model's own `**kwargs`: no global state, nothing patched, and activation checkpointing
recomputes with the layout it was given. A model that drops the keyword is caught by the check at load and runs in
the unshared path (`models/load.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from trueup.types import Segment

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # a torch without it
    varlen_attn = None

FOREST_ATTENTION = "trueup_forest"

#: Query rows that `_BlockAttention` scores at once: their weights stay in the cache, and keys after them are skipped.
BLOCK = 128


#: What some architectures hand to their kernel beside q, k and v (attention sinks, position biases, chosen keys).
_CHANGES_SCORES = ("s_aux", "sinks", "position_bias", "indices", "block_indices")


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
        self._masks: dict[tuple[int, int, int | None], Tensor] = {}

    @cached_property
    def gathering(self) -> tuple[Tensor, Tensor, Tensor, int, int]:
        """For kernels over sequences of several lengths: which positions every segment's path has as keys, where each
        segment's queries and keys begin (cumulative, int32), and the longest of both.
        """
        starts = [0, *accumulate(self.lengths)]
        spans = [torch.arange(starts[i], starts[i + 1]) for path in self.paths for i in path]
        visible = [sum(self.lengths[i] for i in path) for path in self.paths]

        def cumulative(lengths: list[int]) -> Tensor:
            return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=self.device)

        return (
            torch.cat(spans).to(self.device),
            cumulative(self.lengths),
            cumulative(visible),
            max(self.lengths),
            max(visible),
        )

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


def forest_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    forest: ForestLayout,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """One attention layer over a forest laid out in a single row.

    Args:
        query: [1, heads, T, d]; key, value: [1, kv_heads, T, d] (grouped heads are not repeated).
        forest: the batch's layout. Required: without it this kernel cannot know who may see whom.

    Returns:
        [1, T, heads, d] as transformers expects, and no weights.

    Raises:
        NotImplementedError: the layer's attention has a part that is not computed here.
    """
    if unknown := [name for name in _CHANGES_SCORES if others.get(name) is not None]:
        raise NotImplementedError(f"its attention has {', '.join(unknown)}")
    if sliding_window is not None:
        forest.windows.add(sliding_window)
    if forest.gathered and not dropout and softcap is None:
        return _gathered(query, key, value, forest, scaling, sliding_window), None
    plain = not dropout and softcap is None and not forest.bound_by(sliding_window)
    if plain and query.device.type == "cpu" and query.dtype == torch.bfloat16:
        return _BlockAttention.apply(query, key, value, forest, scaling), None
    return _fused(query, key, value, forest, scaling, dropout, sliding_window, softcap), None


def kernels_for(device: torch.device, dtype: torch.dtype) -> tuple[bool, ...]:
    """Values of `ForestLayout.gathered` to try, in this order. Expected to be the faster first; unmeasured so far."""
    has_varlen = varlen_attn is not None and device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    return (True, False) if has_varlen else (False,)


def _gathered(
    query: Tensor, key: Tensor, value: Tensor, forest: ForestLayout, scaling: float | None, window: int | None
) -> Tensor:
    """The forest in one call of a varlen flash kernel: every segment is a sequence whose keys are its whole path.

    Causality is aligned to the end, so a segment's last query sees all of its path's keys. [1, T, heads, d].
    """
    positions, starts_q, starts_k, longest_q, longest_k = forest.gathering
    queries = query[0].transpose(0, 1)
    keys, values = (states[0].transpose(0, 1).index_select(0, positions) for states in (key, value))
    output = varlen_attn(
        queries, keys, values, starts_q, starts_k, longest_q, longest_k, scale=scaling,
        window_size=(-1 if window is None else window - 1, 0), enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return output[None]


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    forest: ForestLayout,
    scaling: float | None,
    dropout: float = 0.0,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The forest segment by segment through torch's kernel; [1, T, heads, d]."""
    # One split each way: slicing a segment at a time would make its backward fill a whole [T] of zeros every time.
    queries, keys, values = (states.split(forest.lengths, dim=2) for states in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    outputs = []
    for index, path in enumerate(forest.paths):
        path_keys, path_values = _join(keys, path), _join(values, path)
        mask = forest.mask(index, window)
        if softcap is not None:
            output = _eager(queries[index], path_keys, path_values, mask, dropout, scaling, softcap)
        else:
            output = F.scaled_dot_product_attention(
                queries[index], path_keys, path_values, attn_mask=mask, dropout_p=dropout, is_causal=mask is None,
                scale=scaling, enable_gqa=grouped,
            )  # fmt: skip
        outputs.append(output)
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _join(states: Sequence[Tensor], path: list[int]) -> Tensor:
    return states[path[0]] if len(path) == 1 else torch.cat([states[segment] for segment in path], dim=2)


def _eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float,
) -> Tensor:
    """Attention as three products; the only way to cap scores (Gemma 2, arXiv 2408.00118 §2).

    Args:
        query: [1, heads, L, d]; key, value: [1, kv_heads, K, d]. Heads of a group share one product.
    """
    _, heads, length, width = query.shape
    _, kv_heads, total, _ = key.shape
    if mask is None:
        mask = causal_mask(length, total, None, query.device)
    scale = scaling if scaling is not None else width**-0.5
    folded = query.reshape(kv_heads, heads // kv_heads * length, width) * scale
    scores = (folded @ key[0].transpose(-1, -2)).view(heads, length, total)
    scores = softcap * torch.tanh(scores / softcap)
    scores = scores + torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(~mask, float("-inf"))
    weights = F.dropout(torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype), p=dropout)
    return (weights.view(kv_heads, -1, total) @ value[0]).view(1, heads, length, -1)


class _BlockAttention(torch.autograd.Function):
    """softmax(s Q Kᵀ) V over a forest, block by block of queries; the weights are made again in the backward.

    For bf16 on a CPU, where torch's fused kernel does not reach the matrix units in its backward (docs/log.md,
    2026-11-21). Products are in bf16, the softmax and the sums over siblings in fp32; the backward is the one of
    FlashAttention (Dao et al. 2022, arXiv 2205.14135, algorithm 4).
    """

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, layout: ForestLayout, scaling: float | None):
        _, heads, tokens, width = query.shape
        scale = scaling if scaling is not None else width**-0.5
        output = query.new_empty(1, tokens, heads, value.shape[-1])
        keys, values = key[0].split(layout.lengths, dim=1), value[0].split(layout.lengths, dim=1)
        for path, own in layout.visits():
            path_keys, path_values = (_join_heads(states, path) for states in (keys, values))
            for rows, visible in _blocks(own, path_keys.shape[1]):
                weights = _weights(query[0, :, rows], path_keys[:, :visible], scale)
                result = _fold(weights, len(path_keys)) @ path_values[:, :visible]
                output[0, rows] = result.view(heads, -1, result.shape[-1]).transpose(0, 1)
        ctx.save_for_backward(query, key, value, output)
        ctx.layout, ctx.scale = layout, scale
        return output

    @staticmethod
    def backward(ctx, grad: Tensor):
        query, key, value, output = ctx.saved_tensors
        layout, scale = ctx.layout, ctx.scale
        groups = key.shape[1]
        d_query = torch.empty_like(query)
        d_key = torch.zeros(key.shape, dtype=torch.float32)
        d_value = torch.zeros(value.shape, dtype=torch.float32)
        sums = (grad.float() * output).sum(-1)  # [1, T, heads]: Σ_k P dP of each query
        keys, values = key[0].split(layout.lengths, dim=1), value[0].split(layout.lengths, dim=1)
        d_keys, d_values = d_key[0].split(layout.lengths, dim=1), d_value[0].split(layout.lengths, dim=1)
        for path, own in layout.visits():
            path_keys, path_values = (_join_heads(states, path) for states in (keys, values))
            path_d_keys = torch.zeros(path_keys.shape, dtype=torch.float32)
            path_d_values = torch.zeros(path_values.shape, dtype=torch.float32)
            for rows, visible in _blocks(own, path_keys.shape[1]):
                seen_keys, seen_values = path_keys[:, :visible], path_values[:, :visible]
                weights = _weights(query[0, :, rows], seen_keys, scale)
                d_output = _fold(grad[0, rows].transpose(0, 1), groups)
                path_d_values[:, :visible] += _fold(weights, groups).transpose(1, 2) @ d_output
                d_scores = (d_output @ seen_values.transpose(1, 2)).view_as(weights)
                d_scores = d_scores.sub_(sums[0, rows].t()[..., None]).mul_(weights)
                d_scores = _fold(d_scores, groups)
                d_query[0, :, rows] = (d_scores @ seen_keys).view(query.shape[1], -1, query.shape[-1]) * scale
                path_d_keys[:, :visible] += d_scores.transpose(1, 2) @ _fold(query[0, :, rows] * scale, groups)
            lengths = [layout.lengths[segment] for segment in path]
            for segment, part_keys, part_values in zip(
                path, path_d_keys.split(lengths, dim=1), path_d_values.split(lengths, dim=1), strict=True
            ):
                d_keys[segment].add_(part_keys)
                d_values[segment].add_(part_values)
        return d_query, d_key.to(key.dtype), d_value.to(value.dtype), None, None


def _join_heads(states: Sequence[Tensor], path: list[int]) -> Tensor:
    """[kv_heads, keys of the path, d]."""
    return states[path[0]] if len(path) == 1 else torch.cat([states[segment] for segment in path], dim=1)


def _blocks(own: slice, visible: int) -> Iterator[tuple[slice, int]]:
    """Stretches of a segment's tokens, and how many keys of its path they see: what comes later is never scored."""
    before = visible - (own.stop - own.start)
    for start in range(own.start, own.stop, BLOCK):
        stop = min(start + BLOCK, own.stop)
        yield slice(start, stop), before + stop - own.start


def _fold(states: Tensor, groups: int) -> Tensor:
    """[heads, L, x] → [kv_heads, heads / kv_heads · L, x]: heads that share keys share one product."""
    return states.reshape(groups, -1, states.shape[-1])


def _weights(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """softmax over the keys, [heads, L, K] in compute dtype; the queries are the last L of the K positions."""
    heads, length, _ = query.shape
    scores = (_fold(query * scale, len(keys)) @ keys.transpose(1, 2)).view(heads, length, -1)
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    scores[..., -length:].masked_fill_(later, float("-inf"))
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)


# transformers builds no mask for an implementation it has no mask function for: the layout is the mask.
AttentionInterface.register(FOREST_ATTENTION, forest_attention)
