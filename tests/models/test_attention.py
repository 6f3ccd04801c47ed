"""The block kernel equals dense attention with the forest's mask, values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from trueup.models import attention
from trueup.models.attention import ForestLayout, _BlockAttention, forest_attention
from trueup.types import Segment

FOREST = (
    Segment(0, 9, -1), Segment(9, 20, 0), Segment(20, 25, 0), Segment(25, 28, 2),  # a tree of depth three
    Segment(28, 29, -1), Segment(29, 36, -1), Segment(36, 40, 5),
)  # fmt: skip


def visible() -> torch.Tensor:
    """Bool [T, T]: each token sees its own past and its ancestors."""
    mask = torch.zeros(40, 40, dtype=torch.bool)
    for segment in FOREST:
        own = torch.arange(segment.start, segment.stop)
        mask[own[:, None], own] = own <= own[:, None]
        parent = segment.parent
        while parent >= 0:
            mask[own[:, None], torch.arange(FOREST[parent].start, FOREST[parent].stop)] = True
            parent = FOREST[parent].parent
    return mask


@pytest.mark.parametrize("block", [1, 4, 128])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_equals_dense_attention(monkeypatch, block: int, kv_heads: int) -> None:
    monkeypatch.setattr(attention, "BLOCK", block)
    torch.manual_seed(0)
    states = [torch.randn(1, heads, 40, 8, requires_grad=True) for heads in (4, kv_heads, kv_heads)]
    grad = torch.randn(1, 40, 4, 8)
    dense = F.scaled_dot_product_attention(*states, attn_mask=visible(), enable_gqa=True).transpose(1, 2)
    expected = [dense, *torch.autograd.grad(dense, states, grad)]
    output = _BlockAttention.apply(*states, ForestLayout(FOREST, torch.device("cpu")), None)
    for ours, theirs in zip([output, *torch.autograd.grad(output, states, grad)], expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_window_that_binds_is_masked_in_bf16_too() -> None:
    torch.manual_seed(0)
    states = [torch.randn(1, 2, 40, 8) for _ in range(3)]
    layout = ForestLayout(FOREST, torch.device("cpu"))
    exact, _ = forest_attention(torch.nn.Identity(), *states, None, forest=layout, sliding_window=4)
    rounded = [state.bfloat16() for state in states]
    windowed, _ = forest_attention(torch.nn.Identity(), *rounded, None, forest=layout, sliding_window=4)
    torch.testing.assert_close(windowed.float(), exact, atol=0.05, rtol=0.05)
