"""Who is answered when: one round admits, moves prompts on, and gives every answer under way a token."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from trueup.models.policy import Policy
from trueup.models.voices import Voices
from trueup.rollout.batching import Batch, Prefill, Row
from trueup.rollout.generation import EngineClosed, QueueFull
from trueup.rollout.sampling import Stats

log = logging.getLogger("trueup")

IDLE_SECONDS = 5.0  # without requests, after which the thread ends


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


class Turns:
    """Who holds the model: one after the other, in the order they came."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._waiting: deque[object] = deque()  # the first of them holds it
        self._owner: int | None = None
        self._depth = 0

    @property
    def wanted(self) -> bool:
        """Whether somebody waits for the holder to let go."""
        return len(self._waiting) > 1

    def __enter__(self) -> None:
        me = threading.get_ident()
        if self._owner == me:
            self._depth += 1
            return
        ticket = object()
        with self._condition:
            self._waiting.append(ticket)
            try:
                self._condition.wait_for(lambda: self._waiting[0] is ticket)
            except BaseException:  # Ctrl-C while waiting
                self._waiting.remove(ticket)
                self._condition.notify_all()
                raise
            self._owner = me

    def __exit__(self, *_: object) -> None:
        if self._depth:
            self._depth -= 1
            return
        with self._condition:
            self._owner = None
            self._waiting.popleft()
            self._condition.notify_all()


class Rounds:
    """Answers under way and those that wait, first come, first served. One thread at a time runs rounds; any may add.

    Args:
        alone: the model takes no rows of different ages: every answer is decoded by itself.
        places: of the cache, for all answers together.
    """

    def __init__(self, policy: Policy, voices: Voices, limits: Limits, places: int, alone: bool, pad_id: int) -> None:
        self.policy, self.voices, self.limits, self.places = policy, voices, limits, places
        self.alone, self.pad_id = alone, pad_id
        self.requests = self.ended = self.generated = 0
        self._new: deque[Row] = deque()  # added, not yet seen by a round
        self._waiting: deque[Row] = deque()
        self._batches: list[Batch] = []
        self._prefill: tuple[Prefill, Batch] | None = None

    @property
    def busy(self) -> bool:
        return bool(self._new or self._waiting or self._batches or self._prefill)

    @property
    def queued(self) -> int:
        return max(self.open - len(self.under_way), 0)

    @property
    def open(self) -> int:
        """Requests that have not ended."""
        return self.requests - self.ended

    @property
    def under_way(self) -> list[Row]:
        prefill = self._prefill
        rows = [row for batch in self._batches for row in batch.rows]
        rows += prefill[0].rows if prefill else []
        return [row for row in rows if not row.ended]

    @property
    def stats(self) -> Stats:
        active = len(self.under_way)
        cached = sum(batch.cached for batch in self._batches)
        free = self.limits.max_slots - active
        queued = max(self.open - active, 0)
        return Stats(active, queued, free, cached, self.places, self.requests, self.ended, self.generated)

    def add(self, row: Row) -> None:
        row.on_end = self._count
        self.requests += 1
        self._new.append(row)

    def _count(self) -> None:
        self.ended += 1

    def run(self, turns: Turns) -> None:
        """Rounds until nothing is left to do, letting others at the model in between."""
        while self.busy:
            with turns, torch.inference_mode(), self.policy.generating() as model:
                try:
                    while self.busy and not turns.wanted:
                        self.round(model)
                finally:
                    self.voices.rest()

    def round(self, model: Any) -> None:
        """One token more for every answer, and one stretch more of prompts."""
        while self._new:
            self._waiting.append(self._new.popleft())
        self._end_cancelled()
        if self._prefill is None and self._waiting:
            self._admit(model)
        if self._prefill is not None:
            self._advance(*self._prefill)
        for batch in self._batches:
            with self._speaking(batch.voice, batch.rows):
                self.generated += len(batch.alive)
                batch.step()
        self._batches = [batch for batch in self._batches if batch.alive]

    def end_all(self, error: BaseException | None = None) -> None:
        """End what waits and what is under way; on the thread that runs rounds, or when none does."""
        rows = [*self._new, *self._waiting, *self.under_way]
        for row in rows:
            row.end("error" if error else "cancelled", error=error)
        self._new.clear()
        self._waiting.clear()
        self._batches, self._prefill = [], None

    def cancel_all(self) -> None:
        """Ask for it; from any thread."""
        for row in [*self._new.copy(), *self._waiting.copy(), *self.under_way]:
            row.generation.cancel()

    def _end_cancelled(self) -> None:
        for row in [*self._waiting, *self.under_way]:
            if row.generation.cancelled:
                row.end("cancelled")
        self._waiting = deque(row for row in self._waiting if not row.ended)
        if self._prefill and all(row.ended for row in self._prefill[0].rows):
            self._prefill = None
        self._batches = [batch for batch in self._batches if batch.alive]

    def _admit(self, model: Any) -> None:
        """Take the first that wait, as many as there is room for: of one voice, short prompts together."""
        voice = self._waiting[0].generation.adapter
        batch = next((b for b in self._batches if b.voice == voice and not self.alone), None)
        others = sum(b.places() for b in self._batches if b is not batch)
        batch = batch or Batch(model, voice, self.alone, self.pad_id)
        free = self.limits.max_slots - len(self.under_way)
        taken: list[Row] = []
        prompts: set[tuple[int, ...]] = set()
        for row in self._waiting:
            prompts.add(row.prompt)
            tokens = len(prompts) * max(map(len, prompts))
            apart = row.generation.adapter != voice or self.alone or tokens > self.limits.prefill_tokens
            if len(taken) >= free or (taken and apart) or others + batch.places([*taken, row]) > self.places:
                break
            taken.append(row)
        if taken:
            for _ in taken:
                self._waiting.popleft()
            self._prefill = (Prefill(model, taken, self.limits.prefill_tokens, self.alone, self.pad_id), batch)

    def _advance(self, prefill: Prefill, batch: Batch) -> None:
        with self._speaking(batch.voice, [*prefill.rows, *batch.rows]):
            if not prefill.advance():
                return
            self.generated += len(prefill.rows)
            drawn = prefill.first()
            for row, token, logp in zip(prefill.rows, drawn.ids, drawn.logps, strict=True):
                if not row.ended:
                    row.take(token, logp)
            batch.join(prefill)
        self._prefill = None
        if batch not in self._batches and batch.alive:
            self._batches.append(batch)

    @contextmanager
    def _speaking(self, voice: str | None, rows: Sequence[Row]) -> Iterator[None]:
        """The model with this voice. Where it fails (memory, say), these answers end; others go on."""
        try:
            self.voices.use(voice)
            yield
        except Exception as error:
            alive = [row for row in rows if not row.ended]
            log.warning("%d answers failed: %s: %s", len(alive), type(error).__name__, error)
            for row in alive:
                row.end("error", error=error)


