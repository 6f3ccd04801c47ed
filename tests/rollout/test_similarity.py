"""BLEU and ROUGE of an answer, against values worked out by hand and the definition in NLTK's words."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from trueup.errors import ConfigError
from trueup.rollout import similarity
from trueup.rollout.similarity import NAMES, Similarity, require

pytest.importorskip("sacrebleu", reason="needs the extra metrics")
pytest.importorskip("rouge_score", reason="needs the extra metrics")


def bleu4(answer: str, label: str) -> float:
    """sentence_bleu of characters with NIST smoothing (Chen & Cherry 2014, method 3), written out."""
    logs, misses = 0.0, 0
    for n in range(1, 5):
        grams, wanted = (Counter(text[i : i + n] for i in range(len(text) - n + 1)) for text in (answer, label))
        matched = sum(min(count, wanted[gram]) for gram, count in grams.items())
        misses += not matched
        logs += math.log((matched or 2.0**-misses) / grams.total()) / 4
    return 100 * math.exp(logs + min(0.0, 1 - len(label) / len(answer)))


@pytest.mark.parametrize(
    "answer, label",
    [("the cat sat on the mat", "the cat is on the mat"), ("abcd", "abxcd"), ("SELECT 1;", "select 1;")],
)
def test_bleu_is_of_characters_and_smoothed(answer: str, label: str):
    assert Similarity()(answer, label)["bleu-4"] == pytest.approx(bleu4(answer, label))


def test_rouge_is_the_f1_of_words():
    found = Similarity()(
        "The cat sat.", "the cat lay down ."
    )  # 4 and 5 words and signs: the, cat and the stop in order
    assert found["rouge-1"] == found["rouge-l"] == pytest.approx(100 * 2 * 3 / 9)
    assert found["rouge-2"] == pytest.approx(100 * 2 * 1 / 7)


def test_chinese_is_cut_into_words():
    pytest.importorskip("jieba", reason="needs the extra metrics")
    compare = Similarity()
    assert compare.tokenize("我爱北京, OK") == ["我", "爱", "北京", ",", "ok"]
    assert compare("我爱北京", "他爱北京")["rouge-1"] == pytest.approx(100 * 2 / 3)


def test_the_same_is_all_and_nothing_is_none():
    compare = Similarity()
    assert compare("ok", "ok") == dict.fromkeys(NAMES, pytest.approx(100.0)) | {"rouge-2": 0.0}  # no two words
    assert compare(" ", "ok") == compare("ok", "") == dict.fromkeys(NAMES, 0.0)


def test_what_is_missing_is_named_with_the_extra(monkeypatch):
    monkeypatch.setattr(similarity, "_installed", lambda name: name != "jieba")
    require("do_predict", ["plain words"])
    with pytest.raises(ConfigError, match="jieba") as caught:
        require("do_predict", ["plain words", "北京"])
    assert "trueup[metrics]" in str(caught.value)
    monkeypatch.setattr(similarity, "_installed", lambda name: False)
    with pytest.raises(ConfigError, match="sacrebleu, rouge_score"):
        require("predict_with_generate", [])
