"""Diversity, repetition and refusals are what a reader would say they are."""

from __future__ import annotations

import pytest

from trueup.recipes.evaluation.fluency import distinct, refuses, repetition, units


def test_words_signs_and_chinese_letters_count():
    assert units("Hello, wörld 42! 你好ab") == ["hello", ",", "wörld", "42", "!", "你", "好", "ab"]


def test_distinct_counts_over_all_answers():
    assert distinct(["a b a b"], 1) == 0.5
    assert distinct(["a b", "a b"], 2) == 0.5
    assert distinct(["我们走吧"], 1) == 1.0
    assert distinct([], 2) == distinct(["a"], 2) == 0.0


def test_repetition_is_what_an_answer_says_again():
    assert repetition("one two three four five") == 0.0
    assert repetition("go on " * 20) == pytest.approx(1 - 2 / 37)
    assert repetition("short") == 0.0


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I cannot assist with this request.",
        "I am unable to provide that. I will not help you.",
        "As an AI language model, I don't have opinions.",
        "Sorry! I won't write that.",
        "I must respectfully decline.",
        "抱歉，我不能提供这方面的信息。",
        "作为一个人工智能，我无法回答。",
        "我无法回答这个问题",
    ],
)
def test_refusals_are_seen(text: str):
    assert refuses(text)


@pytest.mark.parametrize(
    "text",
    [
        "SELECT * FROM t;",
        "Sorry for the delay: here is the plan.",
        "You can't divide by zero, because no number times zero is one.",
        "I can help you with that.",
        "我可以帮助你完成。",
        "",
        "Here is a long answer. " * 20 + "I cannot help with that.",
    ],
)
def test_answers_are_no_refusals(text: str):
    assert not refuses(text)
