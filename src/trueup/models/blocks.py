"""Forest attention in bf16 on a CPU, block by block of queries; the weights are made again in the backward.

torch's fused kernel does not reach the matrix units in its backward there (docs/log.md, 2026-11-21). Products take
bf16; the softmax, the sums over siblings, and the two products that a softmax magnifies (scores, and the gradient of
its weights) are in fp32: scores of 20 and more are common, and in bf16 they would be off by a tenth. The backward is
the one of FlashAttention (Dao et al. 2022, arXiv 2205.14135, algorithm 4).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from trueup.models.layout import ForestLayout

#: Query rows that are scored at once: their weights stay in the cache, and keys after them are skipped.
BLOCK = 128


class BlockAttention(torch.autograd.Function):
    """softmax(s Q Kᵀ) V over a forest: q [1, heads, T, d], k and v [1, kv_heads, T, d] → [1, T, heads, d]."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, layout: ForestLayout, scaling: float | None):
        _, heads, tokens, width = query.shape
        scale = scaling if scaling is not None else width**-0.5
        output = query.new_empty(1, tokens, heads, value.shape[-1])
        keys, values = key[0].split(layout.lengths, dim=1), value[0].split(layout.lengths, dim=1)
        with _products_in_bf16():
            for path, own in layout.visits():
                path_keys, path_values = _join(keys, path).float(), _join(values, path)
                for rows, visible in _blocks(own, path_keys.shape[1]):
                    weights = _weights(query[0, :, rows], path_keys[:, :visible], scale).to(query.dtype)
                    result = _fold(weights, len(path_keys)) @ path_values[:, :visible]
                    output[0, rows] = result.view(heads, -1, result.shape[-1]).transpose(0, 1)
        ctx.save_for_backward(query, key, value, output)
        ctx.layout, ctx.scale = layout, scale
        return output

    @staticmethod
    def backward(ctx, grad: Tensor):
        query, key, value, output = ctx.saved_tensors
        layout, scale = ctx.layout, ctx.scale
        groups, dtype = key.shape[1], query.dtype
        d_query = torch.empty_like(query)
        d_key = torch.zeros(key.shape, dtype=torch.float32)
        d_value = torch.zeros(value.shape, dtype=torch.float32)
        sums = (grad.float() * output).sum(-1)  # [1, T, heads]: Σ_k P dP of each query
        keys, values = key[0].split(layout.lengths, dim=1), value[0].split(layout.lengths, dim=1)
        d_keys, d_values = d_key[0].split(layout.lengths, dim=1), d_value[0].split(layout.lengths, dim=1)
        with _products_in_bf16():
            for path, own in layout.visits():
                path_keys, path_values = _join(keys, path), _join(values, path).float()
                wide_keys = path_keys.float()
                path_d_keys = torch.zeros(path_keys.shape, dtype=torch.float32)
                path_d_values = torch.zeros(path_values.shape, dtype=torch.float32)
                for rows, visible in _blocks(own, path_keys.shape[1]):
                    weights = _weights(query[0, :, rows], wide_keys[:, :visible], scale)
                    d_output = _fold(grad[0, rows].transpose(0, 1), groups)
                    path_d_values[:, :visible] += _fold(weights.to(dtype), groups).transpose(1, 2) @ d_output
                    d_scores = (d_output.float() @ path_values[:, :visible].transpose(1, 2)).view_as(weights)
                    d_scores = d_scores.sub_(sums[0, rows].t()[..., None]).mul_(weights)
                    d_scores = _fold(d_scores.to(dtype), groups)
                    d_own = (d_scores @ path_keys[:, :visible]).view(query.shape[1], -1, query.shape[-1])
                    d_query[0, :, rows] = d_own * scale
                    path_d_keys[:, :visible] += d_scores.transpose(1, 2) @ _fold(query[0, :, rows] * scale, groups)
                lengths = [layout.lengths[segment] for segment in path]
                for segment, part_keys, part_values in zip(
                    path, path_d_keys.split(lengths, dim=1), path_d_values.split(lengths, dim=1), strict=True
                ):
                    d_keys[segment].add_(part_keys)
                    d_values[segment].add_(part_values)
        return d_query, d_key.to(key.dtype), d_value.to(value.dtype), None, None


@contextmanager
def _products_in_bf16() -> Iterator[None]:
    """fp32 matrices that hold bf16 numbers are multiplied by the bf16 units: nothing is lost, and sums stay in fp32.

    torch has one setting for the whole process: the lock keeps two kernels from restoring each other's, and an fp32
    product of another thread meanwhile is rounded to bf16, which no thread of a training makes.
    """
    precision = torch.backends.mkldnn.matmul
    with _PRECISION:
        before = precision.fp32_precision
        precision.fp32_precision = "bf16"
        try:
            yield
        finally:
            precision.fp32_precision = before


_PRECISION = threading.Lock()


def _join(states: Sequence[Tensor], path: list[int]) -> Tensor:
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
    """softmax over the keys [kv_heads, K, d] in fp32, [heads, L, K]; the queries are the last L of the K positions."""
    heads, length, _ = query.shape
    scores = (_fold(query.float(), len(keys)) @ keys.transpose(1, 2)).mul_(scale).view(heads, length, -1)
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    scores[..., -length:].masked_fill_(later, float("-inf"))
    return torch.softmax(scores, dim=-1)
