"""POST /v1/chat/completions."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

from fastapi import Request, Response

from trueup.data.examples import Json
from trueup.inference.server.asking import AskChat
from trueup.inference.server.failures import refuse
from trueup.inference.server.served import Served
from trueup.inference.server.structure import structure_of
from trueup.inference.server.token_text import TokenText
from trueup.inference.server.tool_calls import CallReader, Spoken
from trueup.inference.server.turns import conversation, tools_of
from trueup.inference.server.under_way import Answers, reply
from trueup.rollout.engines import TokenLogp

LOWEST = -9999.0  # OpenAI's stand-in for what JSON cannot say
DONE = "data: [DONE]\n\n"
KEEP_ALIVE = ": still here\n\n"


class Chat:
    """One request, checked: everything that can be refused is refused while it is made.

    Raises:
        ApiError
    """

    def __init__(self, served: Served, ask: AskChat) -> None:
        self.served, self.ask = served, ask
        self.engine, self.voice = served.voice(ask.model)
        self.messages = conversation(ask.messages)
        self.tools = tools_of([] if ask.tool_choice == "none" else ask.tools)
        if self.tools and served.family is None:
            message = f"the chat template ({served.template.name}) has no calls of tools that are read here"
            raise refuse("tools", message, "unsupported_parameter")
        logprobs = (ask.top_logprobs or 0) if ask.logprobs else None
        self.grammar, self.bound_by = structure_of(ask, self.tools or [], served.family)
        most = ask.max_completion_tokens or ask.max_tokens
        self.sampling = served.sampling(ask, most, logprobs)
        self.head: Json = {
            "id": f"chatcmpl-{secrets.token_hex(12)}", "object": "chat.completion", "created": int(time.time()),
            "model": ask.model, "system_fingerprint": served.fingerprint,
        }  # fmt: skip
        self.prompt_tokens = 0

    async def answer(self, request: Request) -> Response:
        """Raises ApiError, before headers."""
        prompt = await self.served.prompt_ids(self.messages, self.tools)
        if self.grammar:
            self.sampling = replace(self.sampling, grammar=await self.served.grammar(self.grammar, self.bound_by))
        self.prompt_tokens = len(prompt)
        asked = [(prompt, seeded(self.sampling, number)) for number in range(self.ask.n)]
        answers = Answers(self.engine, asked, self.voice, self.served.settings.limits.deadline)
        return await reply(request, answers, self._events(answers) if self.ask.stream else None, self._whole)

    async def _whole(self, answers: Answers) -> Json:
        choices = []
        for index, answer in enumerate(await answers.whole()):
            spoken = Spoken(answer.text, [])
            if reader := self._reader():
                said = reader.push(answer.text)
                spoken = reader.finish()
                spoken = replace(spoken, content=(said + (spoken.content or "")) or (None if spoken.calls else ""))
            message: Json = {"role": "assistant", "content": spoken.content, "refusal": None}
            if spoken.calls:
                message["tool_calls"] = spoken.calls
            reason = "tool_calls" if spoken.calls else answer.finish_reason
            logprobs = self._logprobs(answer.logps)
            choices.append({"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason})
        return {**self.head, "choices": choices, "usage": self._usage(answers)}

    async def _events(self, answers: Answers) -> AsyncIterator[str]:
        self.head["object"] = "chat.completion.chunk"
        readers = [self._reader() for _ in answers.generations]
        for index in range(len(readers)):
            yield self._event(index, {"role": "assistant", "content": "", "refusal": None})
        async for found in answers.pieces():
            if found is None:
                yield KEEP_ALIVE
                continue
            index, piece = found
            reader, reason = readers[index], piece.finish_reason
            text = reader.push(piece.text) if reader else piece.text
            calls: list[Json] = []
            if reason and reader:
                spoken = reader.finish()
                text, calls = text + (spoken.content or ""), spoken.calls
            if text or piece.logps:
                yield self._event(index, {"content": text}, self._logprobs(piece.logps))
            for number, call in enumerate(calls):
                yield self._event(index, {"tool_calls": [{"index": number, **call}]})
            if reason:
                yield self._event(index, {}, reason="tool_calls" if calls else reason)
        if self.ask.with_usage:
            yield event({**self.head, "choices": [], "usage": self._usage(answers)})
        yield DONE

    def _event(self, index: int, delta: Json, logprobs: Json | None = None, reason: str | None = None) -> str:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        more = {"usage": None} if self.ask.with_usage else {}
        return event({**self.head, "choices": [choice], **more})

    def _reader(self) -> CallReader | None:
        if not self.tools or self.served.family is None:
            return None
        most = None if self.ask.parallel_tool_calls else 1
        return CallReader(self.served.family, most, only_calls=self.bound_by == "tool_choice")

    def _usage(self, answers: Answers) -> Json:
        return usage(self.prompt_tokens, answers.completion_tokens)

    def _logprobs(self, logps: Sequence[TokenLogp]) -> Json | None:
        if not self.ask.logprobs:
            return None
        tokens = self.served.tokens
        return {"content": [_with_top(one, tokens) for one in logps], "refusal": None}


def seeded(sampling: Any, number: int) -> Any:
    """The same, for the choice of this number: a seed gives different ones."""
    return sampling if sampling.seed is None or not number else replace(sampling, seed=sampling.seed + number)


def usage(prompt: int, completion: int) -> Json:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def event(chunk: Json) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _with_top(one: TokenLogp, tokens: TokenText) -> Json:
    top = [_token(token, logp, tokens) for token, logp in one.top]
    return {**_token(one.id, one.logp, tokens), "top_logprobs": top}


def _token(token: int, logp: float, tokens: TokenText) -> Json:
    return {"token": tokens.text(token), "logprob": max(logp, LOWEST), "bytes": tokens.raw(token)}
