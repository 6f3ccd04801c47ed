"""Turns of weight 0 and, if asked for, thoughts stay in the text and out of the loss."""

from __future__ import annotations

import pytest

from tests.data.tiny_tokenizers import make_tokenizer
from trueup.data.encoder import Policy, encode_examples
from trueup.data.examples import Chat, Message, Pair
from trueup.data.formats import RowProblem, parse_row
from trueup.data.registry import DatasetSpec
from trueup.data.templates import load_template

THOUGHT = "<think>\nhm\n</think>\n\n"


def turn(role: str, content: str, **weight) -> dict:
    return {"role": role, "content": content, **weight}


def chat(*turns: dict) -> Chat:
    example = parse_row(DatasetSpec("mine", "test"), 0, {"messages": list(turns)}, "chat")
    assert isinstance(example, Chat)
    return example


def trained_texts(example, name: str = "qwen", **policy) -> list[list[str]]:
    """The trained stretches of each encoded example, as text."""
    template = load_template(make_tokenizer(name), name)
    dataset, tally = encode_examples([example], template, Policy(500, **policy), workers=1)
    assert not tally.dropped or not len(dataset)
    texts = []
    for encoded in dataset:
        for answer in encoded.answers:
            ids = [int(i) if m else -1 for i, m in zip(answer.ids, answer.mask, strict=True)]
            runs: list[list[int]] = [[]]
            for i in ids:
                runs.append([]) if i < 0 else runs[-1].append(i)
            texts.append([template.tokenizer.decode(run) for run in runs if run])
    return texts


@pytest.mark.parametrize("key", ["weight", "loss_weight"])
def test_an_answer_of_weight_0_is_context(key: str):
    example = chat(
        turn("user", "a", **{key: 0.0}), turn("assistant", "no", **{key: 0}),
        turn("user", "b"), turn("assistant", "yes", **{key: 1.0}), turn("user", "c"), turn("assistant", "sure"),
    )  # fmt: skip
    assert [message.trained for message in example.messages] == [True, False, True, True, True, True]
    assert trained_texts(example) == [["yes<|im_end|>", "sure<|im_end|>"]]
    assert trained_texts(example, mask_history=True) == [["sure<|im_end|>"]]


def test_where_each_answer_is_an_example_those_of_weight_0_are_left_out():
    turns = [turn("user", "a"), turn("assistant", f"{THOUGHT}no", weight=0), turn("user", "b")]
    example = chat(*turns, turn("assistant", f"{THOUGHT}yes"))
    assert trained_texts(example, "qwen3") == [[f"{THOUGHT}yes<|im_end|>"]]


def test_a_chat_of_weight_0_throughout_is_dropped_with_a_reason():
    example = chat(turn("user", "a"), turn("assistant", "no", weight=0))
    template = load_template(make_tokenizer("qwen"), "qwen")
    dataset, tally = encode_examples([example], template, Policy(500), workers=1)
    assert not len(dataset) and tally.dropped[0][:2] == ("mine:0", "nothing to train")


@pytest.mark.parametrize("turns", [
    (turn("user", "a"), turn("assistant", "b", weight=0.5)),
    (turn("user", "a", loss_weight=1.0), turn("assistant", "b")),
])  # fmt: skip
def test_weights_that_cannot_be_kept_are_a_problem_of_their_row(turns):
    with pytest.raises(RowProblem, match="weighted turn"):
        chat(*turns)


def test_thoughts_are_left_out_of_the_loss_if_asked_for():
    example = chat(turn("user", "a"), turn("assistant", f"{THOUGHT}yes"))
    assert trained_texts(example, "qwen3") == [[f"{THOUGHT}yes<|im_end|>"]]
    assert trained_texts(example, "qwen3", mask_thinking=True) == [["yes<|im_end|>"]]
    plain = chat(turn("user", "a"), turn("assistant", "yes"))
    assert trained_texts(plain, "qwen", mask_thinking=True) == [["yes<|im_end|>"]]


def test_thoughts_of_pairs_are_left_out_too_and_the_ids_stay():
    sides = [(Message("assistant", f"{THOUGHT}{text}"),) for text in ("yes", "no")]
    pair = Pair((Message("user", "a"),), sides[0], sides[1], "mine:0")
    assert trained_texts(pair, "qwen3", mask_thinking=True) == [["yes<|im_end|>"], ["no<|im_end|>"]]
    template = load_template(make_tokenizer("qwen3"), "qwen3")
    kept, masked = (
        encode_examples([pair], template, Policy(500, mask_thinking=masks), workers=1)[0][0] for masks in (False, True)
    )
    for a, b in zip(kept.answers, masked.answers, strict=True):
        assert a.ids.tolist() == b.ids.tolist() and a.mask.sum() > b.mask.sum()
