"""The engine: token prompts in, token answers out, on transformers' models. All generation goes through it.

Requests join the answers under way between two steps and leave when they end (`rounds.py`, `batching.py`); rollouts
for training are drawn in whole batches (`sampler.py`). The same surface over vLLM: `vllm_engine.py`; over a URL:
`endpoint_engine.py`.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from trueup.models.device_memory import free_memory
from trueup.models.policy import Policy
from trueup.models.rope import context_of
from trueup.models.voices import BASE, Voices
from trueup.rollout.batching import Row
from trueup.rollout.cache import bytes_per_token, takes_rows
from trueup.rollout.generation import (
    EngineClosed,
    Generates,
    Generation,
    OnPiece,
    QueueFull,
    TooLong,
    UnknownAdapter,
)
from trueup.rollout.grammar import Grammar, Grammars
from trueup.rollout.rounds import Limits, Rounds, Turns, Worker
from trueup.rollout.sampler import Choice, Sampled, sample_batch
from trueup.rollout.sampling import Answer, Piece, Sampling, Scored, Stats, TokenLogp, Usage
from trueup.rollout.scorer import score_rows
from trueup.rollout.text_stream import Decode, TextStream, decoder

__all__ = [
    "BASE", "Answer", "Engine", "EngineClosed", "Generates", "Generation", "Limits", "Piece", "QueueFull", "Sampling",
    "Scored", "Stats", "TokenLogp", "TooLong", "UnknownAdapter", "Usage",
]  # fmt: skip

SHARE = 1 / 4  # of the free memory, for keys and values
SCORED_TOGETHER = 4096  # tokens that go through the model at once when sequences are scored


class Engine:
    """Generates with one policy; requests from any thread are answered together.

    Its thread starts with a request and ends some seconds after the last; without requests it does not touch the
    model, so what trains a policy may generate with it in between.

    Args:
        stop_ids: tokens that end an answer; they are not part of it.

    Attributes:
        context: tokens that prompt and answer together may have.
    """

    def __init__(
        self, policy: Policy, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], limits: Limits | None = None
    ) -> None:
        self.policy = policy
        self.tokenizer = tokenizer
        self.stop_ids = list(stop_ids)
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.stop_ids[0]
        self.limits = limits or Limits()
        config = policy.base.config
        self._alone = not takes_rows(config)
        longest = context_of(config, sys.maxsize)
        self._places = self._cache_places(longest)
        self.context: int = min(longest, self._places)
        self._vocabulary = policy.base.get_input_embeddings().weight.shape[0]
        self._grammars = Grammars(tokenizer, self._vocabulary, self.stop_ids)
        self._turns = Turns()
        self._voices = Voices(policy)
        self._worker = Worker(self._rounds(self.limits, self._places), self._turns)

    # --- requests -----------------------------------------------------------------------------

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names a request may give: `BASE` where there are adapters to switch off, and those of `attach`."""
        return self._voices.names

    @property
    def stats(self) -> Stats:
        """Slots, queue and cache as they are now."""
        return self._worker.rounds.stats

    def attach(self, name: str, directories: Sequence[str | Path]) -> None:
        """Load adapters that act in sum, alone on the base, for requests that name them.

        Raises:
            ModelError: they do not fit the base. ConfigError: the name is in use.
        """
        with self._turns:
            self._voices.add(name, directories)

    def submit(
        self, prompt_ids: Sequence[int], sampling: Sampling, adapter: str | None = None, *,
        on_piece: OnPiece | None = None,
    ) -> Generation:  # fmt: skip
        """Queue a request. Returns at once.

        Args:
            adapter: None: the policy as it was loaded, with the adapters acting on it; or one of `adapters`.
            on_piece: is called with every piece, on the engine's thread; nothing is to be iterated then.

        Raises:
            QueueFull, EngineClosed, UnknownAdapter. TooLong: no room for an answer. ValueError: an empty prompt, or
            ids that the model does not know.
        """
        row = self._row(prompt_ids, sampling, adapter, on_piece)
        self._worker.submit(row)
        return row.generation

    def compile(self, grammar: str) -> Grammar:
        """For `Sampling.grammar`, of a text of `json_grammar`; takes a moment the first time. Raises NoGrammar."""
        return self._grammars.compile(grammar)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Requests submitted in here begin after it, all at once: the same ones then share the same steps, and repeat
        the bits, where nothing else is asked meanwhile.
        """
        with self._turns:
            yield

    def stream(self, prompt: Sequence[int], sampling: Sampling, adapter: str | None = None) -> Iterator[str]:
        """The answer in pieces of text as they come. Closing the iterator stops the generation. Raises as `submit`."""
        generation = self.submit(prompt, sampling, adapter)
        try:
            for piece in generation:
                if piece.text:
                    yield piece.text
        finally:
            generation.cancel()
            generation.wait()

    def score(self, sequences: Sequence[Sequence[int]], top: int = 0, adapter: str | None = None) -> list[Scored]:
        """Log-probabilities of each token of whole sequences, with the `top` likeliest; waits for its turn.

        Sequences go through together where they are short; other requests go on in between.

        Raises: UnknownAdapter, ValueError. TooLong: a sequence beyond the model's context.
        """
        for ids in sequences:
            self._check(ids, adapter)
            if len(ids) > self.context:
                raise TooLong(len(ids), self.context + 1)
        found: list[Scored | None] = [None] * len(sequences)
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        while order:
            longest = len(sequences[order[-1]])
            group = order[-max(1, 1 if self._alone else SCORED_TOGETHER // longest) :]
            del order[-len(group) :]
            with self._turns, torch.inference_mode(), self.policy.generating() as model:
                self._voices.use(adapter)
                try:
                    scored = score_rows(model, self.policy.head, [sequences[i] for i in group], top)
                finally:
                    self._voices.rest()
            for i, one in zip(group, scored, strict=True):
                found[i] = one
        return [one for one in found if one is not None]

    def close(self, drain: bool = True, timeout: float | None = None) -> None:
        """Take no more requests; end those under way, or with `drain` let them end, at most `timeout` seconds."""
        self._worker.close(drain, timeout)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close(drain=False)

    # --- many at once, for those who wait for them ----------------------------------------------

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, batch_size: int = 32) -> list[list[int]]:
        """Answers to token prompts, in order, without stop tokens; `batch_size` at a time, on the caller's thread.

        Without a seed in `sampling`, torch's global generator decides.
        """
        if not prompts:
            return []
        seeds = torch.randint(2**62, (len(prompts),)).tolist() if sampling.seed is None else [None] * len(prompts)
        rounds = self._rounds(Limits(max_slots=batch_size), sys.maxsize)
        rows = [self._row(p, sampling, None, None, seed, text=False) for p, seed in zip(prompts, seeds, strict=True)]
        for row in sorted(rows, key=lambda row: len(row.prompt)):
            rounds.add(row)
        rounds.run(self._turns)
        return [list(row.generation.result().ids) for row in rows]

    def generate_text(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[str]:
        """As `generate`, decoded."""
        return [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in self.generate(prompts, sampling)]

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        num_answers: int = 1,
        seed: int | Sequence[int] = 0,
    ) -> list[list[Sampled]]:
        """`num_answers` answers to each prompt, all decoded together, for those who learn from them.

        With their stop tokens and log-probabilities. The same policy, prompts and seed give the same answers; with a
        seed for each answer they are, up to rounding, the same in any batch, and what `submit` draws with that seed.
        Penalties, bias, `min_p` and stop texts are not taken: such answers are not the model's own.
        """
        assert not (sampling.penalises or sampling.min_p or sampling.stop or sampling.grammar)
        choice = Choice(sampling.temperature, sampling.top_p, sampling.top_k)
        with self._turns, self.policy.generating() as model:
            return sample_batch(
                model, prompts, num_answers, choice, max_new_tokens=sampling.max_new_tokens,
                stop_ids=self.stop_ids, pad_id=self.pad_id, seed=seed,
            )  # fmt: skip

    def until_stop(self, ids: list[int]) -> list[int]:
        """An answer's tokens before the first that ends it."""
        for position, token in enumerate(ids):
            if token in self.stop_ids:
                return ids[:position]
        return ids

    # --- parts ----------------------------------------------------------------------------------

    def _row(
        self, prompt_ids: Sequence[int], sampling: Sampling, adapter: str | None, on_piece: OnPiece | None,
        seed: int | None = None, text: bool = True,
    ) -> Row:  # fmt: skip
        """A request that can be answered. Raises as `submit`."""
        self._check(prompt_ids, adapter)
        if len(prompt_ids) >= self.context:
            raise TooLong(len(prompt_ids), self.context)
        if unknown := [token for token in sampling.logit_bias if not 0 <= token < self._vocabulary]:
            raise ValueError(f"logit_bias: the model has no token {unknown[0]}")
        seed = next(s for s in (sampling.seed, seed, secrets.randbits(62)) if s is not None)
        generation = Generation([int(token) for token in prompt_ids], sampling, adapter, seed, on_piece)
        limit = min(sampling.max_new_tokens, self.context - len(prompt_ids))
        stops = frozenset((*self.stop_ids, *sampling.stop_ids))
        stream = TextStream(self._decode(sampling), sampling.stop) if text or sampling.stop else None
        return Row(generation, stops, limit, stream)

    def _decode(self, sampling: Sampling) -> Decode:
        return decoder(self.tokenizer, sampling.skip_special_tokens)

    def _check(self, ids: Sequence[int], adapter: str | None) -> None:
        if adapter not in self._voices:
            raise UnknownAdapter(adapter)
        if not len(ids):
            raise ValueError("the prompt is empty")
        if min(ids) < 0 or max(ids) >= self._vocabulary:
            raise ValueError(f"a token id outside the model's vocabulary of {self._vocabulary:,}")

    def _rounds(self, limits: Limits, places: int) -> Rounds:
        return Rounds(self.policy, self._voices, limits, places, self._alone, self.pad_id)

    def _cache_places(self, longest: int) -> int:
        """Places of the cache: what the limits say, or a share of the free memory, as far as slots can use it."""
        if self.limits.max_tokens is not None:
            return self.limits.max_tokens
        free = SHARE * free_memory(self.policy.device)
        places = int(free / bytes_per_token(self.policy.base.config, self.policy.dtype))
        return max(min(places, self.limits.max_slots * longest), 1)
