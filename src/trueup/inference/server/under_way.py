"""Answers under way for one request: from the engine's thread to the event loop, in time, and only while wanted."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from trueup.inference.server.failures import ApiError, busy, not_answered, too_late
from trueup.rollout.engines import Engine, Generation, Piece, Sampling, TokenLogp

KEEP_ALIVE_SECONDS = 10.0
GONE = ApiError(499, "the client went away")

Made = TypeVar("Made")


class Answers:
    """Several answers of one request.

    Args:
        asked: a prompt and how to draw, for each.
        seconds: after which it is too late.

    Raises:
        ApiError: the engine does not take them. Then none is under way.
    """

    def __init__(
        self, engine: Engine, asked: Sequence[tuple[Sequence[int], Sampling]], voice: str | None, seconds: float
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self.seconds = seconds
        self._until = time.monotonic() + seconds
        self.generations: list[Generation] = []
        try:
            for index, (ids, sampling) in enumerate(asked):
                on_piece = self._receiver(index)
                self.generations.append(engine.submit(ids, sampling, voice, on_piece=on_piece))
        except Exception as error:
            self.cancel()
            raise not_answered(error) from error

    def cancel(self) -> None:
        """Free their slots. Nothing happens to those that have ended."""
        for generation in self.generations:
            generation.cancel()

    async def pieces(self) -> AsyncIterator[tuple[int, Piece] | None]:
        """(which answer, piece) as they come; None now and then, while none does. Raises ApiError."""
        left = len(self.generations)
        try:
            while left:
                found = await self._next()
                if found is not None and found[1].finish_reason is not None:
                    _check(found[1])
                    left -= 1
                yield found
        finally:
            self.cancel()

    async def whole(self) -> list[Whole]:
        """All of them, when they have ended. Raises ApiError."""
        answers = [Whole() for _ in self.generations]
        async for found in self.pieces():
            if found is not None:
                answers[found[0]].add(found[1])
        return answers

    @property
    def prompt_tokens(self) -> int:
        return sum(generation.usage.prompt_tokens for generation in self.generations)

    @property
    def completion_tokens(self) -> int:
        return sum(generation.usage.completion_tokens for generation in self.generations)

    async def _next(self) -> tuple[int, Piece] | None:
        if not self._pieces.empty():
            return self._pieces.get_nowait()
        left = self._until - time.monotonic()
        if left <= 0:
            raise too_late()
        try:
            return await asyncio.wait_for(self._pieces.get(), min(left, KEEP_ALIVE_SECONDS))
        except TimeoutError:
            return None

    def _receiver(self, index: int) -> Any:
        return lambda piece: self._loop.call_soon_threadsafe(self._pieces.put_nowait, (index, piece))


class Whole:
    """An answer put together from its pieces."""

    def __init__(self) -> None:
        self.text = ""
        self.ids: list[int] = []
        self.logps: list[TokenLogp] = []
        self.finish_reason = "stop"

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.ids += piece.ids
        self.logps += piece.logps
        self.finish_reason = piece.finish_reason or self.finish_reason


class EventStream(StreamingResponse):
    """Server-sent events. However it ends, and even if it never begins, the answers behind it are cancelled."""

    def __init__(self, events: AsyncIterator[str], answers: Answers) -> None:
        super().__init__(_guarded(events), media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._answers = answers

    async def __call__(self, *connection: Any) -> None:
        try:
            await super().__call__(*connection)
        finally:
            self._answers.cancel()


async def reply(
    request: Request,
    answers: Answers,
    events: AsyncIterator[str] | None,
    whole: Callable[[Answers], Coroutine[Any, Any, Any]],
) -> Response:
    """The answers, as `events` or `whole` in one piece; afterwards none is under way. Raises what `whole` raises."""
    if events is not None:
        return EventStream(events, answers)
    try:
        return JSONResponse(await while_wanted(request, whole(answers), answers.seconds))
    finally:
        answers.cancel()


async def while_wanted(request: Request, work: Coroutine[Any, Any, Made], seconds: float) -> Made:
    """The result of `work`, which is cancelled when the client goes away or it is too late. Raises what it raises."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise GONE if gone.done() else too_late()
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _guarded(events: AsyncIterator[str]) -> AsyncIterator[str]:
    """Headers are out: what fails now is an event, and the last."""
    try:
        async for event in events:
            yield event
    except ApiError as error:
        yield f"data: {json.dumps(error.body)}\n\n"


def _check(piece: Piece) -> None:
    if piece.finish_reason == "cancelled":
        raise busy("the server ended before the answer did")
    if piece.error is not None:
        raise not_answered(piece.error)
