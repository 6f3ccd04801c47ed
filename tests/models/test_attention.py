"""The block kernel equals dense attention with the forest's mask, values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import GptOssConfig, GptOssForCausalLM

from trueup.models import attention
from trueup.models.attention import ForestLayout, _BlockAttention, forest_attention
from trueup.models.policy import Policy
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


@pytest.mark.parametrize("window", [None, 4])
def test_the_gathered_form_equals_segments(monkeypatch, window: int | None) -> None:
    """On a CPU the varlen kernel is played by a loop with its documented meaning."""

    def varlen(q, k, v, starts_q, starts_k, longest_q, longest_k, *, scale, window_size, enable_gqa):
        assert longest_q == starts_q.diff().max() and longest_k == starts_k.diff().max()
        outputs = []
        for (a, b), (c, d) in zip(starts_q.unfold(0, 2, 1).tolist(), starts_k.unfold(0, 2, 1).tolist(), strict=True):
            left = window_size[0] + 1 if window_size[0] >= 0 else None
            mask = attention.causal_mask(b - a, d - c, left, q.device)
            states = (x[None].transpose(1, 2) for x in (q[a:b], k[c:d], v[c:d]))
            outputs.append(F.scaled_dot_product_attention(*states, attn_mask=mask, scale=scale, enable_gqa=enable_gqa))
        return torch.cat(outputs, dim=2)[0].transpose(0, 1)

    monkeypatch.setattr(attention, "varlen_attn", varlen)
    torch.manual_seed(0)
    states = [torch.randn(1, heads, 40, 8) for heads in (4, 2, 2)]
    results = [
        forest_attention(
            torch.nn.Identity(), *states, None,
            forest=ForestLayout(FOREST, torch.device("cpu"), gathered), sliding_window=window,
        )[0]
        for gathered in (True, False)
    ]  # fmt: skip
    torch.testing.assert_close(*results)


def test_a_window_that_binds_is_masked_in_bf16_too() -> None:
    torch.manual_seed(0)
    states = [torch.randn(1, 2, 40, 8) for _ in range(3)]
    layout = ForestLayout(FOREST, torch.device("cpu"))
    exact, _ = forest_attention(torch.nn.Identity(), *states, None, forest=layout, sliding_window=4)
    rounded = [state.bfloat16() for state in states]
    windowed, _ = forest_attention(torch.nn.Identity(), *rounded, None, forest=layout, sliding_window=4)
    torch.testing.assert_close(windowed.float(), exact, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_architecture_with_attention_sinks_runs_unshared(dtype: torch.dtype) -> None:
    config = GptOssConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=64, num_local_experts=2, num_experts_per_tok=1, sliding_window=64,
    )  # fmt: skip
    torch.manual_seed(0)
    policy = Policy(GptOssForCausalLM(config).to(dtype).eval())
    assert "s_aux" in (policy.verify_layout() or "")
    assert not policy.shared


@pytest.mark.parametrize("window", [None, 5])
def test_capped_scores_equal_the_formula(window: int | None) -> None:
    """softmax(c · tanh(q k / c)) v with grouped heads and the queries at the end of the keys."""
    torch.manual_seed(0)
    query = torch.randn(1, 6, 7, 8)
    key, value = (torch.randn(1, 2, 12, 8) for _ in range(2))
    mask = attention.causal_mask(7, 12, window, query.device)
    keys, values = (states.repeat_interleave(3, dim=1) for states in (key, value))
    scores = 2.0 * torch.tanh(query @ keys.transpose(-1, -2) / 8**0.5 / 2.0)
    expected = torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1) @ values
    torch.testing.assert_close(attention._eager(query, key, value, mask, 0.0, None, 2.0), expected)
