"""What an answer may be: a grammar says which tokens may come next, and hears which one came (llguidance)."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

KEPT = 16  # compiled grammars
#: What compiling takes grows with the square of a grammar: 0.15 s at these limits, and some megabytes.
MOST_CHARACTERS, MOST_SYMBOLS = 64_000, 20_000
#: Between the parts of JSON. Without an end a model that has nothing to say would go on with line ends.
_SPACE = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{0,32}"}


class NoGrammar(ValueError):
    """A grammar that cannot be kept to; the text says why."""


@dataclass(frozen=True)
class Form:
    """JSON that a schema describes, keys in its order, between two fixed texts."""

    schema: Mapping[str, Any]
    before: str = ""
    after: str = ""


def json_grammar(forms: Sequence[Form]) -> str:
    """A text in one of these forms, in llguidance's kind of Lark."""
    rules = [f"start: {' | '.join(f'form_{number}' for number in range(len(forms)))}"]
    for number, form in enumerate(forms):
        parts = [_quoted(form.before), f"value_{number}", _quoted(form.after)]
        rules.append(f"form_{number}: {' '.join(filter(None, parts))}")
        rules.append(f"value_{number}: %json {_text({**form.schema, 'x-guidance': _SPACE})}")
    return "\n".join(rules)


def _quoted(text: str) -> str:
    return _text(text) if text else ""


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


class Guide:
    """A grammar on its way through one answer.

    Attributes:
        failure: why it could not go on; empty while it can. What was drawn since says nothing.
    """

    def __init__(self, matcher: Any, stop_ids: Sequence[int]) -> None:
        self._matcher, self._stop_ids = matcher, stop_ids
        self.failure = ""

    def allow(self, logits: Tensor) -> Tensor:
        """[V] → [V], −∞ for tokens that may not come next."""
        allowed = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
        if self._matcher.is_error() or not allowed.any():
            self.failure = _reason(self._matcher.get_error())
            return logits
        mask = torch.zeros(len(logits), dtype=torch.bool)  # rows of a vocabulary beyond its tokens stay out
        mask[: len(allowed)] = torch.from_numpy(allowed[: len(logits)].astype(bool))
        return logits.masked_fill(~mask.to(logits.device), float("-inf"))

    def said(self, token: int) -> None:
        """Hear which token was drawn; one that ends the answer is not the grammar's."""
        if not self.failure and token not in self._stop_ids:
            self._matcher.consume_token(token)


@dataclass(frozen=True, eq=False)
class Grammar:
    """A compiled grammar, for any number of answers."""

    matcher: Any
    stop_ids: tuple[int, ...]

    def guide(self) -> Guide:
        """At the beginning of an answer."""
        return Guide(self.matcher.deep_copy(), self.stop_ids)


class Grammars:
    """Grammars for one tokenizer, from any thread.

    Args:
        size: rows of the model's vocabulary.
        stop_ids: tokens that end an answer; they may come where it is whole.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, size: int, stop_ids: Sequence[int]) -> None:
        self._tokenizer, self._size, self._stop_ids = tokenizer, size, tuple(stop_ids)
        self.compile = lru_cache(KEPT)(self._compile)

    def _compile(self, text: str) -> Grammar:
        """A text of `json_grammar`, ready to be kept to. Takes a moment. Raises NoGrammar."""
        if len(text) > MOST_CHARACTERS:
            raise NoGrammar(f"{len(text):,} characters of schemas are too many; at most {MOST_CHARACTERS:,}")
        if importlib.util.find_spec("llguidance") is None:
            raise NoGrammar("it needs llguidance: pip install 'trueup[serve]'")
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(max_grammar_size=MOST_SYMBOLS)
        matcher = LLMatcher(self._tokens, LLMatcher.grammar_from_lark(text), log_level=0, limits=limits)
        if not matcher.is_error():
            grammar = Grammar(matcher, self._stop_ids)
            guide = grammar.guide()
            guide.allow(torch.zeros(self._size))  # a schema without end fails here
            if not guide.failure:
                return grammar
            raise NoGrammar(guide.failure)
        raise NoGrammar(_reason(matcher.get_error()))

    @cached_property
    def _tokens(self) -> Any:
        from llguidance.hf import from_tokenizer

        size = max(self._size, len(self._tokenizer))
        try:
            return from_tokenizer(self._tokenizer, n_vocab=size, eos_token=list(self._stop_ids))  # type: ignore
        except Exception as error:
            raise NoGrammar(f"not with this model's tokenizer: {error}") from None


def _reason(error: str) -> str:
    """The library's first line, in a caller's words where it is only its own."""
    first = error.partition("\n")[0]
    if not first or "assertion" in first or "panick" in first:
        return "the schema cannot be kept to: it is too large, or refers to itself without end"
    return first
