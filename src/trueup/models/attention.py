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


class ForestLayout:
    """Who sees whom in a batch, and the masks that say so; made once per batch, used by every layer."""

    def __init__(self, segments: Sequence[Segment], device: torch.device) -> None:
        self.device = device
        self.lengths = [segment.stop - segment.start for segment in segments]
        self.paths: list[list[int]] = []  # segment → its ancestors from the root down, and itself
        for index, segment in enumerate(segments):
            before = self.paths[segment.parent] if segment.parent >= 0 else []
            self.paths.append([*before, index])
        self._masks: dict[tuple[int, int | None], Tensor | None] = {}

    def mask(self, index: int, window: int | None) -> Tensor | None:
        """Bool mask [queries, keys] of a segment, True = may attend; None where plain causal attention is meant."""
        length = self.lengths[index]
        total = sum(self.lengths[segment] for segment in self.paths[index])
        if window is not None and total <= window:
            window = None
        if total == length and window is None:
            return None
        if (index, window) not in self._masks:
            # Along a root-to-leaf path positions count 0 … total-1, and the queries are the last `length` of them.
            key = torch.arange(total, device=self.device)
            query = key[total - length :, None]
            mask = key <= query
            if window is not None:
                mask &= key > query - window
            self._masks[index, window] = mask
        return self._masks[index, window]


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
    queries, keys, values = (states.split(forest.lengths, dim=2) for states in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    outputs = []
    for index, path in enumerate(forest.paths):
        path_keys, path_values = _join(keys, path), _join(values, path)
        mask = forest.mask(index, sliding_window)
        if softcap is None:
            output = F.scaled_dot_product_attention(
                queries[index], path_keys, path_values, attn_mask=mask, dropout_p=dropout, is_causal=mask is None,
                scale=scaling, enable_gqa=grouped,
            )  # fmt: skip
        else:
            output = _softcapped(queries[index], path_keys, path_values, mask, dropout, scaling, softcap)
        outputs.append(output)
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _join(states: Sequence[Tensor], path: list[int]) -> Tensor:
    return states[path[0]] if len(path) == 1 else torch.cat([states[segment] for segment in path], dim=2)


def _softcapped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float,
) -> Tensor:
    """Attention with capped scores (Gemma 2, arXiv 2408.00118 §2): no fused kernel offers it on a CPU."""
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    scores = query @ key.transpose(-1, -2) * scale
    scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    scores = scores.masked_fill(~mask, float("-inf"))
    weights = F.dropout(torch.softmax(scores, dim=-1, dtype=torch.float32), p=dropout)
    return weights.to(query.dtype) @ value


# transformers builds no mask for an implementation it has no mask function for: the layout is the mask.
AttentionInterface.register(FOREST_ATTENTION, forest_attention)
