"""NEFTune: uniform noise on the embeddings of what is learnt from (Jain et al. 2023, arXiv 2310.05914).

Every token's embedding moves by U(−1, 1) · α / √(L·d), d its width and L the length of its row: prompt and answer, no
padding. A prompt that several answers share is computed once, so they share its noise; its L is the longest of their
rows. Where an architecture does not share prompts, each row draws its own.

The noise is drawn from torch's generator, whose state is part of a checkpoint, once a forward pass: layers that
recompute their activations start behind the embeddings. Evaluations, answers and references have none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trueup.types import Forest


@contextmanager
def noisy(embeddings: nn.Module, alpha: float, lengths: Tensor) -> Iterator[None]:
    """Let a forward pass find noise on its embeddings [..., H].

    Args:
        lengths: L of every embedding, in a shape [...] that broadcasts against theirs.
    """

    def add(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        scale = alpha / torch.sqrt(lengths * output.shape[-1])
        noise = torch.empty(output.shape, dtype=torch.float32, device=output.device).uniform_(-1.0, 1.0)
        return output + (noise * scale.unsqueeze(-1)).to(output.dtype)

    hook = embeddings.register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()


def row_lengths(forest: Forest) -> Tensor:
    """[T] tokens of the longest row that each token of a forest is in, fp32."""
    sizes = [segment.stop - segment.start for segment in forest.segments]
    longest = [0] * len(sizes)
    for path in forest.paths:
        total = sum(sizes[s] for s in path)
        for s in path:
            longest[s] = max(longest[s], total)
    found = torch.tensor(longest, dtype=torch.float32).repeat_interleave(torch.tensor(sizes))
    return found.to(forest.input_ids.device, non_blocking=True)
