"""Small tokenizers of the kinds that exist, trained in a moment on a few sentences."""

from __future__ import annotations

import json
from functools import cache

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from trueup.data.words import PATTERNS

TEXTS = [
    "Hello there, how are you today? I am fine. The quick brown fox jumps over the lazy dog.",
    "User: Human: Assistant: System: hello answer question reasoning thinking system user assistant model",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "A chat between a curious user and an artificial intelligence assistant. ### Instruction: ### Response:",
    "你好，世界。今天天气很好。我们一起学习语言模型。你是谁？我是一个助手。",
    "line one\nline two\n\nline three\n    indented\n\ttabbed  double  spaces",
    "def add(a, b):\n    return a + b\n",
] * 3

#: Special tokens of each family: (all of them, bos, eos, pad).
FAMILIES: dict[str, tuple[list[str], str | None, str | None, str | None]] = {
    "qwen": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None, "<|im_end|>", "<|endoftext|>"),
    "qwen3": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None, "<|im_end|>", "<|endoftext|>"),
    "qwen3_nothink": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None, "<|im_end|>", "<|endoftext|>"),
    "chatml": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None, "<|endoftext|>", None),
    "llama2": (["<unk>", "<s>", "</s>"], "<s>", "</s>", None),
    "llama3": (
        [
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
            "<|eom_id|>",
            "<|reserved_special_token_0|>",
            "<|finetune_right_pad_id|>",
        ],
        "<|begin_of_text|>",
        "<|end_of_text|>",
        None,
    ),
    "mistral": (["<unk>", "<s>", "</s>", "[INST]", "[/INST]"], "<s>", "</s>", None),
    "gemma": (
        ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"],
        "<bos>",
        "<eos>",
        "<pad>",
    ),
    "glm4": (
        [
            "<|endoftext|>",
            "[gMASK]",
            "<sop>",
            "<|system|>",
            "<|user|>",
            "<|assistant|>",
            "<|observation|>",
        ],
        None,
        "<|endoftext|>",
        "<|endoftext|>",
    ),
    "chatglm3": (
        ["</s>", "[gMASK]", "sop", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"],
        None,
        "</s>",
        None,
    ),
    "baichuan2": (
        ["<unk>", "<s>", "</s>", "<reserved_106>", "<reserved_107>"],
        "<s>",
        "</s>",
        None,
    ),
    "phi": (
        ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|placeholder1|>"],
        "<s>",
        "<|endoftext|>",
        None,
    ),
    "deepseek": (
        ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"],
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        None,
    ),
    "deepseek3": (
        ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"],
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
    ),
    "alpaca": (["<unk>", "<s>", "</s>"], "<s>", "</s>", None),
    "vicuna": (["<unk>", "<s>", "</s>"], "<s>", "</s>", None),
    "default": (["<|endoftext|>"], None, "<|endoftext|>", None),
    "empty": (["<|endoftext|>"], None, "<|endoftext|>", None),
}

#: Added tokens that are not special: they are written by models and headers alike.
ORDINARY_ADDED = {
    "qwen": ["<tool_call>", "</tool_call>"],
    "qwen3": ["<think>", "</think>"],
    "deepseek3": ["<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"],
}


@cache
def _byte_level(special: tuple[str, ...]) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = Regex(PATTERNS["qwen2"])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(split, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer.to_str()


@cache
def _sentencepiece_like(special: tuple[str, ...]) -> str:
    """BPE over ▁-marked text with byte fallback, a ▁ before every text: as Llama 2's."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        special_tokens=["<unk>", *[t for t in special if t != "<unk>"], *byte_tokens],
        show_progress=False,
        max_token_length=12,
    )
    words = [word for text in TEXTS for word in text.replace("\n", " ").split(" ")]
    tokenizer.train_from_iterator(words, trainer)
    state = json.loads(tokenizer.to_str())  # byte tokens are vocabulary, not added tokens
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] not in byte_tokens]
    return json.dumps(state)


def make_tokenizer(
    family: str = "qwen", kind: str = "byte_level", adds_bos: bool | None = None
) -> PreTrainedTokenizerFast:
    """A tokenizer with `family`'s special tokens; kinds: byte_level, sentencepiece, metaspace.

    `adds_bos`: whether plain text is opened with BOS; by default if the family has one.
    """
    special, bos, eos, pad = FAMILIES[family]
    if bos and bos not in special:
        special = [bos, *special]
    build = _byte_level if kind == "byte_level" else _sentencepiece_like
    backend = Tokenizer.from_str(build(tuple(special)))
    if kind == "metaspace":  # the newer way to the same end: only what opens a string gets a ▁
        backend.normalizer = None
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    backend.add_tokens([AddedToken(token, normalized=False) for token in ORDINARY_ADDED.get(family, [])])
    if bos and adds_bos is not False:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, backend.token_to_id(bos))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        unk_token="<unk>" if "<unk>" in special else None,
        additional_special_tokens=[t for t in special if t not in (bos, eos, pad)],
        clean_up_tokenization_spaces=False,
    )
