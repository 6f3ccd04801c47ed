"""The engine's surface over an OpenAI-compatible endpoint: what answers is somewhere else."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from trueup.rollout.endpoint import Endpoint, Unanswered
from trueup.rollout.generation import EngineClosed, Generation, OnPiece, QueueFull, UnknownAdapter
from trueup.rollout.grammar import NoGrammar
from trueup.rollout.sampling import Piece, Sampling, Scored, Stats, TokenLogp

FINISH = {"length": "length"}  # everything else is an end of the model's own


class EndpointEngine:
    """Answers by way of a URL. Pieces have text, and token ids only where the endpoint gives them.

    Token prompts go to `/completions`, which takes ids; conversations to `/chat/completions`.

    Args:
        adapters: other models behind the same URL, by the names a request may give.
        at_once, max_queue: requests under way, and waiting for that.
    """

    def __init__(
        self, endpoint: Endpoint, adapters: Sequence[str] = (), at_once: int = 16, max_queue: int = 256
    ) -> None:
        self.endpoint, self.adapters = endpoint, tuple(adapters)
        self.at_once, self.max_queue = at_once, max_queue
        self._pool = ThreadPoolExecutor(at_once, thread_name_prefix="trueup-endpoint")
        self._lock = threading.Lock()
        self._open: set[Generation] = set()
        self._requests = self._generated = 0
        self._closed = False

    @property
    def stats(self) -> Stats:
        with self._lock:
            open_ = len(self._open)
            active = min(open_, self.at_once)
            done = self._requests - open_
            return Stats(
                active, open_ - active, self.at_once - active, 0, 0, self._requests, done, self._generated
            )  # fmt: skip

    def submit(
        self, prompt_ids: Sequence[int], sampling: Sampling, adapter: str | None = None, *,
        on_piece: OnPiece | None = None,
    ) -> Generation:  # fmt: skip
        """Queue a request. Raises QueueFull, EngineClosed, UnknownAdapter, ValueError (an empty prompt)."""
        if not len(prompt_ids):
            raise ValueError("the prompt is empty")
        generation = self._generation(prompt_ids, sampling, adapter, on_piece)
        fields = {"prompt": list(generation.prompt_ids), **_fields(sampling)}
        return self._start(generation, "/completions", fields)

    def chat(
        self, messages: Sequence[Mapping[str, Any]], sampling: Sampling, adapter: str | None = None, *,
        on_piece: OnPiece | None = None, **fields: Any,
    ) -> Generation:  # fmt: skip
        """As `submit`, for a conversation; further fields go into the request."""
        generation = self._generation((), sampling, adapter, on_piece)
        fields = {"messages": list(messages), **_fields(sampling), **fields}
        return self._start(generation, "/chat/completions", fields)

    def stream(self, prompt: Sequence[int], sampling: Sampling, adapter: str | None = None) -> Iterator[str]:
        """The answer in pieces of text as they come."""
        generation = self.submit(prompt, sampling, adapter)
        try:
            yield from (piece.text for piece in generation if piece.text)
        finally:
            generation.cancel()

    def score(self, sequences: Sequence[Sequence[int]], top: int = 0, adapter: str | None = None) -> list[Scored]:
        """Log-probabilities of each token of whole sequences, from an endpoint whose completions echo.

        Raises:
            ValueError: `top`: alternatives come as text, which does not say which tokens they are.
            Unanswered: the endpoint does not echo, or gives no log-probabilities.
        """
        if top:
            raise ValueError("an endpoint names alternatives by their text, not by their tokens")
        return [self._score(list(ids), adapter) for ids in sequences]

    def close(self, drain: bool = True, timeout: float | None = None) -> None:
        """Take no more requests; end those under way, or with `drain` let them end, at most `timeout` seconds."""
        self._closed = True
        with self._lock:
            under_way = list(self._open)
        for generation in under_way if drain else ():
            generation.wait(timeout)
        for generation in under_way:
            generation.cancel()
        self._pool.shutdown(wait=False)

    # --- parts ----------------------------------------------------------------------------------

    def _generation(
        self, prompt_ids: Sequence[int], sampling: Sampling, adapter: str | None, on_piece: OnPiece | None
    ) -> Generation:
        if adapter is not None and adapter not in self.adapters:
            raise UnknownAdapter(adapter)
        if sampling.grammar is not None:
            raise NoGrammar("an endpoint is told by fields of its own (`chat`: response_format)")
        seed = sampling.seed if sampling.seed is not None else secrets.randbits(31)
        return Generation([int(token) for token in prompt_ids], sampling, adapter, seed, on_piece)

    def _start(self, generation: Generation, path: str, fields: dict[str, Any]) -> Generation:
        with self._lock:
            if self._closed:
                raise EngineClosed("the engine is closed")
            if len(self._open) >= self.at_once + self.max_queue:
                raise QueueFull(f"{len(self._open) - self.at_once} requests are waiting")
            self._open.add(generation)
            self._requests += 1
        fields |= {"model": generation.adapter or self.endpoint.model, "seed": generation.seed}
        self._pool.submit(self._answer, generation, path, fields)
        return generation

    def _answer(self, generation: Generation, path: str, fields: dict[str, Any]) -> None:
        reason: Any = None
        try:
            if not generation.cancelled:
                reason = self._pass_on(generation, path, fields)
            if reason is None and not generation.cancelled:
                raise Unanswered("the reply has no end")
            last = Piece("", finish_reason=reason if reason and not generation.cancelled else "cancelled")
        except Exception as error:
            last = Piece("", finish_reason="error", error=error)
        with self._lock:
            self._open.discard(generation)
            self._generated += generation.usage.completion_tokens
        generation.emit(last)

    def _pass_on(self, generation: Generation, path: str, fields: dict[str, Any]) -> str | None:
        """Pieces as they come; the reason it ended, None when cancelled."""
        reason = None
        for event in self.endpoint.events(path, fields):
            if generation.cancelled:
                return None  # which closes the connection: the server hears of it
            if usage := event.get("usage"):
                generation.count(int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))
            for choice in event.get("choices") or ():
                text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
                ids = tuple(choice.get("token_ids") or ())
                if text or ids:
                    generation.emit(Piece(text, ids))
                if ended := choice.get("finish_reason"):
                    reason = FINISH.get(ended, "stop")
        return reason

    def _score(self, ids: list[int], adapter: str | None) -> Scored:
        fields = {"prompt": ids, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
        fields["model"] = adapter or self.endpoint.model
        logps: list[float | None] = []
        for event in self.endpoint.events("/completions", fields):
            for choice in event.get("choices") or ():
                logps += (choice.get("logprobs") or {}).get("token_logprobs") or ()
        if len(logps) < len(ids) or any(logp is None for logp in logps[1 : len(ids)]):
            raise Unanswered("the endpoint's completions do not echo the prompt's log-probabilities")
        pairs = zip(ids[1:], logps[1 : len(ids)], strict=True)
        return Scored(tuple(ids), tuple(TokenLogp(token, float(logp or 0.0)) for token, logp in pairs))


def _fields(sampling: Sampling) -> dict[str, Any]:
    """The request's fields; what OpenAI's own API does not know is sent where it is used."""
    s = sampling
    fields: dict[str, Any] = {
        "temperature": s.temperature, "top_p": s.top_p, "max_tokens": s.max_new_tokens,
        "presence_penalty": s.presence_penalty, "frequency_penalty": s.frequency_penalty,
        "stop": list(s.stop) or None, "stream_options": {"include_usage": True},
        "logit_bias": {str(token): bias for token, bias in s.logit_bias.items()} or None,
    }  # fmt: skip
    extra = {
        "top_k": (s.top_k, 0), "min_p": (s.min_p, 0.0), "repetition_penalty": (s.repetition_penalty, 1.0),
        "stop_token_ids": (list(s.stop_ids), []), "skip_special_tokens": (s.skip_special_tokens, True),
    }  # fmt: skip
    if s.logprobs is not None:
        raise ValueError("an endpoint names alternatives by their text: ask it for log-probabilities directly")
    return fields | {name: value for name, (value, unused) in extra.items() if value != unused}
