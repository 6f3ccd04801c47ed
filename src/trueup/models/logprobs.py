"""Hidden states → log-probabilities of the target tokens, in chunks: `[N, V]` logits never exist at once.

The one place where objectives meet the model's head. Frozen plain heads take a hand-written backward whose gradient
is made in the forward pass (per row it is a scalar times `W[target] - softmax·W`, so nothing must be recomputed);
trained plain heads recompute the chunk in the backward; any other head (adapted, quantised) is called as a module
and recomputed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

#: Rows of logits held at once. 512 rows of a 152k vocabulary are 300 MB in fp32.
CHUNK = 512


@dataclass(frozen=True)
class Head:
    """The output projection and what the architecture does to its logits.

    Raises nothing; `models/load.py` proves at load that this reproduces the model's own logits.
    """

    module: nn.Module  # [H] → [V]
    scale: float = 1.0  # logits are multiplied by it (Cohere's logit_scale, 1 / Granite's logits_scaling)
    softcap: float | None = None  # logits become softcap · tanh(logits / softcap) (Gemma 2)

    def finish(self, logits: Tensor) -> Tensor:
        """Raw fp32 logits → the architecture's logits, in place where no gradient flows."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def token_logps(hidden: Tensor, head: Head, target: Tensor, chunk: int = CHUNK) -> Tensor:
    """log p(target | hidden) for N positions.

    Args:
        hidden: [N, H] hidden states after the final norm, in compute dtype.
        target: [N] token ids.
        chunk: rows of logits held at once.

    Returns:
        [N] fp32, differentiable in `hidden` and in the head's trained parameters.
    """
    module = head.module
    if type(module) is nn.Linear and not module.weight.requires_grad and not _hooked(module):
        return _FrozenHead.apply(hidden, module.weight, module.bias, target, head, chunk)

    def project(rows: Tensor, targets: Tensor) -> Tensor:
        return _gather_logps(head.finish(module(rows).float()), targets)

    pieces = []
    for rows, targets in zip(hidden.split(chunk), target.split(chunk), strict=True):
        if torch.is_grad_enabled():
            pieces.append(checkpoint(project, rows, targets, use_reentrant=False))
        else:
            pieces.append(project(rows, targets))
    return torch.cat(pieces) if pieces else hidden.new_zeros(0, dtype=torch.float32)


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _gather_logps(logits: Tensor, target: Tensor) -> Tensor:
    return logits.gather(1, target[:, None]).squeeze(1) - torch.logsumexp(logits, dim=1)


class _FrozenHead(torch.autograd.Function):
    """log p = z_y − logsumexp(z), z = finish(W h + b); d log p / d h = Wᵀ (f'(z) ⊙ (onehot_y − softmax z))."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, target, head: Head, chunk: int):
        logps = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        slopes = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            raw = torch.addmm(bias, hidden[rows], weight.t()) if bias is not None else hidden[rows] @ weight.t()
            logits = head.finish(raw.float())
            logps[rows] = _gather_logps(logits, target[rows])
            if slopes is not None:
                slopes[rows] = _slope(logits, target[rows], head).to(weight.dtype) @ weight
        if slopes is not None:
            ctx.save_for_backward(slopes)
        return logps

    @staticmethod
    def backward(ctx, grad_logps):
        (slopes,) = ctx.saved_tensors
        return slopes * grad_logps[:, None].to(slopes.dtype), None, None, None, None, None


def _slope(logits: Tensor, target: Tensor, head: Head) -> Tensor:
    """d log p / d raw logits, [rows, V] fp32."""
    slope = torch.softmax(logits, dim=1).neg_()
    slope[torch.arange(len(target), device=target.device), target] += 1.0
    if head.softcap is not None:
        slope *= 1.0 - (logits / head.softcap) ** 2  # tanh' = 1 − tanh²
    return slope.mul_(head.scale) if head.scale != 1.0 else slope


def sum_by_sequence(logps: Tensor, owner: Tensor, num_sequences: int) -> Tensor:
    """[N] per-token values → [S] sums per sequence, fp32."""
    return torch.zeros(num_sequences, dtype=torch.float32, device=logps.device).index_add(0, owner, logps)
