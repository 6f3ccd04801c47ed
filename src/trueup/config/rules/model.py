"""Which model, and in which form it is loaded."""

from __future__ import annotations

from typing import Any

from trueup.config.rules.rule import Rule

#: method → the bits it keeps weights in.
QUANTISED_BITS = {"bnb": (4, 8), "hqq": (1, 2, 3, 4, 8), "eetq": (8,), "torchao": (8,)}


def _impossible_bits(c: Any) -> bool:
    bits = QUANTISED_BITS.get(c.quantization_method)
    return bool(bits and c.quantization_bit and c.quantization_bit not in bits)


def _foreign_type(c: Any) -> bool:
    """Whether the number format is another method's."""
    if not c.quantization_bit or "quantization_type" not in c.explicit:
        return False
    return (c.quantization_type == "fp8") != (c.quantization_method == "torchao")


MODEL = Rule(
    ("model_name_or_path",),
    lambda c: not c.model_name_or_path,
    "`model_name_or_path` is missing",
    "name a model: a directory, a hub id, or builtin:sql-tiny",
)

#: How a base is quantised; training and inference alike.
QUANTISATION = [
    Rule(
        ("quantization_method", "quantization_bit"),
        lambda c: c.quantization_bit and c.quantization_method in ("gptq", "awq"),
        "GPTQ and AWQ quantise with the help of data, not while loading",
        "name a checkpoint that is quantised so, without quantization_bit; or set quantization_method: bnb",
    ),
    Rule(
        ("quantization_method", "quantization_bit"),
        _impossible_bits,
        "this `quantization_method` does not keep weights in so many bits",
        "; ".join(f"{name}: {', '.join(map(str, bits))}" for name, bits in QUANTISED_BITS.items())
        + " (torchao's 4-bit weights pass no gradient on)",
    ),
    Rule(
        ("quantization_type", "quantization_method"),
        _foreign_type,
        "`quantization_type: nf4` and `fp4` are bitsandbytes' formats of 4 bits, `fp8` is torchao's of 8 bits",
        "drop quantization_type",
    ),
]

RULES = [
    Rule(
        ("init_special_tokens", "new_special_tokens_config"),
        lambda c: c.init_special_tokens != "noise_init" and not c.new_special_tokens_config,
        "`init_special_tokens: desc_init` starts rows from descriptions, and there are none",
        "name a YAML file of tokens and their descriptions: new_special_tokens_config",
    ),
    Rule(
        ("quantization_bit", "finetuning_type"),
        lambda c: c.quantization_bit and c.finetuning_type in ("full", "freeze"),
        "a quantised base cannot be trained itself: `quantization_bit` excludes `finetuning_type: full` and `freeze`",
        "drop quantization_bit, or set finetuning_type: lora",
    ),
    *QUANTISATION,
    Rule(
        ("booster", "flash_attn"),
        lambda c: c.booster == "flash_attn" and c.flash_attn in ("disabled", "sdpa"),
        "`booster: flash_attn` asks for flash-attention, and `flash_attn` for another kernel",
        "drop one of the two",
    ),
    MODEL,
]
