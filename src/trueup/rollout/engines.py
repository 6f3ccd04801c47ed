"""The engine: token prompts in, token answers out, on transformers' models.

One small surface, so that a continuous-batching engine or vLLM can take its place without its callers noticing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    TextIteratorStreamer,
)

from trueup.models.policy import Policy
from trueup.rollout.sampler import Choice, Sampled, sample_batch


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; `temperature` 0 is greedy."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 512

    def to_transformers(self, pad_token_id: int, stop_ids: Sequence[int]) -> GenerationConfig:
        greedy = self.temperature == 0.0
        chosen = {} if greedy else {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return GenerationConfig(
            do_sample=not greedy, max_new_tokens=self.max_new_tokens, repetition_penalty=self.repetition_penalty,
            pad_token_id=pad_token_id, eos_token_id=list(stop_ids), **chosen,
        )  # fmt: skip


class Engine:
    """Generates with one policy.

    Args:
        stop_ids: tokens that end an answer; they are not part of it.
    """

    def __init__(self, policy: Policy, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> None:
        self.policy = policy
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
                    generation_config=sampling.to_transformers(self.pad_id, self.stop_ids),
                )  # fmt: skip
                for row, i in enumerate(group):
                    answers[i] = self._until_stop(output[row, width:].tolist())
        return answers

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
                        generation_config=sampling.to_transformers(self.pad_id, self.stop_ids),
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

    def _until_stop(self, ids: list[int]) -> list[int]:
        for position, token in enumerate(ids):
            if token in self.stop_ids:
                return ids[:position]
        return ids


class _Closed(StoppingCriteria):
    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids, scores, **_) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)
