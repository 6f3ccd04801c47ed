"""The next token of many answers at once, each with parameters and random numbers of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trueup.rollout.sampling import Sampling, TokenLogp

FEW = 256  # tokens among which a nucleus is looked for first; sorting a whole vocabulary takes longer than small models


class Chooser:
    """What one answer's parameters make of its logits: its random numbers, and what it has said already.

    Args:
        prompt_ids: for the repetition penalty, which counts them in.
        seed: the same numbers as `sampler.sample_batch` draws with for an answer's seed.
        most: tokens that can be drawn.
    """

    def __init__(self, sampling: Sampling, prompt_ids: Sequence[int], seed: int, most: int) -> None:
        self.sampling = sampling
        self.greedy = sampling.temperature == 0.0
        self._guide = sampling.grammar and sampling.grammar.guide()
        self.changes = sampling.penalises or self._guide is not None
        self._uniforms = iter(()) if self.greedy else _uniforms(seed, most)
        self._prompt_ids = prompt_ids
        self._counts: Tensor | None = None  # [V] how often each token is in the answer; what follows likewise
        self._seen: Tensor | None = None
        self._bias: Tensor | None = None

    @property
    def failure(self) -> str:
        """Why its grammar could not go on; empty while it can."""
        return self._guide.failure if self._guide is not None else ""

    def uniform(self) -> float:
        return next(self._uniforms)

    def change(self, logits: Tensor) -> Tensor:
        """Bias, penalties and grammar; [V] → [V], or the same tensor where there are none."""
        if self.sampling.penalises:
            logits = self._penalised(logits)
        return logits if self._guide is None else self._guide.allow(logits)

    def _penalised(self, logits: Tensor) -> Tensor:
        s = self.sampling
        if self._counts is None or self._seen is None:
            self._prepare(logits)
            assert self._counts is not None and self._seen is not None
        if self._bias is not None:
            logits = logits + self._bias
        if s.repetition_penalty != 1.0:
            punished = torch.where(logits < 0, logits * s.repetition_penalty, logits / s.repetition_penalty)
            logits = torch.where(self._seen, punished, logits)
        if s.presence_penalty or s.frequency_penalty:
            logits = logits - s.frequency_penalty * self._counts - s.presence_penalty * (self._counts > 0)
        return logits

    def said(self, token: int) -> None:
        """Hear which token was drawn."""
        if self._guide is not None:
            self._guide.said(token)
        if self._counts is not None and self._seen is not None:
            self._counts[token] += 1
            self._seen[token] = True

    def _prepare(self, logits: Tensor) -> None:
        self._counts = torch.zeros_like(logits)
        self._seen = torch.zeros_like(logits, dtype=torch.bool)
        self._seen[torch.tensor(list(self._prompt_ids), device=logits.device)] = True
        if self.sampling.logit_bias:
            ids, values = zip(*self.sampling.logit_bias.items(), strict=True)
            self._bias = torch.zeros_like(logits)
            self._bias[torch.tensor(ids, device=logits.device)] = torch.tensor(values, device=logits.device)


def _uniforms(seed: int, most: int) -> Iterator[float]:
    """Numbers in [0, 1), fp64."""
    return iter(torch.rand(most, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).tolist())


@dataclass(frozen=True)
class Drawn:
    """Tokens of a step, with what was asked of their log-probabilities."""

    ids: list[int]
    logps: list[TokenLogp | None]


def draw(logits: Tensor, choosers: Sequence[Chooser]) -> Drawn:
    """One token a row. `logits` [R, V], in any dtype."""
    logits = logits.float()
    changed = logits
    if any(chooser.changes for chooser in choosers):
        changed = torch.stack([chooser.change(row) for chooser, row in zip(choosers, logits, strict=True)])
    ids = changed.argmax(-1)
    random = [row for row, chooser in enumerate(choosers) if not chooser.greedy]
    if random:
        rows = torch.tensor(random, device=logits.device)
        ids[rows] = _sample(changed[rows], [choosers[row] for row in random])
    logps = _logps(logits, ids, choosers)
    found = ids.tolist()
    for chooser, token in zip(choosers, found, strict=True):
        chooser.said(token)
    return Drawn(found, logps)


def _sample(logits: Tensor, choosers: Sequence[Chooser]) -> Tensor:
    """[R] tokens of rows that are drawn: the inverse of the distribution function at a random number each."""
    samplings = [chooser.sampling for chooser in choosers]
    numbers = torch.tensor(
        [[s.temperature, s.top_p, s.min_p, c.uniform()] for s, c in zip(samplings, choosers, strict=True)],
        dtype=torch.float64,
    ).to(logits.device)
    temperature, top_p, min_p = (numbers[:, i : i + 1].float() for i in range(3))
    probabilities = torch.softmax(logits / temperature, dim=-1)
    vocabulary = logits.shape[-1]
    top_k = [s.top_k if 0 < s.top_k < vocabulary else 0 for s in samplings]
    if any(top_k):
        probabilities = _most_likely(probabilities, top_k)
    if any(s.top_p < 1.0 for s in samplings):
        probabilities = _nucleus(probabilities, top_p)
    if any(s.min_p > 0.0 for s in samplings):
        probabilities = probabilities.where(probabilities >= min_p * probabilities.amax(-1, keepdim=True), 0.0)
    total = probabilities.cumsum(-1, dtype=torch.float64)
    wanted = numbers[:, 3:] * total[:, -1:]
    return torch.searchsorted(total, wanted, right=True).squeeze(1).clamp_max(vocabulary - 1)


def _most_likely(probabilities: Tensor, top_k: Sequence[int]) -> Tensor:
    """Zeros below the k-th likeliest of each row; 0 keeps all."""
    ranks = torch.tensor([max(k, 1) - 1 for k in top_k], device=probabilities.device)
    least = probabilities.topk(max(top_k)).values.gather(1, ranks[:, None])
    all_kept = torch.tensor([k == 0 for k in top_k], device=probabilities.device)
    return probabilities.where((probabilities >= least) | all_kept[:, None], 0.0)


def _nucleus(probabilities: Tensor, top_p: Tensor) -> Tensor:
    """Zeros outside the likeliest tokens that together have at least `top_p` [R, 1] of what is left."""
    wanted = top_p * probabilities.sum(-1, keepdim=True)
    narrow = top_p < 1.0
    ordered, order = probabilities.topk(min(FEW, probabilities.shape[-1]))
    if bool((narrow & (ordered.sum(-1, keepdim=True) < wanted)).any()):
        ordered, order = probabilities.sort(descending=True)
    kept = ordered.cumsum(-1) - ordered < wanted
    kept[:, 0] = True  # top_p 0 is greedy
    nucleus = torch.zeros_like(probabilities).scatter(1, order, ordered.where(kept, 0.0))
    return nucleus.where(narrow, probabilities)


def _logps(logits: Tensor, ids: Tensor, choosers: Sequence[Chooser]) -> list[TokenLogp | None]:
    found: list[TokenLogp | None] = [None] * len(choosers)
    asked = [row for row, chooser in enumerate(choosers) if chooser.sampling.logprobs is not None]
    if asked:
        rows = torch.tensor(asked, device=logits.device)
        counts = [choosers[row].sampling.logprobs or 0 for row in asked]
        for row, logp in zip(asked, token_logps(logits[rows], ids[rows], counts), strict=True):
            found[row] = logp
    return found


def token_logps(logits: Tensor, ids: Tensor, counts: Sequence[int]) -> list[TokenLogp]:
    """Log-probabilities of tokens [N] under fp32 logits [N, V], with the `counts[n]` likeliest, all from one tensor."""
    logps = torch.log_softmax(logits, dim=-1)
    own = logps.gather(1, ids[:, None]).squeeze(1).tolist()
    most = min(max(counts, default=0), logits.shape[-1])
    if not most:
        return [TokenLogp(token, logp) for token, logp in zip(ids.tolist(), own, strict=True)]
    values, tokens = (found.tolist() for found in logps.topk(most))
    return [
        TokenLogp(token, logp, tuple(zip(tokens[n][:count], values[n][:count], strict=True)))
        for n, (token, logp, count) in enumerate(zip(ids.tolist(), own, counts, strict=True))
    ]
