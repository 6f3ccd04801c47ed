"""How like a reference text an answer is: BLEU-4 and ROUGE, an answer at a time, under LLaMA-Factory's names.

BLEU-4 is of characters, smoothed as NLTK's method 3 does (NIST), and of shorter n-grams only where an answer has no
four characters; ROUGE is F1 of words, jieba's where the text is Chinese. All are percentages.
"""

from __future__ import annotations

import importlib.util
import logging
import re
import tempfile
from collections.abc import Iterable
from functools import cached_property
from typing import Any

from trueup.errors import ConfigError

NAMES = ["bleu-4", "rouge-1", "rouge-2", "rouge-l"]
_CHINESE = r"[\u3400-\u9fff\uf900-\ufaff]"
_HAN = re.compile(f"{_CHINESE}+")
_WORD = re.compile(rf"{_CHINESE}+|(?:(?!{_CHINESE})\w)+|[^\w\s]")
_ROUGE = {"rouge-1": "rouge1", "rouge-2": "rouge2", "rouge-l": "rougeL"}


def require(key: str, labels: Iterable[str]) -> None:
    """Whether what compares answers with these texts is installed; ConfigError if not."""
    missing = [name for name in ("sacrebleu", "rouge_score") if not _installed(name)]
    if not _installed("jieba") and any(_HAN.search(label) for label in labels):
        missing.append("jieba (for Chinese)")
    if missing:
        raise ConfigError(
            f"`{key}` compares answers, which needs {', '.join(missing)}", where=key,
            fix="pip install 'trueup[metrics]'",
        )  # fmt: skip


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


class Similarity:
    """Compares texts. The libraries are loaded with the first."""

    def __call__(self, answer: str, label: str) -> dict[str, float]:
        """The four measures of `NAMES`, 0 … 100. A text of nothing is like no other."""
        if not answer.split() or not label.split():
            return dict.fromkeys(NAMES, 0.0)
        rouge = self._rouge.score(label, answer)
        bleu = self._bleu.sentence_score(_apart(answer), [_apart(label)]).score
        return {"bleu-4": bleu, **{name: 100.0 * rouge[theirs].fmeasure for name, theirs in _ROUGE.items()}}

    def tokenize(self, text: str) -> list[str]:
        """Words and signs, in small letters; what `rouge_score` asks a tokenizer for."""
        pieces: list[str] = _WORD.findall(text.lower())
        return [word for piece in pieces for word in (self._jieba.lcut(piece) if _HAN.match(piece) else [piece])]

    @cached_property
    def _rouge(self) -> Any:
        from rouge_score.rouge_scorer import RougeScorer

        return RougeScorer(list(_ROUGE.values()), tokenizer=self)

    @cached_property
    def _bleu(self) -> Any:
        from sacrebleu.metrics import BLEU

        return BLEU(tokenize="none", smooth_method="exp", effective_order=True, force=True)

    @cached_property
    def _jieba(self) -> Any:
        import jieba

        jieba.setLogLevel(logging.WARNING)
        cutter = jieba.Tokenizer()
        with tempfile.TemporaryDirectory() as private:  # else it unmarshals what it finds in a folder open to everyone
            cutter.tmp_dir = private
            cutter.initialize()
        return cutter


def _apart(text: str) -> str:
    """Characters as words; spaces are characters too."""
    return " ".join("▁" if character.isspace() else character for character in text)
