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
    """Where each segment's keys are, and the masks over them; made once per batch, used by every layer."""

    def __init__(self, segments: Sequence[Segment], position_ids: Tensor) -> None:
        self.segments = segments
        self.position_ids = position_ids
        self.key_spans = [self._spans(segment) for segment in segments]
        self._masks: dict[tuple[int, int | None], Tensor | None] = {}

    def _spans(self, segment: Segment) -> list[tuple[int, int]]:
        spans = [(segment.start, segment.stop)]
        parent = segment.parent
        while parent >= 0:
            ancestor = self.segments[parent]
            spans.insert(0, (ancestor.start, ancestor.stop))
            parent = ancestor.parent
        # Neighbours in memory are one slice: the first child of a prompt needs no copy of its keys.
        merged = [spans[0]]
        for start, stop in spans[1:]:
            if start == merged[-1][1]:
                merged[-1] = (merged[-1][0], stop)
            else:
                merged.append((start, stop))
        return merged

    def mask(self, index: int, window: int | None) -> Tensor | None:
        """Bool mask [queries, keys] of a segment, True = may attend; None where plain causal attention is meant."""
        segment = self.segments[index]
        length = segment.stop - segment.start
        total = sum(stop - start for start, stop in self.key_spans[index])
        if window is not None and total <= window:
            window = None
        if total == length and window is None:
            return None
        if (index, window) not in self._masks:
            device = self.position_ids.device
            # Along a root-to-leaf path positions count 0 … total-1, and the queries are the last `length` of them.
            key = torch.arange(total, device=device)
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
    outputs = []
    for index, segment in enumerate(forest.segments):
        spans = forest.key_spans[index]
        keys, values = (_gather(states, spans) for states in (key, value))
        queries = query[:, :, segment.start : segment.stop]
        mask = forest.mask(index, sliding_window)
        if softcap is None:
            output = F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, dropout_p=dropout, is_causal=mask is None,
                scale=scaling, enable_gqa=queries.shape[1] != keys.shape[1],
            )  # fmt: skip
        else:
            output = _softcapped(queries, keys, values, mask, dropout, scaling, softcap)
        outputs.append(output)
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _gather(states: Tensor, spans: list[tuple[int, int]]) -> Tensor:
    parts = [states[:, :, start:stop] for start, stop in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


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
