"""Rendered text → tokens, span by span, so that the border between what is trained and what is not
is exact.

Every span is tokenised by itself: no merge crosses its border, and tokens before it are the ones a
server sees. All strings of a call go to the tokenizer in one batch, each distinct one once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trueup.data.words import Words, cuts_at_spaces

#: A Unicode noncharacter: put inside a control token's text, it keeps the tokenizer from seeing the
#: token. It never reaches the tokenizer, because text is cut where it stands.
BREAK = "\ufdd0"


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of rendered text, and whether its tokens are in the loss."""

    text: str
    trained: bool


class SpanTokenizer:
    """Tokenises spans in context.

    A SentencePiece-like tokenizer puts a space before a text that opens a string, and some added
    tokens swallow the whitespace after them. A span in the middle of a conversation must have
    neither surprise: there it is tokenised behind the added token it follows (or a newline), whose
    own tokens are then taken off again.
    """

    def __init__(self, tokenizer: Any, control: Iterable[str]) -> None:
        self.tokenizer = tokenizer
        added = list(tokenizer.get_added_vocab())
        self._control = any_of(token for token in control if len(token) > 1)
        self._tail = re.compile(f"(?:{any_of(added).pattern})\\s*$")
        swallows = any(token.rstrip for token in tokenizer.added_tokens_decoder.values())
        self._needs_context = swallows or self._opens_with_space()
        self._words = Words(self._by_backend, added) if cuts_at_spaces(tokenizer) else None

    def protect(self, text: str) -> str:
        """`text` with the control tokens written in it broken up, so that they stay text (fault
        D23).
        """
        if BREAK in text:
            text = text.replace(BREAK, "")
        while self._control.search(text):
            text = self._control.sub(lambda match: match[0][0] + BREAK + match[0][1:], text)
        return text

    def encode(self, sequences: Sequence[Sequence[Span]]) -> list[list[np.ndarray]]:
        """Token ids, int32, of each span of each sequence; the first span opens its sequence."""
        index: dict[tuple[str, str], int] = {}
        plans = [self._plan(sequence, index) for sequence in sequences]
        ids = self._batch(list(index))
        empty = np.empty(0, dtype=np.int32)

        def join(atoms: list[int]) -> np.ndarray:
            return ids[atoms[0]] if len(atoms) == 1 else np.concatenate([empty, *(ids[i] for i in atoms)])

        return [[join(atoms) for atoms in plan] for plan in plans]

    def _plan(self, spans: Sequence[Span], index: dict[tuple[str, str], int]) -> list[list[int]]:
        """For each span the numbers of the (context, text) atoms it consists of; new atoms join
        `index`.
        """
        plan: list[list[int]] = []
        before = ""
        for span in spans:
            numbers = []
            for text in span.text.split(BREAK) if BREAK in span.text else (span.text,):
                if text:
                    numbers.append(index.setdefault((self._context(before), text), len(index)))
                    before = text
            plan.append(numbers)
        return plan

    def _context(self, before: str) -> str:
        if not before or not self._needs_context:
            return ""
        tail = self._tail.search(before)
        return tail[0] if tail else "\n"

    def _batch(self, atoms: list[tuple[str, str]]) -> list[np.ndarray]:
        texts = self._ids([context + text for context, text in atoms])
        contexts = sorted({context for context, _ in atoms if context})
        heads = dict(zip(contexts, self._ids(contexts), strict=True))
        for number, (context, text) in enumerate(atoms):
            if not context:
                continue
            head = heads[context]
            if np.array_equal(texts[number][: len(head)], head):
                texts[number] = texts[number][len(head) :]
            else:  # the context merged with the text: no context is better than a wrong one
                texts[number] = self._ids([text])[0]
        return texts

    def _ids(self, texts: list[str]) -> list[np.ndarray]:
        if self._words:
            return self._words.ids(texts)
        return [np.asarray(ids, dtype=np.int32) for ids in self._by_tokenizer(texts)]

    def _by_tokenizer(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded = self.tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return encoded["input_ids"]

    def _by_backend(self, texts: Sequence[str]) -> list[list[int]]:
        """The same, past transformers' account of every text; for tokenizers that `cuts_at_spaces` knows."""
        backend = self.tokenizer.backend_tokenizer
        if backend.truncation or backend.padding or backend.encode_special_tokens:  # left by another call
            return self._by_tokenizer(texts)
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _opens_with_space(self) -> bool:
        bare, newline, both = self._by_tokenizer(["a", "\n", "\na"])
        return newline + bare != both


def any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """A pattern for any of `tokens`, the longest first; it never matches if there are none."""
    longest_first = sorted(set(tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
