"""What trains: adapters and where they start, layers."""

from __future__ import annotations

from typing import Any

from trueup.config.rules.rule import Rule


def _bad_pattern(pattern: dict[str, Any]) -> bool:
    return any(isinstance(value, bool) or not isinstance(value, int) or value < 1 for value in pattern.values())


RULES = [
    Rule(
        ("pissa_init", "quantization_bit"),
        lambda c: c.pissa_init and c.quantization_bit,
        "`pissa_init` changes the base's weights, and `quantization_bit` freezes them in few bits",
        "set loftq_init: true, which starts from what quantising has lost; or drop one of them",
    ),
    Rule(
        ("pissa_init", "loftq_init"),
        lambda c: c.pissa_init and c.loftq_init,
        "`pissa_init` and `loftq_init` both say where the adapter starts",
        "drop one of them",
    ),
    Rule(
        ("pissa_init", "use_dora"),
        lambda c: c.use_dora and (c.pissa_init or c.loftq_init),
        "an adapter with `use_dora` starts at the base itself: `pissa_init` and `loftq_init` have no part in it",
        "drop one of them",
    ),
    Rule(
        ("pissa_convert", "pissa_init"),
        lambda c: c.pissa_init and not c.pissa_convert,
        "`pissa_convert: false` would save an adapter for a base that exists nowhere",
        "drop it: what is saved stands on the original model, at twice the rank",
    ),
    Rule(
        ("use_llama_pro", "use_dora", "pissa_init", "loftq_init"),
        lambda c: c.use_llama_pro and c.finetuning_type == "lora" and (c.use_dora or c.pissa_init or c.loftq_init),
        "inserted blocks end in weights of 0, in which `use_dora`, `pissa_init` and `loftq_init` find nothing to "
        "start from",
        "drop these: plain LoRA and use_rslora train the blocks of `use_llama_pro`",
    ),
    Rule(
        ("rank_pattern", "alpha_pattern"),
        lambda c: _bad_pattern(c.rank_pattern) or _bad_pattern(c.alpha_pattern),
        "`rank_pattern` and `alpha_pattern` give whole numbers above 0 to names of layers",
        "as in rank_pattern: {q_proj: 16}",
    ),
    Rule(
        ("oft_rank", "oft_block_size"),
        lambda c: c.finetuning_type == "oft" and not c.oft_rank and not c.oft_block_size,
        "`oft_rank: 0` and `oft_block_size: 0` leave no blocks to rotate",
        "set one of them",
    ),
    Rule(
        ("freeze_trainable_layers", "finetuning_type"),
        lambda c: c.finetuning_type == "freeze" and c.freeze_trainable_layers == 0 and not c.freeze_extra_modules,
        "`freeze_trainable_layers: 0` trains nothing",
        "set it to the number of last layers to train",
    ),
]
