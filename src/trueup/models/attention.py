"""Attention over a forest, for every architecture that asks transformers' AttentionInterface for its kernel.

A segment's queries see their ancestors' keys in full and their own causally. The layout travels as the keyword
`forest` through the model's own `**kwargs`: no global state, nothing patched, and activation checkpointing
recomputes with the layout it was given. A model that drops the keyword is caught by the check at load and runs in
the unshared path (`models/load.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from trueup.models.blocks import BlockAttention
from trueup.models.layout import ForestLayout, causal_mask
from trueup.models.varlen import GatheredAttention, flash

FOREST_ATTENTION = "trueup_forest"

#: The kernel of `models/varlen.py`; None where torch has none.
VARLEN = flash()

#: What some architectures hand to their kernel beside q, k and v (attention sinks, position biases, chosen keys).
_CHANGES_SCORES = ("s_aux", "sinks", "position_bias", "indices", "block_indices")


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
    forest.calls += 1
    if sliding_window is not None:
        forest.windows.add(sliding_window)
    if forest.gathered and not dropout and softcap is None:
        return GatheredAttention.apply(query, key, value, forest, scaling, sliding_window, VARLEN), None
    plain = not dropout and softcap is None and not forest.bound_by(sliding_window)
    if plain and query.device.type == "cpu" and query.dtype == torch.bfloat16:
        return BlockAttention.apply(query, key, value, forest, scaling), None
    return _fused(query, key, value, forest, scaling, dropout, sliding_window, softcap), None


def kernels_for(device: torch.device, dtype: torch.dtype) -> tuple[bool, ...]:
    """Values of `ForestLayout.gathered` to try, in this order. Expected to be the faster first; unmeasured so far."""
    has_varlen = VARLEN is not None and device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    return (True, False) if has_varlen else (False,)


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


# transformers builds no mask for an implementation it has no mask function for: the layout is the mask.
AttentionInterface.register(FOREST_ATTENTION, forest_attention)
