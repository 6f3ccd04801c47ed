"""Text as tokens come: whole characters, no beginning of a stop text, nothing lost."""

from __future__ import annotations

import numpy as np
import pytest

from tests.data.tiny_tokenizers import make_tokenizer
from trueup.rollout.text_stream import TextStream, decoder

TOKENIZER = make_tokenizer("qwen")
TEXTS = ["plain words, and more of them", "naïve 🙂🙃 ✨", "世界你好，世界", "a\n\n  b\t", "🇨🇭 👩‍👩‍👧 é", ""]


def read(ids, stops=()):
    stream = TextStream(decoder(TOKENIZER, True), stops)
    pieces, tokens = [], []
    for token in ids:
        text, out, stopped = stream.push(token, None)
        pieces.append(text)
        tokens += [i for (i, _) in out]
        if stopped:
            return pieces, tokens, True
    text, out = stream.finish()
    return [*pieces, text], tokens + [i for (i, _) in out], False


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_characters_and_together_the_text(text):
    ids = TOKENIZER(text * 5, add_special_tokens=False)["input_ids"]
    pieces, tokens, stopped = read(ids)
    assert "".join(pieces) == TOKENIZER.decode(ids, skip_special_tokens=True) == text * 5
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert tokens == ids and not stopped


def test_bytes_that_are_no_characters_come_out_as_the_tokenizer_decodes_them():
    rng = np.random.default_rng(0)
    for _ in range(30):
        ids = rng.integers(0, len(TOKENIZER), 60).tolist()
        pieces, tokens, _ = read(ids)
        assert "".join(pieces) == TOKENIZER.decode(ids, skip_special_tokens=True)
        assert tokens == ids


@pytest.mark.parametrize("stop", ["STOP", "P", " and", "多", "🙃", "\n\n"])
def test_a_stop_text_ends_the_answer_wherever_tokens_begin(stop):
    text = f"half STO of it, an🙂 多{stop}ST and what follows STOP"
    expected = text[: text.index(stop)]
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    pieces, tokens, stopped = read(ids, (stop, "never"))
    assert stopped and "".join(pieces) == expected
    so_far = ""
    for piece in pieces:
        so_far += piece
        assert expected.startswith(so_far)
    kept = TOKENIZER.decode(tokens)
    assert kept.startswith(expected) or expected.startswith(kept.rstrip("\N{REPLACEMENT CHARACTER}"))
    assert tokens == ids[: len(tokens)]


def test_the_beginning_of_a_stop_text_is_given_out_when_it_turns_out_to_be_none():
    ids = TOKENIZER("a STO b ST", add_special_tokens=False)["input_ids"]
    pieces, tokens, stopped = read(ids, ("STOP",))
    assert "".join(pieces) == "a STO b ST" and tokens == ids and not stopped
