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

from trueup.types import Segment

FOREST_ATTENTION = "trueup_forest"

#: On a CPU in bf16, plain products beat the fused kernel up to about so many keys (docs/log.md, 2026-11-21).
EAGER_KEYS = 1024


class ForestLayout:
    """Who sees whom in a batch, and the masks that say so; made once per batch, used by every layer."""

    def __init__(self, segments: Sequence[Segment], device: torch.device) -> None:
        self.device = device
        self.lengths = [segment.stop - segment.start for segment in segments]
        self.paths: list[list[int]] = []  # segment → its ancestors from the root down, and itself
        for index, segment in enumerate(segments):
            before = self.paths[segment.parent] if segment.parent >= 0 else []
            self.paths.append([*before, index])
        self.windows: set[int] = set()  # sliding windows that the model passed with this layout
        self._masks: dict[tuple[int, int, int | None], Tensor] = {}

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
    **_: object,
) -> tuple[Tensor, None]:
    """One attention layer over a forest laid out in a single row.

    Args:
        query: [1, heads, T, d]; key, value: [1, kv_heads, T, d] (grouped heads are not repeated).
        forest: the batch's layout. Required: without it this kernel cannot know who may see whom.

    Returns:
        [1, T, heads, d] as transformers expects, and no weights.
    """
    # One split each way: slicing a segment at a time would make its backward fill a whole [T] of zeros every time.
    if sliding_window is not None:
        forest.windows.add(sliding_window)
    queries, keys, values = (states.split(forest.lengths, dim=2) for states in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    plain_products = query.device.type == "cpu" and query.dtype == torch.bfloat16
    outputs = []
    for index, path in enumerate(forest.paths):
        path_keys, path_values = _join(keys, path), _join(values, path)
        mask = forest.mask(index, sliding_window)
        if softcap is not None or (plain_products and path_keys.shape[2] <= EAGER_KEYS):
            output = _eager(queries[index], path_keys, path_values, mask, dropout, scaling, softcap)
        else:
            output = F.scaled_dot_product_attention(
                queries[index], path_keys, path_values, attn_mask=mask, dropout_p=dropout, is_causal=mask is None,
                scale=scaling, enable_gqa=grouped,
            )  # fmt: skip
        outputs.append(output)
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _join(states: Sequence[Tensor], path: list[int]) -> Tensor:
    return states[path[0]] if len(path) == 1 else torch.cat([states[segment] for segment in path], dim=2)


def _eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
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
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(~mask, float("-inf"))
    weights = F.dropout(torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype), p=dropout)
    return (weights.view(kv_heads, -1, total) @ value[0]).view(1, heads, length, -1)


# transformers builds no mask for an implementation it has no mask function for: the layout is the mask.
AttentionInterface.register(FOREST_ATTENTION, forest_attention)
