"""Tokens looked up word by word are the tokenizer's own."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers

from tests.data.tiny_tokenizers import make_tokenizer
from trueup.data.words import PATTERNS, Words, cuts_at_spaces

#: One of every class that the patterns tell apart: letters with and without case, marks, digits, stops, line ends.
CLASSES = ["a", "Z", "你", "\u0301", "5", "'", "s", ".", "/", "\n", "\t"]


def pre_tokenizer(regex: str | None):
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex is None)
    if regex is None:
        return whole
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"), whole])


def tokenizer_with(regex: str | None = PATTERNS["qwen2"]):
    tokenizer = make_tokenizer("qwen")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer(regex)
    return tokenizer


def by_tokenizer(tokenizer):
    return lambda texts: tokenizer(list(texts), add_special_tokens=False)["input_ids"]


def words_of(tokenizer) -> Words:
    return Words(by_tokenizer(tokenizer), list(tokenizer.get_added_vocab()))


@pytest.mark.parametrize("name", ["gpt2", *PATTERNS])
def test_every_known_pattern_cuts_before_a_lone_space(name):
    cut = pre_tokenizer(PATTERNS.get(name)).pre_tokenize_str
    short = [*CLASSES, *("".join(pair) for pair in product(CLASSES, repeat=2))]
    before = {text: [piece for piece, _ in cut(text)] for text in short if not text[-1].isspace()}
    after = {text: [piece for piece, _ in cut(f" {text}")] for text in short if not text[0].isspace()}
    for left, right in product(before, after):
        assert [piece for piece, _ in cut(f"{left} {right}")] == before[left] + after[right], (left, right)


@pytest.mark.parametrize("name", ["gpt2", *PATTERNS])
def test_words_have_the_tokens_of_the_whole_text(name):
    tokenizer = tokenizer_with(PATTERNS.get(name))
    assert cuts_at_spaces(tokenizer)
    words = words_of(tokenizer)
    pieces = st.sampled_from(
        [*CLASSES, " ", "  ", " ", "the", "<|im_end|>", "<|im_start|>", "<tool_call>", "é", "e\u0301"]
    )
    anything = st.text(max_size=12) | st.lists(pieces, max_size=20).map("".join)

    @settings(max_examples=150, deadline=None)
    @given(st.lists(anything, max_size=4))
    def agree(texts):
        texts = [text.encode("utf-8", "ignore").decode() for text in texts]
        expected = by_tokenizer(tokenizer)(texts) if texts else []
        assert [ids.tolist() for ids in words.ids(texts)] == expected

    agree()


def test_a_word_is_asked_about_once():
    tokenizer = tokenizer_with()
    asked = []
    words = Words(lambda texts: asked.extend(texts) or by_tokenizer(tokenizer)(texts), [])
    words.ids(["one two two", "two one"])
    words.ids(["two two one"])
    assert sorted(asked) == [" one", " two", "one", "two"]


def test_long_words_are_forgotten_and_the_memory_is_bounded(monkeypatch):
    monkeypatch.setattr("trueup.data.words._MOST", 10)
    words = words_of(tokenizer_with())
    before = words.ids(["x" * 100 + " " + "y" * 100])
    assert not words._known
    for number in range(20):
        words.ids([f"{number} a{number} b{number}"])
    assert len(words._known) <= 13
    assert words.ids(["x" * 100 + " " + "y" * 100])[0].tolist() == before[0].tolist()


def test_other_tokenizers_do_their_own_work():
    assert not cuts_at_spaces(make_tokenizer("llama2", "sentencepiece"))
    assert not cuts_at_spaces(make_tokenizer("llama2", "metaspace"))
    for change in (
        lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizer(r"\p{L}+ \p{L}+|\s")),
        lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda backend: setattr(backend, "normalizer", normalizers.Lowercase()),
        lambda backend: setattr(backend, "model", models.WordLevel({"a": 0}, unk_token="a")),
        lambda backend: backend.add_tokens([AddedToken("<x>", rstrip=True, normalized=False)]),
        lambda backend: backend.add_tokens([AddedToken("<x>", normalized=True)]),
    ):
        tokenizer = tokenizer_with()
        assert cuts_at_spaces(tokenizer)
        change(tokenizer.backend_tokenizer)
        assert not cuts_at_spaces(tokenizer)
