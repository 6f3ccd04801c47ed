"""A request under way: what the asker holds while an engine answers, and what every engine can be asked."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from trueup.rollout.sampling import Answer, Piece, Sampling, Scored, Stats, TokenLogp, Usage

OnPiece = Callable[[Piece], None]


class QueueFull(Exception):
    """The engine has as many requests waiting as it takes; ask again later."""


class TooLong(ValueError):
    """A prompt that leaves no room for an answer, in the model's context or the engine's memory."""

    def __init__(self, tokens: int, most: int) -> None:
        super().__init__(f"the prompt has {tokens:,} tokens; at most {most - 1:,} leave room for an answer")
        self.tokens, self.most = tokens, most


class UnknownAdapter(KeyError):
    """There is no adapter of that name; `args[0]` is the name."""


class EngineClosed(RuntimeError):
    """The engine takes no more requests, or was closed before it had answered."""


class Generates(Protocol):
    """What every engine offers: on transformers, on vLLM, behind a URL. All of it from any thread."""

    @property
    def adapters(self) -> tuple[str, ...]: ...
    @property
    def stats(self) -> Stats: ...
    def submit(
        self, prompt_ids: Sequence[int], sampling: Sampling, adapter: str | None = None, *,
        on_piece: OnPiece | None = None,
    ) -> Generation: ...  # fmt: skip
    def score(self, sequences: Sequence[Sequence[int]], top: int = 0, adapter: str | None = None) -> list[Scored]: ...
    def close(self, drain: bool = True, timeout: float | None = None) -> None: ...


class Generation:
    """An answer under way. Iterate over it for its pieces, or wait for `result()`.

    Made by an engine's `submit`. Pieces go to one reader: to `on_piece` where it was given (on the engine's thread: it
    has to be quick, e.g. `loop.call_soon_threadsafe(queue.put_nowait, piece)`), else to whoever iterates.

    Attributes:
        prompt_ids, sampling, adapter: the request; `sampling.seed` as the asker gave it.
        seed: the one drawn with.
        usage: tokens so far.
        submitted, started, first, ended: `time.monotonic()` of being queued, of its prompt's going through the model,
            of its first token, of its end; None until then.
    """

    def __init__(
        self, prompt_ids: Sequence[int], sampling: Sampling, adapter: str | None, seed: int,
        on_piece: OnPiece | None = None, on_cancel: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.prompt_ids, self.sampling, self.adapter, self.seed = tuple(prompt_ids), sampling, adapter, seed
        self.submitted = time.monotonic()
        self.started: float | None = None
        self.first: float | None = None
        self.ended: float | None = None
        self.finish_reason: str | None = None
        self._on_piece, self._on_cancel = on_piece, on_cancel
        self._cancelled = threading.Event()
        self._done = threading.Event()
        self._pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        self._read_out = False
        self._prompt_tokens = len(self.prompt_ids)
        self._completion_tokens = 0

    # --- for the asker ----------------------------------------------------------------------

    def __iter__(self) -> Iterator[Piece]:
        """Pieces until the last. Leaving the loop early does not cancel: `cancel` does. Raises what ended it."""
        while True:
            piece = self.next_piece()
            yield piece
            if piece.finish_reason:
                return

    def next_piece(self, timeout: float | None = None) -> Piece:
        """The next piece.

        Raises:
            TimeoutError: none came within so many seconds. EOFError: the last has been read, or pieces go to
            `on_piece`. Whatever went wrong in the engine.
        """
        if self._read_out or self._on_piece is not None:
            raise EOFError("there is nothing to read, or nothing more")
        try:
            piece = self._pieces.get(timeout=timeout)
        except queue.Empty:
            raise TimeoutError(f"no more of the answer within {timeout:g} s") from None
        self._read_out = piece.finish_reason is not None
        if piece.error is not None:
            raise piece.error
        return piece

    def result(self, timeout: float | None = None) -> Answer:
        """The whole answer, or what there is of a cancelled one. Raises as `next_piece`, for all pieces together."""
        deadline = None if timeout is None else time.monotonic() + timeout
        text, ids, logps = "", list[int](), list[TokenLogp]()
        while True:
            piece = self.next_piece(None if deadline is None else max(deadline - time.monotonic(), 0.0))
            text += piece.text
            ids += piece.ids
            logps += piece.logps
            if piece.finish_reason:
                return Answer(text, tuple(ids), tuple(logps), piece.finish_reason, self.usage, self.seed)

    def cancel(self) -> None:
        """End it: its slot is free after the step under way. Nothing happens if it has ended."""
        self._cancelled.set()
        self._on_cancel()

    def wait(self, timeout: float | None = None) -> bool:
        """Whether it has ended, waiting at most so long for it."""
        return self._done.wait(timeout)

    @property
    def usage(self) -> Usage:
        return Usage(self._prompt_tokens, self._completion_tokens)

    # --- for the engine ---------------------------------------------------------------------

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def count(self, prompt_tokens: int, completion_tokens: int) -> None:
        """The usage, from an engine whose pieces have no ids."""
        self._prompt_tokens, self._completion_tokens = prompt_tokens, completion_tokens

    def emit(self, piece: Piece) -> None:
        """Hand a piece to the reader; on the engine's thread. A reader that fails is one that went away."""
        now = time.monotonic()
        if self.first is None and piece.ids:
            self.first = now
        self._completion_tokens += len(piece.ids)
        if piece.finish_reason:
            self.finish_reason, self.ended = piece.finish_reason, now
        if self._on_piece is None:
            self._pieces.put(piece)
        else:
            try:
                self._on_piece(piece)
            except Exception:
                self._cancelled.set()
        if piece.finish_reason:
            self._done.set()
