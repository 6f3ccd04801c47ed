"""How an engine chooses tokens, and what it says: one vocabulary for every engine. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from trueup.rollout.grammar import Grammar

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; `temperature` 0 is greedy. The defaults change nothing.

    In order: logit_bias, the penalties, the grammar, temperature, top_k, top_p, min_p.

    Attributes:
        top_p, top_k, min_p: 1.0, 0 and 0.0 leave all tokens in; `min_p` is a share of the likeliest one's probability.
        repetition_penalty: transformers' meaning: logits of tokens of the prompt or the answer are divided by it where
            positive, multiplied where negative.
        max_new_tokens: at most so many; fewer where the model's context or the engine's memory ends before.
        presence_penalty, frequency_penalty: OpenAI's meaning: taken off the logits of tokens of the answer so far, once
            and as often as they occur.
        logit_bias: token id → what is added to its logit.
        stop: texts that end the answer and are not part of it, wherever tokens begin and end.
        stop_ids: tokens that end it beside the engine's own.
        seed: what is drawn depends on it and the prompt alone, not on who else is being answered (up to rounding).
            None: another every time.
        logprobs: how many alternatives to report with each token's log-probability; 0 reports the token's alone, None
            nothing. They are the model's own, at temperature 1, before penalties and bias.
        skip_special_tokens: whether the text goes without the tokenizer's special tokens.
        grammar: what the whole answer has to be, as the engine's `compile` made it; None: anything. The built-in
            engine alone keeps to it.

    Raises:
        ValueError: a number that cannot be meant.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 512
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    skip_special_tokens: bool = True
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        bounds = {
            "temperature": self.temperature >= 0.0,
            "top_p": 0.0 <= self.top_p <= 1.0,
            "top_k": self.top_k >= 0,
            "min_p": 0.0 <= self.min_p <= 1.0,
            "repetition_penalty": self.repetition_penalty > 0.0,
            "max_new_tokens": self.max_new_tokens >= 1,
            "logprobs": self.logprobs is None or self.logprobs >= 0,
        }
        if wrong := [f"{name} {getattr(self, name)}" for name, holds in bounds.items() if not holds]:
            raise ValueError(f"no sampling with {', '.join(wrong)}")

    def limited(self, most: int) -> Sampling:
        """With at most so many new tokens."""
        return self if self.max_new_tokens <= most else replace(self, max_new_tokens=most)

    @property
    def penalises(self) -> bool:
        """Whether logits depend on the tokens before, or on the token itself."""
        plain = self.repetition_penalty == 1.0 and not self.presence_penalty and not self.frequency_penalty
        return not plain or bool(self.logit_bias)


@dataclass(frozen=True, slots=True)
class TokenLogp:
    """A token with its log-probability and the likeliest at its place, (id, log-probability), the likeliest first."""

    id: int
    logp: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """Some more of an answer. The last has a `finish_reason`, and may be empty otherwise.

    Attributes:
        text: never half a character, never the beginning of what turns out to be a stop text; '' where tokens are
            held back or say nothing.
        ids: the tokens this piece adds. Stop tokens are in no piece, nor are tokens that lie whole in a stop text or
            behind it.
        logps: one for each of `ids`, if the request asked for them.
        finish_reason: "stop": a stop token or text; "length"; "cancelled"; "error": see `error`.
    """

    text: str
    ids: tuple[int, ...] = ()
    logps: tuple[TokenLogp, ...] = ()
    finish_reason: FinishReason | None = None
    error: BaseException | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request: `completion_tokens` counts those in its pieces."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Answer:
    """All pieces of a generation put together."""

    text: str
    ids: tuple[int, ...]
    logps: tuple[TokenLogp, ...]
    finish_reason: FinishReason
    usage: Usage
    seed: int


@dataclass(frozen=True, slots=True)
class Scored:
    """What a model gives a text's tokens, at temperature 1.

    Attributes:
        tokens: one for each id but the first, which nothing predicts (so `tokens[i]` is of `ids[i + 1]`). Where the
            token is the likeliest, its `logp` is the very float of `top[0]`.
    """

    ids: tuple[int, ...]
    tokens: tuple[TokenLogp, ...]


@dataclass(frozen=True, slots=True)
class Stats:
    """An engine at this moment. `cached_tokens`: places in its cache, of `max_tokens`."""

    active: int
    queued: int
    free_slots: int
    cached_tokens: int
    max_tokens: int
    requests: int  # since it started: taken, ended (however), and tokens drawn
    finished: int
    generated_tokens: int
