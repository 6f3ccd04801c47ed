"""What objectives ask of whole next-token distributions, in chunks: `[N, V]` never exists at once.

All take hidden states and a function from hidden states to logits, so that they know nothing of a head's make.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trueup.models.logprobs import Head

#: hidden states [n, H] → logits [n, V], fp32.
Project = Callable[[Tensor], Tensor]

CHUNK = 256  # rows of logits held at once


def projection(head: Head) -> Project:
    """Hidden states → the architecture's logits, through a head."""
    return lambda rows: head.finish(head.module(rows).float())


@torch.no_grad()
def log_collisions(hidden: Tensor, project: Project, chunk: int = CHUNK) -> Tensor:
    """log Σ_v π(v)² [N] at each position: how sure the model is, whatever it says. No gradient."""
    pieces = []
    for rows in hidden.split(chunk):
        logits = project(rows)
        pieces.append(torch.logsumexp(2 * logits, 1) - 2 * torch.logsumexp(logits, 1))
    return torch.cat(pieces) if pieces else hidden.new_zeros(0, dtype=torch.float32)


@torch.no_grad()
def top_entropy(hidden: Tensor, project: Project, largest: int = 20, chunk: int = CHUNK) -> Tensor:
    """Entropy [N] (nats) of the `largest` likeliest tokens at each position among themselves. No gradient."""
    pieces = []
    for rows in hidden.split(chunk):
        logits = project(rows)
        logps = torch.log_softmax(logits.topk(min(largest, logits.shape[1]), dim=1).values, 1)
        pieces.append(-(logps.exp() * logps).sum(1))
    return torch.cat(pieces) if pieces else hidden.new_zeros(0, dtype=torch.float32)


def vocabulary_kl(
    reference: Tensor, project_reference: Project, hidden: Tensor, project: Project, chunk: int = CHUNK
) -> Tensor:
    """KL(π_ref ‖ π) [N] over the vocabulary at each position, differentiable in `hidden` and the head.

    Args:
        reference: [N, H] the reference's hidden states at the same positions, without gradient.
    """

    def divergence(rows: Tensor, others: Tensor) -> Tensor:
        with torch.no_grad():
            log_reference = torch.log_softmax(project_reference(others), 1)
        log_policy = torch.log_softmax(project(rows), 1)
        return (log_reference.exp() * (log_reference - log_policy)).sum(1)

    pieces = []
    for rows, others in zip(hidden.split(chunk), reference.split(chunk), strict=True):
        if torch.is_grad_enabled():
            pieces.append(checkpoint(divergence, rows, others, use_reentrant=False))
        else:
            pieces.append(divergence(rows, others))
    return torch.cat(pieces) if pieces else hidden.new_zeros(0, dtype=torch.float32)
