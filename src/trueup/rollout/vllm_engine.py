"""The engine's surface over vLLM (extra `vllm`), which batches, pages and shares prefixes by itself."""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trueup.errors import ModelError
from trueup.rollout.generation import EngineClosed, Generation, OnPiece, QueueFull, TooLong, UnknownAdapter
from trueup.rollout.grammar import NoGrammar
from trueup.rollout.sampling import Piece, Sampling, Scored, Stats, TokenLogp

BASE = "base"
MOST_ALTERNATIVES = 20


class VllmEngine:
    """Answers with a vLLM engine in this process, on a thread of its own.

    Args:
        model: directory or hub id of the base.
        adapters: LoRA directories by the names a request may give; vLLM takes one at a time.
        stop_ids: tokens that end an answer beside the model's own.
        options: of vLLM's AsyncEngineArgs (`tensor_parallel_size`, `gpu_memory_utilization`, `max_model_len` …).

    Raises:
        ModelError: vLLM is not installed, or cannot load the model.
    """

    def __init__(
        self, model: str, stop_ids: Sequence[int], adapters: Mapping[str, str | Path] | None = None,
        max_queue: int = 1024, **options: Any,
    ) -> None:  # fmt: skip
        try:
            import vllm
        except ImportError as error:
            raise ModelError(
                "vLLM is not installed", where="infer_backend", expected="a Linux machine with a GPU",
                fix="pip install 'trueup[vllm]', or use the engine on transformers",
            ) from error  # fmt: skip
        self._vllm: Any = vllm
        self.stop_ids, self.max_queue = list(stop_ids), max_queue
        paths = dict(adapters or {})
        if paths:
            options = {"enable_lora": True, "max_loras": len(paths), "max_logprobs": MOST_ALTERNATIVES, **options}
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="trueup-vllm", daemon=True).start()
        self._engine: Any = self._call(self._load(model, options))
        from vllm.lora.request import LoRARequest

        self._adapters = {n: LoRARequest(n, i, str(path)) for i, (n, path) in enumerate(paths.items(), 1)}
        self._open: dict[str, Generation] = {}
        self._requests = self._generated = 0
        self._closed = False

    async def _load(self, model: str, options: dict[str, Any]) -> Any:
        arguments = self._vllm.AsyncEngineArgs(model=model, **options)
        return self._vllm.AsyncLLMEngine.from_engine_args(arguments)

    @property
    def adapters(self) -> tuple[str, ...]:
        return (BASE, *self._adapters) if self._adapters else ()

    @property
    def stats(self) -> Stats:
        """What is under way; how vLLM queues it is its own affair."""
        active = len(self._open)
        free = max(self.max_queue - active, 0)
        return Stats(active, 0, free, 0, 0, self._requests, self._requests - active, self._generated)

    @property
    def context(self) -> int:
        return int(self._engine.model_config.max_model_len)

    def submit(
        self, prompt_ids: Sequence[int], sampling: Sampling, adapter: str | None = None, *,
        on_piece: OnPiece | None = None,
    ) -> Generation:  # fmt: skip
        """Queue a request. Raises as `Engine.submit`."""
        if self._closed:
            raise EngineClosed("the engine is closed")
        if len(self._open) >= self.max_queue:
            raise QueueFull(f"{len(self._open)} requests are under way")
        lora = self._lora(adapter)
        if not len(prompt_ids):
            raise ValueError("the prompt is empty")
        if sampling.grammar is not None:
            raise NoGrammar("vLLM's own server (serve --engine vllm) keeps to grammars; this engine does not")
        if len(prompt_ids) >= self.context:
            raise TooLong(len(prompt_ids), self.context)
        name = f"trueup-{secrets.token_hex(8)}"
        seed = sampling.seed if sampling.seed is not None else secrets.randbits(31)

        def stop() -> None:
            asyncio.run_coroutine_threadsafe(self._engine.abort(name), self._loop)

        generation = Generation([int(token) for token in prompt_ids], sampling, adapter, seed, on_piece, stop)
        self._open[name] = generation
        self._requests += 1
        asyncio.run_coroutine_threadsafe(self._answer(name, generation, lora), self._loop)
        return generation

    def stream(self, prompt: Sequence[int], sampling: Sampling, adapter: str | None = None) -> Iterator[str]:
        """The answer in pieces of text as they come."""
        generation = self.submit(prompt, sampling, adapter)
        try:
            yield from (piece.text for piece in generation if piece.text)
        finally:
            generation.cancel()

    def score(self, sequences: Sequence[Sequence[int]], top: int = 0, adapter: str | None = None) -> list[Scored]:
        """Log-probabilities of each token of whole sequences, by vLLM's prompt_logprobs."""
        lora = self._lora(adapter)

        async def all_of_them() -> list[Scored]:
            return list(await asyncio.gather(*(self._score(list(ids), top, lora) for ids in sequences)))

        return self._call(all_of_them())

    def close(self, drain: bool = True, timeout: float | None = None) -> None:
        """As `Engine.close`."""
        self._closed = True
        under_way = list(self._open.values())
        for generation in under_way:
            if drain:
                generation.wait(timeout)
            generation.cancel()
        self._engine.shutdown()
        self._loop.call_soon_threadsafe(self._loop.stop)

    # --- parts ----------------------------------------------------------------------------------

    def _call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _lora(self, adapter: str | None) -> Any:
        if adapter in (None, BASE):
            return None
        if adapter not in self._adapters:
            raise UnknownAdapter(adapter)
        return self._adapters[adapter]

    def _parameters(self, sampling: Sampling, seed: int) -> Any:
        s = sampling
        return self._vllm.SamplingParams(
            temperature=s.temperature, top_p=s.top_p, top_k=s.top_k, min_p=s.min_p, max_tokens=s.max_new_tokens,
            repetition_penalty=s.repetition_penalty, presence_penalty=s.presence_penalty,
            frequency_penalty=s.frequency_penalty, logit_bias=dict(s.logit_bias) or None, stop=list(s.stop) or None,
            stop_token_ids=[*self.stop_ids, *s.stop_ids], seed=seed, logprobs=s.logprobs,
            skip_special_tokens=s.skip_special_tokens,
            output_kind=self._vllm.sampling_params.RequestOutputKind.DELTA,
        )  # fmt: skip

    async def _answer(self, name: str, generation: Generation, lora: Any) -> None:
        try:
            last = await self._pass_on(name, generation, lora)
        except asyncio.CancelledError:
            last = Piece("", finish_reason="cancelled")
        except Exception as error:
            last = Piece("", finish_reason="error", error=error)
        self._open.pop(name, None)
        self._generated += generation.usage.completion_tokens
        generation.emit(last)

    async def _pass_on(self, name: str, generation: Generation, lora: Any) -> Piece:
        """Pieces but for the last, which is returned."""
        prompt = {"prompt_token_ids": list(generation.prompt_ids)}
        parameters = self._parameters(generation.sampling, generation.seed)
        most = generation.sampling.logprobs or 0
        stops = {*self.stop_ids, *generation.sampling.stop_ids}
        async for output in self._engine.generate(prompt, parameters, name, lora_request=lora):
            said = output.outputs[0]
            ids = tuple(said.token_ids)
            if said.finish_reason == "stop" and ids and (ids[-1] == said.stop_reason or ids[-1] in stops):
                ids = ids[:-1]  # the stop token is in no piece of ours
            logps = tuple(_token(i, at, most) for i, at in zip(ids, said.logprobs or (), strict=False))
            if output.finished:
                reason = "cancelled" if said.finish_reason == "abort" else said.finish_reason or "stop"
                return Piece(said.text, ids, logps, reason)
            generation.emit(Piece(said.text, ids, logps))
        return Piece("", finish_reason="cancelled")

    async def _score(self, ids: list[int], top: int, lora: Any) -> Scored:
        if len(ids) < 2:
            return Scored(tuple(ids), ())
        parameters = self._vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=top)
        name = f"trueup-{secrets.token_hex(8)}"
        found: list[Any] = []
        async for output in self._engine.generate({"prompt_token_ids": ids}, parameters, name, lora_request=lora):
            found = output.prompt_logprobs or found
        return Scored(tuple(ids), tuple(_token(i, at, top) for i, at in zip(ids[1:], found[1:], strict=True)))


def _token(token: int, found: Mapping[int, Any], most: int) -> TokenLogp:
    """A token with its likeliest neighbours; vLLM puts its own beside them where it is not one of them."""
    ranked = sorted(((i, logp.logprob) for i, logp in found.items()), key=lambda pair: -pair[1])
    return TokenLogp(token, found[token].logprob, tuple(ranked[:most]))
