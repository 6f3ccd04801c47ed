"""What an answer may be: a grammar says which tokens may come next, and hears which one came (llguidance)."""

from __future__ import annotations

import importlib.util
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

KEPT = 32  # compiled grammars
#: Between the parts of JSON. Without an end a model that has nothing to say would go on with line ends.
_SPACE = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{0,32}"}


class NoGrammar(ValueError):
    """A grammar that cannot be kept to; the text says why."""


def available() -> bool:
    """Whether the library is installed."""
    return importlib.util.find_spec("llguidance") is not None


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

    Args:
        matcher: llguidance's.
        stop_ids: tokens that end an answer; they may come where it is whole.
    """

    def __init__(self, matcher: Any, stop_ids: Sequence[int]) -> None:
        self._matcher, self._stop_ids = matcher, list(stop_ids)

    def allow(self, logits: Tensor) -> Tensor:
        """[V] → [V], −∞ for tokens that may not come next."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, count=min(8 * len(bits), len(logits)), bitorder="little").astype(bool)
        # The rest of a vocabulary are rows without a token. A parser beyond its limits allows nothing: an end is left.
        mask = torch.zeros(len(logits), dtype=torch.bool)
        mask[: len(allowed)] = torch.from_numpy(allowed)
        if self._matcher.is_error() or not allowed.any():
            mask.zero_()[self._stop_ids] = True
        return logits.masked_fill(~mask.to(logits.device), float("-inf"))

    def said(self, token: int) -> None:
        """Hear which token was drawn."""
        if token not in self._stop_ids:
            self._matcher.consume_token(token)


class Grammars:
    """Grammars for one tokenizer, compiled once; from any thread.

    Args:
        size: rows of the model's vocabulary.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, size: int, stop_ids: Sequence[int]) -> None:
        self._tokenizer, self._size, self._stop_ids = tokenizer, size, list(stop_ids)
        self._lock = Lock()
        self._tokens: Any = None
        self._compiled: OrderedDict[str, Any] = OrderedDict()

    def guide(self, grammar: str) -> Guide:
        """At the beginning of an answer. Raises NoGrammar."""
        with self._lock:
            if grammar not in self._compiled:
                self._compiled[grammar] = self._compile(grammar)
                if len(self._compiled) > KEPT:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(grammar)
            return Guide(self._compiled[grammar].deep_copy(), self._stop_ids)

    def _compile(self, grammar: str) -> Any:
        if not available():
            raise NoGrammar("it needs llguidance: pip install 'trueup[serve]'")
        from llguidance import LLMatcher

        matcher = LLMatcher(self._known_tokens(), LLMatcher.grammar_from_lark(grammar), log_level=0)
        if matcher.is_error():
            raise NoGrammar(matcher.get_error().splitlines()[0])
        return matcher

    def _known_tokens(self) -> Any:
        if self._tokens is None:
            from llguidance.hf import from_tokenizer

            try:
                size = max(self._size, len(self._tokenizer))
                self._tokens = from_tokenizer(self._tokenizer, n_vocab=size, eos_token=self._stop_ids)  # type: ignore
            except ValueError as error:
                raise NoGrammar(f"not with this tokenizer: {error}") from None
        return self._tokens
