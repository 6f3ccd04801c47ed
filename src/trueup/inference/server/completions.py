"""POST /v1/completions: text that goes on, and the log-probabilities of given text (`echo`), as lm-eval reads them."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from trueup.data.examples import Json
from trueup.inference.server.asking import AskCompletion
from trueup.inference.server.chat import DONE, KEEP_ALIVE, LOWEST, event, seeded, usage
from trueup.inference.server.failures import not_answered, refuse
from trueup.inference.server.served import Served
from trueup.inference.server.token_text import TokenText
from trueup.inference.server.under_way import Answers, Whole, reply, while_wanted
from trueup.rollout.engines import TokenLogp

DEFAULT_TOKENS = 16  # OpenAI's


class Completion:
    """One request, checked. Raises ApiError."""

    def __init__(self, served: Served, ask: AskCompletion) -> None:
        self.served, self.ask = served, ask
        self.engine, self.voice = served.voice(ask.model)
        self.given = ask.prompts
        wanted = DEFAULT_TOKENS if ask.max_tokens is None else ask.max_tokens
        self.sampling = served.sampling(ask, max(wanted, 1), ask.logprobs)
        self.head: Json = {
            "id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion", "created": int(time.time()),
            "model": ask.model, "system_fingerprint": served.fingerprint,
        }  # fmt: skip
        self.prompts: list[list[int]] = []

    async def answer(self, request: Request) -> Response:
        """Raises ApiError, before headers."""
        self.prompts = await self.served.in_words(self._prompts)
        seconds = self.served.settings.limits.deadline
        if self.ask.max_tokens == 0:
            return JSONResponse(await while_wanted(request, self._only_echo(), seconds))
        asked = [
            (prompt, seeded(self.sampling, number)) for prompt in self.prompts for number in range(self.ask.n)
        ]  # fmt: skip
        answers = Answers(self.engine, asked, self.voice, seconds)
        return await reply(request, answers, self._events(answers) if self.ask.stream else None, self._whole)

    def _prompts(self) -> list[list[int]]:
        """Token ids: given ones as they are, texts as the tokenizer writes them."""
        tokenizer = self.served.tokenizer
        prompts = [tokenizer(one)["input_ids"] if isinstance(one, str) else one for one in self.given]
        if not all(prompts):
            raise refuse("prompt", "a prompt is empty")
        return prompts

    async def _only_echo(self) -> Json:
        nothing = []
        for _ in range(len(self.prompts) * self.ask.n):
            nothing.append(Whole())
            nothing[-1].finish_reason = "length"
        return await self._response(nothing, 0)

    async def _whole(self, answers: Answers) -> Json:
        whole = await answers.whole()
        return await self._response(whole, answers.completion_tokens)

    async def _response(self, answers: Sequence[Whole], completion_tokens: int) -> Json:
        prompts = [prompt for prompt in self.prompts for _ in range(self.ask.n)]
        echoed = await self._echoed(prompts, answers) if self.ask.echo and self.ask.logprobs is not None else None
        choices = []
        for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            text = (self._text(prompt) if self.ask.echo else "") + answer.text
            logprobs = echoed[index] if echoed else self._logprobs(answer.logps, 0)
            choices.append({"index": index, "text": text, "logprobs": logprobs, "finish_reason": answer.finish_reason})
        return {**self.head, "choices": choices, "usage": usage(sum(map(len, self.prompts)), completion_tokens)}

    async def _echoed(self, prompts: Sequence[list[int]], answers: Sequence[Whole]) -> list[Json]:
        """Of prompt and answer as one sequence, read at once, so that equal tokens have equal numbers."""
        closed = [answer.finish_reason == "stop" for answer in answers]
        # A token that ends an answer is in no piece; readers count on one token being drawn at least.
        rows = [
            [*prompt, *answer.ids, *([self.engine.stop_ids[0]] if ended else [])]
            for prompt, answer, ended in zip(prompts, answers, closed, strict=True)
        ]
        top = max(self.ask.logprobs or 0, 1)
        try:
            scored = await asyncio.to_thread(self.engine.score, rows, top, self.voice)
        except Exception as error:
            raise not_answered(error) from error
        found = []
        for one, ended in zip(scored, closed, strict=True):
            tokens = list(one.tokens)
            if ended and tokens[-1].top[0][0] in self.engine.stop_ids:
                token, logp = tokens[-1].top[0]
                tokens[-1] = TokenLogp(token, logp, tokens[-1].top)
            found.append(self._with_first(one.ids[0], tokens))
        return found

    def _with_first(self, first: int, tokens: Sequence[TokenLogp]) -> Json:
        """The first token has nothing before it that could predict it."""
        text = self.served.tokens.text(first)
        rest = self._logprobs(tokens, len(text))
        assert rest is not None
        return {
            "tokens": [text, *rest["tokens"]],
            "token_logprobs": [None, *rest["token_logprobs"]],
            "top_logprobs": [None, *rest["top_logprobs"]],
            "text_offset": [0, *rest["text_offset"]],
        }

    def _logprobs(self, logps: Sequence[TokenLogp], offset: int) -> Json | None:
        if self.ask.logprobs is None:
            return None
        found: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for one in logps:
            text = self.served.tokens.text(one.id)
            found["tokens"].append(text)
            found["token_logprobs"].append(max(one.logp, LOWEST))
            found["top_logprobs"].append(_top(one, self.ask.logprobs, self.served.tokens))
            found["text_offset"].append(offset)
            offset += len(text)
        return found

    def _text(self, prompt: list[int]) -> str:
        return self.served.tokenizer.decode(prompt, skip_special_tokens=self.ask.skip_special_tokens)

    async def _events(self, answers: Answers) -> AsyncIterator[str]:
        more = {"usage": None} if self.ask.with_usage else {}
        offsets = [0] * len(answers.generations)
        if self.ask.echo:
            for index, generation in enumerate(answers.generations):
                text = self._text(list(generation.prompt_ids))
                choice = {"index": index, "text": text, "logprobs": None, "finish_reason": None}
                yield event({**self.head, "choices": [choice], **more})
        async for found in answers.pieces():
            if found is None:
                yield KEEP_ALIVE
                continue
            index, piece = found
            if not piece.text and not piece.logps and not piece.finish_reason:
                continue
            logprobs = self._logprobs(piece.logps, offsets[index])
            offsets[index] += sum(map(len, logprobs["tokens"])) if logprobs else 0
            choice = {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish_reason}
            yield event({**self.head, "choices": [choice], **more})
        if self.ask.with_usage:
            total = usage(sum(map(len, self.prompts)), answers.completion_tokens)
            yield event({**self.head, "choices": [], "usage": total})
        yield DONE


def _top(one: TokenLogp, count: int, tokens: TokenText) -> Json:
    """The likeliest by their text, and the token itself; where two look alike, the likelier."""
    found: dict[str, float] = {}
    for token, logp in [*one.top[:count], (one.id, one.logp)]:
        text = tokens.text(token)
        found[text] = max(max(logp, LOWEST), found.get(text, LOWEST))
    return found
