"""The block kernel equals dense attention with the forest's mask, values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import BloomConfig, BloomForCausalLM, GPTJConfig, GPTJForCausalLM, GptOssConfig, GptOssForCausalLM

from trueup.models import attention, blocks
from trueup.models.attention import forest_attention
from trueup.models.blocks import BlockAttention
from trueup.models.layout import ForestLayout, causal_mask
from trueup.models.policy import Policy
from trueup.models.varlen import Flash, GatheredAttention, flash
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
    monkeypatch.setattr(blocks, "BLOCK", block)
    torch.manual_seed(0)
    states = [torch.randn(1, heads, 40, 8, requires_grad=True) for heads in (4, kv_heads, kv_heads)]
    grad = torch.randn(1, 40, 4, 8)
    dense = F.scaled_dot_product_attention(*states, attn_mask=visible(), enable_gqa=True).transpose(1, 2)
    expected = [dense, *torch.autograd.grad(dense, states, grad)]
    output = BlockAttention.apply(*states, ForestLayout(FOREST, torch.device("cpu")), None)
    for ours, theirs in zip([output, *torch.autograd.grad(output, states, grad)], expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("spread", [1.0, 4.0], ids=["flat", "sharp"])
def test_bf16_blocks_are_as_exact_as_the_fused_kernel(spread: float) -> None:
    """Against fp64, by the norm: output and gradients of q, k and v; sharp scores are where rounding shows."""
    torch.manual_seed(0)
    forest = ForestLayout((Segment(0, 150, -1), Segment(150, 270, 0), Segment(270, 360, 0)), torch.device("cpu"))
    states = [(torch.randn(1, h, 360, 32) * s).bfloat16() for h, s in ((4, spread), (2, spread), (2, 1.0))]
    grad = torch.randn(1, 360, 4, 32).bfloat16()

    def results(kernel, dtype: torch.dtype) -> list[torch.Tensor]:
        own = [state.to(dtype).requires_grad_() for state in states]
        output = kernel(*own, forest, None)
        return [output.detach(), *torch.autograd.grad(output, own, grad.to(dtype))]

    exact = results(attention._fused, torch.float64)
    ours, fused = (results(kernel, torch.bfloat16) for kernel in (BlockAttention.apply, attention._fused))
    for name, a, b, truth in zip(("output", "q", "k", "v"), ours, fused, exact, strict=True):
        errors = [float((x.double() - truth).norm() / truth.norm()) for x in (a, b)]
        assert errors[0] <= max(1.5 * errors[1], 0.004), (name, errors)


def test_products_of_other_code_keep_their_precision() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    states = [torch.randn(1, 2, 40, 8).bfloat16().requires_grad_() for _ in range(3)]
    BlockAttention.apply(*states, ForestLayout(FOREST, torch.device("cpu")), None).sum().backward()
    assert torch.backends.mkldnn.matmul.fp32_precision == before


# --- the varlen kernel's place ----------------------------------------------------------------------


class Played:
    """A varlen kernel in plain torch, with its documented meaning."""

    def forward(self, q, k, v, at, scale, window):
        assert at.longest_q == at.starts_q.diff().max() and at.longest_k == at.starts_k.diff().max()
        spans = (starts.unfold(0, 2, 1).tolist() for starts in (at.starts_q, at.starts_k))
        outputs = []
        for (a, b), (c, d) in zip(*spans, strict=True):
            mask = causal_mask(b - a, d - c, window, q.device)
            states = (x[None].transpose(1, 2) for x in (q[a:b], k[c:d], v[c:d]))
            grouped = q.shape[1] != k.shape[1]
            outputs.append(F.scaled_dot_product_attention(*states, attn_mask=mask, scale=scale, enable_gqa=grouped))
        return (torch.cat(outputs, dim=2)[0].transpose(0, 1),)

    def backward(self, grad, q, k, v, kept, at, scale, window):
        states = [x.detach().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            (output,) = self.forward(*states, at, scale, window)
        assert torch.equal(output, kept[0])
        return torch.autograd.grad(output, states, grad)


ALONE = (Segment(0, 9, -1), Segment(9, 25, -1), Segment(25, 40, -1))


@pytest.mark.parametrize("forest", [FOREST, ALONE], ids=["tree", "alone"])
@pytest.mark.parametrize("window", [None, 4])
def test_the_gathered_form_equals_segments(monkeypatch, window: int | None, forest: tuple[Segment, ...]) -> None:
    monkeypatch.setattr(attention, "VARLEN", Played())
    torch.manual_seed(0)
    states = [torch.randn(1, heads, 40, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    grad = torch.randn(1, 40, 4, 8, dtype=torch.float64)
    results = []
    for gathered in (True, False):
        layout = ForestLayout(forest, torch.device("cpu"), gathered)
        output, _ = forest_attention(torch.nn.Identity(), *states, None, forest=layout, sliding_window=window)
        results.append([output, *torch.autograd.grad(output, states, grad)])
    torch.testing.assert_close(*results)


def test_gradients_of_the_gathered_form_equal_finite_differences() -> None:
    torch.manual_seed(0)
    small = (Segment(0, 2, -1), Segment(2, 5, 0), Segment(5, 6, 0), Segment(6, 8, 2))
    states = [torch.randn(1, heads, 8, 2, dtype=torch.float64, requires_grad=True) for heads in (2, 1, 1)]
    layout = ForestLayout(small, torch.device("cpu"), True)
    assert torch.autograd.gradcheck(lambda *x: GatheredAttention.apply(*x, layout, 0.7, None, Played()), states)


def test_gathered_keys_are_not_kept_and_their_gradients_add_up_in_fp32() -> None:
    """Many answers on one prompt: what is kept is q, k, v and the output, however often the prompt is seen."""
    many = (Segment(0, 64, -1), *(Segment(64 + 2 * i, 66 + 2 * i, 0) for i in range(64)))
    torch.manual_seed(0)
    states = [torch.randn(1, heads, 192, 8).bfloat16().requires_grad_() for heads in (4, 2, 2)]
    layout, kept = ForestLayout(many, torch.device("cpu"), True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        output = GatheredAttention.apply(*states, layout, None, None, Played())
    assert sum(kept) == 2 * (4 + 2) * 192 * 8
    assert len(layout.gathering.positions) == 64 + 64 * 66
    found = torch.autograd.grad(output.float().sum(), states)
    wide = [state.detach().double().requires_grad_() for state in states]
    exact = torch.autograd.grad(attention._fused(*wide, layout, None).sum(), wide)
    for ours, truth in zip(found, exact, strict=True):
        assert (ours.double() - truth).norm() <= 0.01 * truth.norm()


def test_torchs_operators_are_the_ones_that_are_known_here() -> None:
    assert isinstance(flash(), Flash)
    assert attention.kernels_for(torch.device("cuda"), torch.bfloat16) == (True, False)
    assert attention.kernels_for(torch.device("cuda"), torch.float32) == (False,)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["bloom", "gptj"])
def test_attention_of_an_architectures_own_kind_runs_unshared(name: str, dtype: torch.dtype) -> None:
    """With new weights all predictions are alike, and in bf16 a wrong mask would pass for rounding."""
    torch.manual_seed(0)
    if name == "bloom":
        model = BloomForCausalLM(BloomConfig(hidden_size=32, n_head=4, n_layer=2, vocab_size=64))
    else:
        model = GPTJForCausalLM(GPTJConfig(n_embd=32, n_head=4, n_layer=2, rotary_dim=8, vocab_size=64))
    policy = Policy(model.to(dtype).eval())
    assert "2 of its 2 layers" in (policy.verify_layout() or "")
    assert not policy.shared


@pytest.mark.parametrize("window", [None, 5])
def test_capped_scores_equal_the_formula(window: int | None) -> None:
    """softmax(c · tanh(q k / c)) v with grouped heads and the queries at the end of the keys."""
    torch.manual_seed(0)
    query = torch.randn(1, 6, 7, 8)
    key, value = (torch.randn(1, 2, 12, 8) for _ in range(2))
    mask = causal_mask(7, 12, window, query.device)
    keys, values = (states.repeat_interleave(3, dim=1) for states in (key, value))
    scores = 2.0 * torch.tanh(query @ keys.transpose(-1, -2) / 8**0.5 / 2.0)
    expected = torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1) @ values
    torch.testing.assert_close(attention._eager(query, key, value, mask, 0.0, None, 2.0), expected)