class Worker:
    """The thread that runs rounds while there is something to do; it ends when idle and starts with a request."""

    def __init__(self, rounds: Rounds, turns: Turns) -> None:
        self.rounds, self.turns = rounds, turns
        self._condition = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    @property
    def running(self) -> bool:
        return self._thread is not None

    def submit(self, row: Row) -> None:
        """Raises QueueFull, EngineClosed."""
        rounds, limits = self.rounds, self.rounds.limits
        with self._condition:
            if self._closed:
                raise EngineClosed("the engine is closed")
            if rounds.open >= limits.max_slots + limits.max_queue:
                raise QueueFull(f"{rounds.queued} requests are waiting")
            rounds.add(row)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="trueup-engine", daemon=True)
                self._thread.start()
            self._condition.notify_all()

    def close(self, drain: bool, timeout: float | None) -> None:
        with self._condition:
            self._closed = True
            thread = self._thread
            self._condition.notify_all()
        if not drain:
            self.rounds.cancel_all()
        if thread is not None:
            thread.join(timeout)
            if thread.is_alive():
                self.rounds.cancel_all()
                thread.join()

    def _work(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self.rounds.busy or self._closed, IDLE_SECONDS)
                if not self.rounds.busy:
                    self._thread = None
                    return
            try:
                self.rounds.run(self.turns)
            except Exception as error:  # ours: nobody may wait for ever because of it
                log.exception("the engine failed")
                self.rounds.end_all(error)
