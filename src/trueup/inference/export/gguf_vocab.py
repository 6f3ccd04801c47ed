"""A tokenizer as GGUF has it: tokens with their kinds, merges or scores, and the name of how it cuts text.

llama.cpp knows ways of cutting by name, and a wrong name tokenises wrongly without a word. So only what is known for
certain is written, and everything else is refused with its reason.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

import gguf
from transformers import PreTrainedTokenizerBase

from trueup.data.words import PATTERNS
from trueup.errors import ModelError

#: our name of a pattern → (llama.cpp's, whether it takes whole words that are tokens as they are).
_CUTS = {"qwen2": ("qwen2", False), "llama3": ("llama-bpe", True), "tekken": ("tekken", True)}
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>").fullmatch
_SPACE = "▁"


@dataclass
class Vocabulary:
    """What a GGUF file says of a tokenizer.

    Attributes:
        model: "gpt2" (byte-level BPE) or "llama" (sentencepiece).
        pre: llama.cpp's name of the way text is cut before merging.
        tokens, kinds: one an id, up to the rows of the embeddings.
    """

    model: str
    pre: str
    tokens: list[str]
    kinds: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    space_prefix: bool | None = None


def read_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int) -> Vocabulary:
    """The vocabulary of a fast tokenizer for `rows` embeddings.

    Raises:
        ModelError: it does something that no GGUF file can say for certain.
    """
    if not tokenizer.is_fast:
        raise _not_plain("it is no fast tokenizer")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    if model["type"] != "BPE":
        raise _not_plain(f"its model is {model['type']}, and not BPE")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise _not_plain("it marks where words begin or end")
    tokens, kinds = _tokens(state, rows, set(tokenizer.all_special_ids))
    if model.get("byte_fallback"):
        return _sentencepiece(state, tokens, kinds)
    pre = _cut(state)
    merges = [_spelt(merge) for merge in model["merges"]]
    return Vocabulary("gpt2", pre, tokens, kinds, merges)


def _not_plain(reason: str) -> ModelError:
    return ModelError(
        f"this tokenizer cannot be written as GGUF: {reason}", where="export_gguf",
        expected="byte-level BPE cut as GPT-2, Qwen 2, Llama 3, Tekken or SmolLM do, or sentencepiece BPE",
        fix="drop export_gguf; llama.cpp's convert_hf_to_gguf.py knows more tokenizers",
    )  # fmt: skip


def _tokens(state: dict[str, Any], rows: int, special_ids: set[int]) -> tuple[list[str], list[int]]:
    texts = {index: text for text, index in state["model"]["vocab"].items()}
    kinds = dict.fromkeys(texts, gguf.TokenType.NORMAL)
    for added in state["added_tokens"]:
        special = added["special"] or added["id"] in special_ids
        texts[added["id"]] = added["content"]
        kinds[added["id"]] = gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED
    if len(texts) > rows or max(texts) >= rows:
        raise _not_plain(f"it has {max(texts) + 1} tokens, and the model {rows} embeddings")
    count = range(rows)
    return (
        [texts.get(index, f"[PAD{index}]") for index in count],
        [int(kinds.get(index, gguf.TokenType.UNUSED)) for index in count],
    )


def _spelt(merge: str | list[str]) -> str:
    """A merge as two words; a space inside one is written as byte-level tokenizers write it."""
    pair = merge.split(" ") if isinstance(merge, str) else merge
    return " ".join(part.replace(" ", chr(ord(" ") + 256)) for part in pair)


# --- byte-level BPE ---------------------------------------------------------------------------


def _cut(state: dict[str, Any]) -> str:
    """llama.cpp's name of how a byte-level tokenizer cuts text."""
    normalizer = state["normalizer"]
    if normalizer is not None and normalizer["type"] != "NFC":  # which llama.cpp's Qwen leaves out, and few texts need
        raise _not_plain(f"it changes text before cutting it ({normalizer['type']})")
    steps = state["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps] if steps else [])
    kinds = [step["type"] for step in steps]
    if not kinds or kinds[-1] != "ByteLevel":
        raise _not_plain("it is not byte-level")
    byte_level = steps[-1]
    if byte_level.get("add_prefix_space"):
        raise _not_plain("it puts a space before every text")
    ignores = bool(state["model"].get("ignore_merges"))
    if kinds == ["ByteLevel"] and byte_level.get("use_regex", True) and not ignores:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and byte_level.get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not byte_level.get("use_regex", True):
        pattern, behaviour = steps[0]["pattern"].get("Regex"), steps[0]["behavior"]
        for name, (known, whole_words) in _CUTS.items():
            if pattern == PATTERNS[name] and behaviour == "Isolated" and ignores == whole_words:
                return known
    raise _not_plain("llama.cpp has no name that we know for how it cuts text")


# --- sentencepiece ----------------------------------------------------------------------------


def _sentencepiece(state: dict[str, Any], tokens: list[str], kinds: list[int]) -> Vocabulary:
    """Scores in place of merges: sentencepiece joins the neighbours whose union has the highest score.

    That is what the merges do if every way to put a token together from two others is among them; checked here.
    """
    model = state["model"]
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    rank: dict[str, int] = {}
    for number, (left, right) in enumerate(pairs):
        rank.setdefault(left + right, number)
    _check_closed(model["vocab"], set(pairs), rank)
    scores = [0.0] * len(tokens)
    unknown = model.get("unk_token")
    for index, token in enumerate(tokens):
        if _BYTE(token):
            kinds[index] = int(gguf.TokenType.BYTE)
        elif token == unknown:
            kinds[index] = int(gguf.TokenType.UNKNOWN)
        elif kinds[index] == gguf.TokenType.NORMAL:
            # A token that nothing is merged into is a single character: it never competes.
            scores[index] = -float(rank.get(token, len(pairs)))
    return Vocabulary("llama", "default", tokens, kinds, scores=scores, space_prefix=_space_prefix(state))


def _check_closed(vocab: dict[str, int], pairs: set[tuple[str, ...]], rank: dict[str, int]) -> None:
    for token in vocab:
        if _BYTE(token) or token not in rank:
            continue
        for cut in range(1, len(token)):
            if token[:cut] in vocab and token[cut:] in vocab and (token[:cut], token[cut:]) not in pairs:
                raise _not_plain(
                    f"its merges are no sentencepiece vocabulary's: {token[:cut]!r} and {token[cut:]!r} do not become "
                    f"{token!r}"
                )


def _space_prefix(state: dict[str, Any]) -> bool:
    """Whether text is opened with a space; and that spaces become ▁ and nothing else happens."""
    normalizer, cutter = state["normalizer"], state["pre_tokenizer"]
    if normalizer is None and cutter and cutter["type"] == "Metaspace" and cutter["replacement"] == _SPACE:
        if not cutter.get("split", True):
            return cutter["prepend_scheme"] != "never"
    elif normalizer is not None and cutter is None:
        steps = normalizer.get("normalizers", [normalizer])
        replaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
        if steps[-1] == replaces and [step["type"] for step in steps[:-1]] in ([], ["Prepend"]):
            return len(steps) == 2
    raise _not_plain("it does more than turning spaces into ▁")
