"""Forest attention on a GPU in one call of a varlen flash kernel: every segment is a sequence whose keys are its path.

For the backward it keeps what plain attention keeps: queries, keys, values, output and normaliser of every token, once.
The keys and values of all paths, whose size follows the lengths of the paths, are gathered again there, and their
gradients are added up in fp32 (autograd through the gathering would keep them, and add up in bf16).

Not measured on a GPU yet: the tests play the kernel in plain torch.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Protocol

import torch
from torch import Tensor

from trueup.models.layout import ForestLayout, Gathering

with suppress(ImportError):  # a torch without it
    from torch.nn.attention import varlen  # noqa: F401  registers the operators

#: torch's operators and what they are given, in order. They are not public: where they differ, there is no kernel.
_FORWARD = "query key value cu_seq_q cu_seq_k max_q max_k is_causal scale window_size enable_gqa"
_BACKWARD = "grad_out query key value out lse cu_seq_q cu_seq_k max_q max_k is_causal rng_state scale window_size"


class Kernel(Protocol):
    """Causal attention over sequences of several lengths, aligned at their ends, with its own backward.

    q [T, heads, d] and k, v [K, kv_heads, d] hold the sequences that `at` tells apart; `window` is how many keys back
    a query sees, itself included.
    """

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, at: Gathering, scale: float | None, window: int | None
    ) -> tuple[Tensor, ...]:
        """The output [T, heads, d], and whatever the backward wants to see again."""
        ...

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: tuple[Tensor, ...], at: Gathering,
        scale: float | None, window: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of q, k and v, from `kept`, what `forward` gave."""
        ...


class Flash:
    """torch's own, the operators behind `torch.nn.attention.varlen.varlen_attn`, which save what they are given."""

    def forward(self, q, k, v, at, scale, window):
        causal, span = _window(window)
        return torch.ops.torch_attn._varlen_attn(
            q, k, v, at.starts_q, at.starts_k, at.longest_q, at.longest_k, causal, scale, span,
            q.shape[1] != k.shape[1],
        )  # fmt: skip

    def backward(self, grad, q, k, v, kept, at, scale, window):
        output, normaliser, state = kept
        causal, span = _window(window)
        return torch.ops.torch_attn._varlen_attn_backward(
            grad, q, k, v, output, normaliser, at.starts_q, at.starts_k, at.longest_q, at.longest_k, causal, state,
            scale, span,
        )  # fmt: skip


def _window(window: int | None) -> tuple[bool, list[int]]:
    """(plainly causal, keys to the left and to the right), as flash kernels count them."""
    return window is None, [-1 if window is None else window - 1, 0]


def flash() -> Kernel | None:
    """torch's kernel, where this torch has it as it is known here."""
    known = _takes("_varlen_attn", _FORWARD) and _takes("_varlen_attn_backward", _BACKWARD)
    return Flash() if known else None


def _takes(operator: str, arguments: str) -> bool:
    if not hasattr(torch.ops.torch_attn, operator):
        return False
    schema = getattr(torch.ops.torch_attn, operator).default._schema
    names = arguments.split()
    return [argument.name for argument in schema.arguments][: len(names)] == names


class GatheredAttention(torch.autograd.Function):
    """q [1, heads, T, d], k and v [1, kv_heads, T, d] over a forest → [1, T, heads, d]."""

    @staticmethod
    def forward(
        ctx, query: Tensor, key: Tensor, value: Tensor, layout: ForestLayout, scaling: float | None,
        window: int | None, kernel: Kernel,
    ) -> Tensor:  # fmt: skip
        at = layout.gathering
        states = _by_token(query), *(_gather(_by_token(x), at.positions) for x in (key, value))
        kept = kernel.forward(*states, at, scaling, window)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.arguments, ctx.kernel = (at, scaling, window), kernel
        return kept[0][None]

    @staticmethod
    def backward(ctx, grad: Tensor):
        query, key, value, *kept = ctx.saved_tensors
        at = ctx.arguments[0]
        states = _by_token(query), *(_gather(_by_token(x), at.positions) for x in (key, value))
        d_q, d_k, d_v = ctx.kernel.backward(grad[0].contiguous(), *states, tuple(kept), *ctx.arguments)
        d_k, d_v = (_add_up(d, at.positions, key.shape[2]) for d in (d_k, d_v))
        return *(d.transpose(0, 1)[None] for d in (d_q, d_k, d_v)), None, None, None, None


def _by_token(states: Tensor) -> Tensor:
    """[1, heads, T, d] → [T, heads, d]."""
    return states[0].transpose(0, 1)


def _gather(states: Tensor, positions: Tensor | None) -> Tensor:
    return states if positions is None else states.index_select(0, positions)


def _add_up(gradients: Tensor, positions: Tensor | None, tokens: int) -> Tensor:
    """What `_gather` spread out, back on its tokens: [K, kv_heads, d] → [T, kv_heads, d]."""
    if positions is None:
        return gradients
    exact = torch.promote_types(gradients.dtype, torch.float32)
    total = gradients.new_zeros(tokens, *gradients.shape[1:], dtype=exact)
    return total.index_add_(0, positions, gradients.to(exact)).to(gradients.dtype)
