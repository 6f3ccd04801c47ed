"""Words and their tokens, each looked up once: what makes tokenising fast.

A byte-level tokenizer cuts text into pieces before it merges anything, and every pattern of the GPT-2 family begins a
new piece at a lone space between two words. Text that is cut there beforehand has the same tokens, and most of its
words have been seen before: the tokenizer is only asked about the others. `tests/data/test_words.py` proves the cut for
every pattern named here on all short strings over the classes that the patterns know; any other tokenizer is left to
do its own work.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np

#: Cuts of these tokenizers never join what stands before a lone space with what follows it. The names are of families.
PATTERNS = {
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    "qwen3.5": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    "tekken": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "o200k": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}

_LONE_SPACE = re.compile(r" (?=\S)(?<=\S )")
_OPENS = "\n"
_MOST = 400_000  # words remembered: some 100 MB
_LONGEST = 48  # characters of a word worth remembering; text without spaces is one long word

Tokenise = Callable[[Sequence[str]], list[list[int]]]


class Words:
    """Tokens of texts, by their words.

    Args:
        tokenise: ids of texts, by the tokenizer itself.
        added: its added tokens, at which it cuts before anything else.
    """

    def __init__(self, tokenise: Tokenise, added: Sequence[str]) -> None:
        self._tokenise = tokenise
        longest_first = sorted(added, key=len, reverse=True)
        self._added = re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")
        #: What stands behind a lone space, by the word without that space; what opens a stretch of text, by _OPENS and
        #: that. No word behind a lone space begins with white space, so the two never meet.
        self._known: dict[str, bytes] = {}

    def ids(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 ids of each text, read-only."""
        words = [self._words(text) for text in texts]
        passing = self._learn(words)
        known = self._known.__getitem__
        found = [np.frombuffer(b"".join(map(known, one)), dtype=np.int32) for one in words]
        for word in passing:
            del self._known[word]
        return found

    def _words(self, text: str) -> list[str]:
        words: list[str] = []
        for stretch in self._added.split(text):
            if stretch:
                opening = len(words)
                words += _LONE_SPACE.split(stretch)
                words[opening] = _OPENS + words[opening]
        return words

    def _learn(self, words: list[list[str]]) -> list[str]:
        """Ask for every word that is new; which of them are not to stay."""
        if len(self._known) > _MOST:
            self._known.clear()
        new = list(set(chain.from_iterable(words)) - self._known.keys())
        asked = [word.removeprefix(_OPENS) if word.startswith(_OPENS) else f" {word}" for word in new]
        if asked:
            ids = [np.asarray(ids, dtype=np.int32).tobytes() for ids in self._tokenise(asked)]
            self._known.update(zip(new, ids, strict=True))
        return [word for word in new if len(word) > _LONGEST]


def cuts_at_spaces(tokenizer: Any) -> bool:
    """Whether `tokenizer` is known to tokenise text as the sum of its words."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or getattr(tokenizer, "split_special_tokens", False):
        return False
    if type(backend.model).__name__ != "BPE" or backend.model.dropout:
        return False
    normalises = _parts(backend.normalizer, "normalizers")
    pieces = _parts(backend.pre_tokenizer, "pretokenizers")
    added = tokenizer.added_tokens_decoder.values()
    plain = not any(token.lstrip or token.rstrip or token.single_word for token in added)
    one_search = len({token.normalized for token in added}) <= 1
    as_written = not (normalises and any(token.normalized for token in added))
    return (
        plain
        and one_search
        and as_written
        and all(part["type"] == "NFC" for part in normalises)
        and _cut_before_spaces(pieces)
    )


def _cut_before_spaces(pieces: list[dict[str, Any]]) -> bool:
    cuts = False
    for part in pieces:
        match part:
            case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}:
                if regex not in PATTERNS.values():
                    return False
                cuts = True
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}:
                cuts |= use_regex
            case {"type": "Digits"}:
                pass
            case _:
                return False
    return cuts


def _parts(component: Any, members: str) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as the list of its parts, in tokenizer.json's words."""
    if component is None:
        return []
    found = json.loads(component.__getstate__())
    return found[members] if found["type"] == "Sequence" else [found]
