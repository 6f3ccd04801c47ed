"""Answers drawn by the token, with a cache of keys and values: prompts left-padded in batches, each computed once.

A prompt goes through the model once however many answers it gets; rows that have ended leave the batch. Which token a
row draws depends on the seed and its batch alone, so a rollout can be drawn again to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

LOOK_EVERY = {"cpu": 1}  # steps between looks at what has ended; on an accelerator each waits for the device
LOOK_RARELY = 4
KEEP_UNTIL = 0.75  # share of rows alive below which the ended ones are taken out of the cache


@dataclass(frozen=True, slots=True)
class Sampled:
    """One answer, with its stop token if it has `ended`."""

    ids: np.ndarray  # int32 [A]
    logps: np.ndarray  # float32 [A], of the model at the sampling temperature, before top_k and top_p
    entropy: float  # Σ over its tokens, of the same distribution, in nats
    ended: bool


@dataclass(frozen=True)
class Choice:
    """How the next token is chosen; `temperature` 0 is greedy."""

    temperature: float
    top_p: float
    top_k: int

    def draw(self, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Token, its log-probability and the entropy, [R] each, from [R, V] logits and [R] numbers in [0, 1)."""
        logps = torch.log_softmax(logits.float() / (self.temperature or 1.0), dim=-1)
        probabilities = logps.exp()
        if self.temperature == 0.0:
            ids = logps.argmax(-1)
        else:
            # The inverse of the distribution function: one random number a row, where Gumbel noise takes V.
            total = self._kept(probabilities).cumsum(-1, dtype=torch.float64)
            wanted = uniform[:, None] * total[:, -1:]
            ids = torch.searchsorted(total, wanted, right=True).squeeze(1).clamp_max(logits.shape[-1] - 1)
        entropy = torch.special.entr(probabilities).sum(-1)
        return ids, logps.gather(1, ids[:, None]).squeeze(1), entropy

    def _kept(self, probabilities: Tensor) -> Tensor:
        """Zeros for what top_k and top_p leave out."""
        if self.top_k and self.top_k < probabilities.shape[-1]:
            least = probabilities.topk(self.top_k).values[:, -1:]
            probabilities = probabilities.where(probabilities >= least, 0.0)
        if self.top_p < 1.0:
            ordered, order = probabilities.sort(descending=True)
            before = ordered.cumsum(-1) - ordered
            ordered = ordered.where(before < self.top_p * ordered.sum(-1, keepdim=True), 0.0)
            probabilities = torch.zeros_like(probabilities).scatter(1, order, ordered)
        return probabilities


@torch.inference_mode()
def sample_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    num_answers: int,
    choice: Choice,
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
    seed: int | Sequence[int],
) -> list[list[Sampled]]:
    """`num_answers` answers to each of some prompts (none empty), all at the same time.

    `seed`: of the batch; or one for each answer, whose draws then do not depend on the others in the batch.
    """
    device = model.device
    ids, mask = _left_padded(prompts, pad_id)
    cache: Any = DynamicCache(config=model.config)
    padded = bool((mask == 0).any())
    state = _State(mask.repeat_interleave(num_answers, 0).to(device) if padded else None)
    first = {"attention_mask": mask.to(device), "position_ids": _positions(mask).to(device)} if padded else {}
    logits = model(input_ids=ids.to(device), past_key_values=cache, use_cache=True, logits_to_keep=1, **first).logits
    if num_answers > 1:
        cache.batch_repeat_interleave(num_answers)
        logits = logits.repeat_interleave(num_answers, 0)
    rows = len(prompts) * num_answers
    uniforms = _uniforms(seed, rows, max_new_tokens)
    stops = torch.tensor(list(stop_ids), device=device)
    alive = torch.arange(rows, device=device)  # row of the batch → answer
    ended = torch.zeros(rows, dtype=torch.bool, device=device)
    tokens = torch.full((rows, max_new_tokens), pad_id, device=device)
    logps, entropies = torch.zeros(2, rows, max_new_tokens, device=device)
    look = LOOK_EVERY.get(device.type, LOOK_RARELY)
    for step in range(max_new_tokens):
        uniform = next(uniforms).to(device)  # of all, ended or not
        chosen, logp, entropy = choice.draw(logits[:, -1], uniform[alive])
        tokens[alive, step], logps[alive, step], entropies[alive, step] = chosen, logp, entropy
        ended[alive] |= torch.isin(chosen, stops)
        if step + 1 == max_new_tokens:
            break
        if (step + 1) % look == 0:
            going = (~ended[alive]).nonzero().squeeze(1)
            if not len(going):
                break
            if len(going) <= KEEP_UNTIL * len(alive):
                cache.batch_select_indices(going)
                alive, chosen = alive[going], chosen[going]
                state.select(going)
        logits = model(
            input_ids=chosen[:, None], past_key_values=cache, use_cache=True, logits_to_keep=1, **state.advance()
        ).logits
    flat = _cut(tokens.cpu(), logps.cpu(), entropies.cpu(), set(stop_ids))
    return [flat[i : i + num_answers] for i in range(0, rows, num_answers)]


def _uniforms(seed: int | Sequence[int], rows: int, steps: int) -> Iterator[Tensor]:
    """Numbers [rows] in [0, 1), fp64, for each step."""
    if isinstance(seed, int):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            yield torch.rand(rows, dtype=torch.float64, generator=generator)
        return
    own = [torch.rand(steps, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in seed]
    yield from torch.stack(own, dim=1)


class _State:
    """The mask of a left-padded batch as it grows; nothing to tell the model where all prompts are equally long."""

    def __init__(self, mask: Tensor | None) -> None:
        self.mask = mask

    def select(self, rows: Tensor) -> None:
        if self.mask is not None:
            self.mask = self.mask[rows]

    def advance(self) -> dict[str, Tensor]:
        """What the forward pass of one more token takes."""
        if self.mask is None:
            return {}
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        return {"attention_mask": self.mask, "position_ids": self.mask.sum(1, keepdim=True) - 1}


def _left_padded(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.as_tensor(np.asarray(prompt))
        mask[row, width - len(prompt) :] = 1
    return ids, mask


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp_min(0)


def _cut(tokens: Tensor, logps: Tensor, entropies: Tensor, stop_ids: set[int]) -> list[Sampled]:
    """Rows up to their first stop token."""
    answers = []
    is_stop = np.isin(tokens.numpy(), list(stop_ids))
    for row in range(len(tokens)):
        ended = bool(is_stop[row].any())
        length = int(is_stop[row].argmax()) + 1 if ended else tokens.shape[1]
        answers.append(
            Sampled(
                tokens[row, :length].numpy().astype(np.int32),
                logps[row, :length].numpy().copy(),
                float(entropies[row, :length].sum()),
                ended,
            )
        )
    return answers
