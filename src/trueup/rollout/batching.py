"""Answers decoded together: prompts go through the model, their rows join a batch, and leave it when they end."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from trueup.rollout.cache import RowCache
from trueup.rollout.drawing import Chooser, Drawn, draw
from trueup.rollout.generation import Generation
from trueup.rollout.grammar import NoGrammar
from trueup.rollout.sampling import FinishReason, Piece, TokenLogp
from trueup.rollout.text_stream import TextStream, Token

KEEP_UNTIL = 0.75  # share of rows alive below which the ended ones are taken out of the cache
SPARE = 16  # first columns that no row alive needs, at which they are given up
#: Prompts are padded to a multiple of so many tokens. On a CPU oneDNN compiles each product for its shape: in bf16 a
#: prompt of a new length takes twice as long, and its code 3 MB.
WIDTHS = {"cpu": 16}


class Row:
    """One answer under way.

    Args:
        stop_ids: tokens that end it.
        limit: new tokens that may be drawn.
        stream: makes text of it; None where nobody wants text.
    """

    def __init__(self, generation: Generation, stop_ids: frozenset[int], limit: int, stream: TextStream | None) -> None:
        self.generation, self.stop_ids, self.limit, self.stream = generation, stop_ids, limit, stream
        self.chooser = Chooser(generation.sampling, generation.prompt_ids, generation.seed, limit)
        self.drawn = 0
        self.last = 0  # the newest token
        self.ended = False
        self.on_end: Callable[[], None] = lambda: None  # before the asker hears of it

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.generation.prompt_ids

    @property
    def longest(self) -> int:
        """Tokens it may come to, prompt included."""
        return len(self.prompt) + self.limit

    def take(self, token: int, logp: TokenLogp | None) -> None:
        """Hear of the next token, and tell the asker."""
        if self.chooser.failure:
            self.end("error", error=NoGrammar(self.chooser.failure))
            return
        self.drawn += 1
        self.last = token
        if token in self.stop_ids:
            self.end("stop")
            return
        if self.stream is None:
            text, tokens, stopped = "", [(token, logp)], False
        else:
            text, tokens, stopped = self.stream.push(token, logp)
        if stopped:
            self._close("stop", text, tokens)
        elif self.drawn == self.limit:
            self.end("length", text, tokens)
        elif text or tokens:
            self.generation.emit(_piece(text, tokens))

    def end(
        self, reason: FinishReason, text: str = "", tokens: Sequence[Token] = (), error: BaseException | None = None
    ) -> None:
        """Nothing follows: tell the asker, with what was held back."""
        rest, more = self.stream.finish() if self.stream else ("", [])
        self._close(reason, text + rest, [*tokens, *more], error)

    def _close(
        self, reason: FinishReason, text: str, tokens: Sequence[Token], error: BaseException | None = None
    ) -> None:
        if not self.ended:
            self.ended = True
            self.on_end()
            self.generation.emit(_piece(text, tokens, reason, error))


def _piece(
    text: str, tokens: Sequence[Token], reason: FinishReason | None = None,
    error: BaseException | None = None,
) -> Piece:  # fmt: skip
    ids = tuple(token for token, _ in tokens)
    return Piece(text, ids, tuple(logp for _, logp in tokens if logp is not None), reason, error)


class Prefill:
    """Prompts on their way through the model: all at once where they are short, else one, a stretch at a time.

    Args:
        rows: answers to begin. Equal prompts go through once.
        stretch: tokens at a time.
        alone: the model does not take rows of different ages; `rows` is one then.
    """

    def __init__(self, model: PreTrainedModel, rows: Sequence[Row], stretch: int, alone: bool, pad_id: int) -> None:
        self.rows, self.model, self.stretch, self.alone = list(rows), model, stretch, alone
        self.prompts = list(dict.fromkeys(row.prompt for row in self.rows))
        self.which = [self.prompts.index(row.prompt) for row in self.rows]
        self.cache: Any = DynamicCache(config=model.config) if alone else RowCache(model.config)
        self.done = 0
        self._logits: Tensor | None = None
        self._ids, self._mask = left_padded(self.prompts, pad_id, 1 if alone else WIDTHS.get(model.device.type, 1))
        now = time.monotonic()
        for row in self.rows:
            row.generation.started = now

    @property
    def width(self) -> int:
        return self._mask.shape[1]

    def advance(self) -> bool:
        """One stretch more; whether all is through."""
        end = min(self.done + self.stretch, self.width)
        inputs: dict[str, Any] = {"input_ids": self._ids[:, self.done : end].to(self.model.device)}
        if not self.alone:
            positions = (self._mask.cumsum(1) - 1).clamp_min(0)[:, self.done : end]
            inputs["position_ids"] = positions.to(self.model.device)
            if not self._mask.all():
                inputs["attention_mask"] = self._mask[:, :end].to(self.model.device)
        self._logits = _forward(self.model, self.cache, inputs)
        self.done = end
        if end < self.width:
            return False
        if spare := self.width - max(map(len, self.prompts)):
            self.cache.trim(spare)
            self._mask = self._mask[:, spare:]
        return True

    def first(self) -> Drawn:
        """The first token of every row."""
        assert self._logits is not None
        logits = self._logits[torch.tensor(self.which, device=self._logits.device)]
        return draw(logits, [row.chooser for row in self.rows])


class Batch:
    """Rows that are decoded together by one voice of the model.

    Args:
        alone: there is one row only, with a cache of the library's own.
    """

    def __init__(self, model: PreTrainedModel, voice: str | None, alone: bool, pad_id: int) -> None:
        self.model, self.voice, self.alone, self.pad_id = model, voice, alone, pad_id
        self.rows: list[Row] = []
        self.cache: Any = None
        self._mask: Tensor  # [R, W] on the device
        self._lengths: Tensor  # [R] tokens of each row in the cache

    @property
    def alive(self) -> list[Row]:
        return [row for row in self.rows if not row.ended]

    @property
    def cached(self) -> int:
        """Places in use now, padding included."""
        lengths = [len(row.prompt) + row.drawn for row in self.rows]
        return len(lengths) * max(lengths, default=0)

    def places(self, more: Sequence[Row] = ()) -> int:
        """Places the cache comes to, at the most, with some rows more."""
        alive = [*self.alive, *more]
        if not alive:
            return 0
        return max(len(self.rows), len(alive)) * max(row.longest for row in alive)

    def join(self, prefill: Prefill) -> None:
        """Take in rows whose prompts are through and whose first tokens are known; ended ones stay out."""
        coming = [(row, which) for row, which in zip(prefill.rows, prefill.which, strict=True) if not row.ended]
        if not coming:
            return
        rows = [row for row, _ in coming]
        if self.alone:
            self.rows, self.cache = rows, prefill.cache
            return
        device = self.model.device
        which = torch.tensor([which for _, which in coming], device=device)
        mask = prefill._mask.to(device, torch.bool)[which]
        if not self.alive:
            prefill.cache.take(which)
            self.rows, self.cache, self._mask, self._lengths = rows, prefill.cache, mask, mask.sum(1)
            return
        free = [index for index, row in enumerate(self.rows) if row.ended]
        if len(free) >= len(rows) and prefill.width <= self.cache.width:
            self._replace(free[: len(rows)], rows, prefill, which, mask)
        else:
            self._append(rows, prefill, which, mask)

    def _replace(self, places: list[int], rows: list[Row], prefill: Prefill, which: Tensor, mask: Tensor) -> None:
        at = torch.tensor(places, device=which.device)
        self.cache.replace(at, prefill.cache, which)
        self._mask[at] = _widened(mask, self._mask.shape[1])
        self._lengths[at] = mask.sum(1)
        for place, row in zip(places, rows, strict=True):
            self.rows[place] = row

    def _append(self, rows: list[Row], prefill: Prefill, which: Tensor, mask: Tensor) -> None:
        self._drop_ended()
        self.cache.append(prefill.cache, which)
        width = self.cache.width
        self._mask = torch.cat([_widened(self._mask, width), _widened(mask, width)])
        self._lengths = torch.cat([self._lengths, mask.sum(1)])
        self.rows += rows

    def step(self) -> None:
        """One token more for every row."""
        self._make_room()
        if not self.rows:
            return
        alive = [index for index, row in enumerate(self.rows) if not row.ended]
        last = [row.last if not row.ended else self.pad_id for row in self.rows]
        inputs: dict[str, Any] = {"input_ids": torch.tensor(last)[:, None].to(self.model.device)}
        if not self.alone:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(self.rows), 1)], dim=1)
            inputs["position_ids"] = self._lengths[:, None]
            inputs["attention_mask"] = self._mask
            self._lengths = self._lengths + 1
        logits = _forward(self.model, self.cache, inputs)
        if len(alive) < len(self.rows):
            logits = logits[torch.tensor(alive, device=logits.device)]
        rows = [self.rows[index] for index in alive]
        drawn = draw(logits, [row.chooser for row in rows])
        for row, token, logp in zip(rows, drawn.ids, drawn.logps, strict=True):
            row.take(token, logp)

    def _make_room(self) -> None:
        """Take out what ended, when it is much, and columns that no row needs any more."""
        alive = len(self.alive)
        if not alive:
            self.rows, self.cache = [], None
            return
        if self.alone:
            return
        if alive <= KEEP_UNTIL * len(self.rows):
            self._drop_ended()
        # Where rows come as others end, none is taken out, and every step adds a column. Known without the device.
        spare = self.cache.width - max(len(row.prompt) + row.drawn - 1 for row in self.alive)
        if spare >= SPARE:
            self.cache.trim(spare)
            self._mask = self._mask[:, spare:]

    def _drop_ended(self) -> None:
        alive = [index for index, row in enumerate(self.rows) if not row.ended]
        if len(alive) == len(self.rows):
            return
        rows = torch.tensor(alive, device=self.model.device)
        self.cache.take(rows)
        self._mask, self._lengths = self._mask[rows], self._lengths[rows]
        self.rows = [self.rows[index] for index in alive]


def left_padded(prompts: Sequence[Sequence[int]], pad_id: int, multiple: int) -> tuple[Tensor, Tensor]:
    """Ids and mask [P, W], W a multiple of a number."""
    width = -(-max(map(len, prompts)) // multiple) * multiple
    ids = torch.tensor([[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def _widened(mask: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(mask, (width - mask.shape[1], 0))


def _forward(model: PreTrainedModel, cache: Any, inputs: dict[str, Any]) -> Tensor:
    """Logits [R, V] after the last token of each row."""
    past = cache.cache if isinstance(cache, RowCache) else cache
    return model(past_key_values=past, use_cache=True, logits_to_keep=1, **inputs).logits[:, -1]
