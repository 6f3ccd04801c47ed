"""The engine: token prompts in, token answers out, on transformers' models.

One small surface, so that a continuous-batching engine or vLLM can take its place without its callers noticing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    TextIteratorStreamer,
)

from trueup.models.policy import Policy
from trueup.rollout.generation import (
    EngineClosed,
    Generates,
    Generation,
    OnPiece,
    QueueFull,
    TooLong,
    UnknownAdapter,
)
from trueup.rollout.sampler import Choice, Sampled, sample_batch
from trueup.rollout.sampling import Answer, Piece, Sampling, Scored, Stats, TokenLogp, Usage

__all__ = [
    "BASE", "Answer", "Engine", "EngineClosed", "Generates", "Generation", "Limits", "Piece", "QueueFull", "Sampling",
    "Scored", "Stats", "TokenLogp", "TooLong", "UnknownAdapter", "Usage",
]  # fmt: skip

BASE = "base"  # the name under which a policy speaks without its adapters


def _to_transformers(sampling: Sampling, pad_token_id: int, stop_ids: Sequence[int]) -> GenerationConfig:
    greedy = sampling.temperature == 0.0
    chosen = {}
    if not greedy:
        chosen = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    return GenerationConfig(
        do_sample=not greedy, max_new_tokens=sampling.max_new_tokens, repetition_penalty=sampling.repetition_penalty,
        pad_token_id=pad_token_id, eos_token_id=list(stop_ids), **chosen,
    )  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """What an engine takes on at the same time.

    Attributes:
        max_slots: answers under way.
        max_queue: requests waiting for a slot; beyond it `submit` raises QueueFull.
        max_tokens: places in the cache of keys and values, padding included; None: what a quarter of the free memory
            holds. An answer is only begun when it can be ended within them.
        prefill_tokens: tokens of prompts that go through the model between two steps of the answers under way.
    """

    max_slots: int = 32
    max_queue: int = 256
    max_tokens: int | None = None
    prefill_tokens: int = 1024


class Engine:
    """Generates with one policy; requests from any thread are answered together.

    Args:
        stop_ids: tokens that end an answer; they are not part of it.

    Its thread starts with the first request and ends with `close`; without requests it does not touch the model, so
    what trains a policy may generate with it in between.
    """

    def __init__(
        self, policy: Policy, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], limits: Limits | None = None
    ) -> None:
        self.policy = policy
        self.limits = limits or Limits()
        self.tokenizer = tokenizer
        self.stop_ids = list(stop_ids)
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.stop_ids[0]

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, batch_size: int = 32) -> list[list[int]]:
        """Answers to token prompts, in order, without stop tokens; left-padded in batches of similar length."""
        answers: list[list[int]] = [[] for _ in prompts]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        with self.policy.generating() as model:
            for start in range(0, len(order), batch_size):
                group = order[start : start + batch_size]
                width = max(len(prompts[i]) for i in group)
                ids = torch.full((len(group), width), self.pad_id)
                mask = torch.zeros_like(ids)
                for row, i in enumerate(group):
                    ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
                    mask[row, width - len(prompts[i]) :] = 1
                output = model.generate(
                    input_ids=ids.to(model.device), attention_mask=mask.to(model.device),
                    generation_config=_to_transformers(sampling, self.pad_id, self.stop_ids),
                )  # fmt: skip
                for row, i in enumerate(group):
                    answers[i] = self.until_stop(output[row, width:].tolist())
        return answers

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names a request may give: `BASE` where adapters can be switched off, and those of `attach`."""
        raise NotImplementedError

    @property
    def stats(self) -> Stats:
        """Slots, queue and cache as they are now."""
        raise NotImplementedError

    @property
    def context(self) -> int:
        """Tokens of prompt and answer together that the model and `limits` take."""
        raise NotImplementedError

    def attach(self, name: str, directories: Sequence[str | Path]) -> None:
        """Load adapters that act in sum for requests that name them; the base must be a model of its own.

        Raises:
            ModelError: they do not fit the base.
        """
        raise NotImplementedError

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
            what `Sampling` does not allow.
        """
        raise NotImplementedError

    def score(self, sequences: Sequence[Sequence[int]], top: int = 0, adapter: str | None = None) -> list[Scored]:
        """Log-probabilities of each token of whole sequences, with the `top` likeliest; waits for its turn.

        Raises: as `submit`, but for QueueFull. TooLong: a sequence beyond the model's context.
        """
        raise NotImplementedError

    def close(self, drain: bool = True, timeout: float | None = None) -> None:
        """Take no more requests; end those under way, or with `drain` let them end, at most `timeout` seconds."""

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close(drain=False)

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
        seed for each answer they are, up to rounding, the same in any batch.
        `repetition_penalty` is not taken: such answers are not the model's own.
        """
        assert sampling.repetition_penalty == 1.0
        choice = Choice(sampling.temperature, sampling.top_p, sampling.top_k)
        with self.policy.generating() as model:
            return sample_batch(
                model, prompts, num_answers, choice, max_new_tokens=sampling.max_new_tokens,
                stop_ids=self.stop_ids, pad_id=self.pad_id, seed=seed,
            )  # fmt: skip

    def stream(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[str]:
        """The answer in pieces of text as they come. Closing the iterator stops the generation."""
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        closed = threading.Event()
        failure: list[BaseException] = []
        ids = torch.tensor([list(prompt)], device=self.policy.device)

        def work() -> None:
            try:
                with torch.inference_mode(), self.policy.generating() as model:
                    model.generate(
                        input_ids=ids, attention_mask=torch.ones_like(ids), streamer=streamer,
                        generation_config=_to_transformers(sampling, self.pad_id, self.stop_ids),
                        stopping_criteria=[_Closed(closed)],
                    )  # fmt: skip
            except BaseException as error:  # handed to the reader, who would otherwise wait for ever
                failure.append(error)
                streamer.end()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:
            closed.set()
            thread.join()
        if failure:
            raise failure[0]

    def until_stop(self, ids: list[int]) -> list[int]:
        """An answer's tokens before the first that ends it."""
        for position, token in enumerate(ids):
            if token in self.stop_ids:
                return ids[:position]
        return ids


class _Closed(StoppingCriteria):
    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids, scores, **_) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)
