"""The types every layer speaks: the batch as a forest of token segments, and what objectives see of it.

Shape letters: T tokens of a batch, N predicted tokens, S sequences (leaves), B pairs or answers, M those of a whole
optimizer step.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

#: name -> (sum, count): detached scalars on the device, added up and read once per logging interval.
Metrics = dict[str, tuple[Tensor, Tensor | float]]


@dataclass(frozen=True)
class Segment:
    """A run of tokens `start:stop` that attends causally to itself and fully to its ancestors."""

    start: int
    stop: int
    parent: int  # index of the parent segment, -1 for a root; a parent comes before its children


@dataclass(frozen=True)
class Forest:
    """A batch: token segments, each with a parent. Nothing is padded, nothing is laid out twice."""

    input_ids: Tensor  # [T] int64
    position_ids: Tensor  # [T] int64, depth of each token on its root-to-leaf path
    segments: tuple[Segment, ...]
    read_at: Tensor  # [N] token positions whose hidden state predicts …
    target: Tensor  # [N] … this token
    owner: Tensor  # [N] sequence (leaf) index of each prediction, ascending
    num_sequences: int
    paths: tuple[tuple[int, ...], ...]  # [S] segment indices from root to leaf of each sequence

    def to(self, device) -> Forest:
        """The same forest with its tensors on `device`."""
        return Forest(
            self.input_ids.to(device, non_blocking=True),
            self.position_ids.to(device, non_blocking=True),
            self.segments,
            self.read_at.to(device, non_blocking=True),
            self.target.to(device, non_blocking=True),
            self.owner.to(device, non_blocking=True),
            self.num_sequences,
            self.paths,
        )


@dataclass(frozen=True)
class PairLogps:
    """Summed log-probabilities of B preference pairs, fp32, with the number of answer tokens of each side."""

    chosen: Tensor  # [B]
    rejected: Tensor  # [B]
    chosen_len: Tensor  # [B]
    rejected_len: Tensor  # [B]
    ref_chosen: Tensor | None = None  # [B], None for reference-free objectives
    ref_rejected: Tensor | None = None  # [B]
    kl_chosen: Tensor | None = None  # [B] Σ_t KL(π_ref ‖ π) over the vocabulary, for objectives that need it
    kl_rejected: Tensor | None = None  # [B]
    weight: Tensor | None = None  # [B] of each pair in the loss, no gradient; None counts all alike


@dataclass(frozen=True)
class FeedbackLogps:
    """Summed log-probabilities of B single answers that people want or do not want, fp32."""

    answer: Tensor  # [B]
    length: Tensor  # [B] answer tokens
    desirable: Tensor  # [B] bool
    reference: Tensor  # [B]


@dataclass(frozen=True)
class Rankings:
    """Rewards of the answers of B prompts, up to N each, fp32, and what the data says of them.

    Where an answer is absent, rewards and scores are 0.
    """

    rewards: Tensor  # [B, N]
    scores: Tensor  # [B, N] higher is better, equal is a tie
    present: Tensor  # [B, N] bool
    margin: Tensor  # [B] by how much the better answer of a pair must win

    @property
    def together(self) -> Tensor:
        """[B, N, N] bool: both answers are there."""
        return self.present[:, :, None] & self.present[:, None, :]

    @property
    def wins(self) -> Tensor:
        """[B, N, N] bool: both answers are there, and the first is better than the second."""
        return (self.scores[:, :, None] > self.scores[:, None, :]) & self.together


@dataclass(frozen=True)
class StepValues:
    """What an objective that couples examples sees of its whole optimizer step: values without gradient.

    Gathered over every micro-batch of every process before the step's first loss, so that no result depends on how
    a step was cut up.
    """

    values: dict[str, Tensor]  # [M] each, in an order of the step's own
    at: Tensor  # [B] where this micro-batch's examples stand in it


@dataclass(frozen=True)
class TokenLogps:
    """Per-token log-probabilities of S sequences, fp32."""

    logps: Tensor  # [N]
    owner: Tensor  # [N]
    num_sequences: int
    entropy: Tensor | None = None  # [N] of the likeliest tokens among themselves, no gradient, for who needs it


@dataclass(frozen=True)
class Loss:
    """An objective's result over one micro-batch: a sum, to be divided by the step's global count."""

    sum: Tensor  # scalar fp32, differentiable
    metrics: Metrics = field(default_factory=dict)
