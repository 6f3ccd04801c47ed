"""TRL's rows and adapters in trueup's words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trueup.data.given import GivenRows, rows_of
from trueup.errors import ConfigError, Problem
from trueup.rollout.worker import call

#: columns that hold text without a template where they hold plain text.
_SIDES = ("prompt", "completion", "chosen", "rejected")
#: fields of peft's LoraConfig → our keys.
_LORA = {
    "r": "lora_rank",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "target_modules": "lora_target",
    "modules_to_save": "additional_target",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}
#: fields that describe no adapter's shape.
_BESIDE = {
    "task_type",
    "inference_mode",
    "base_model_name_or_path",
    "revision",
    "peft_type",
    "auto_mapping",
    "peft_version",
}


def given_rows(dataset: Any, name: str) -> GivenRows:
    """Rows as TRL reads them: plain texts get no chat template."""
    rows = rows_of(dataset, name)
    sides = [rows[0][column] for column in _SIDES if column in rows[0]] if rows else []
    plain = bool(sides) and "prompt" in rows[0] and all(isinstance(side, str) for side in sides)
    return GivenRows(rows, "trl" if plain else "auto")


def formatted(dataset: Any, function: Callable[[Any], Any], name: str) -> list[dict[str, Any]]:
    """Rows of one text each, by a `formatting_func`: a row → its text, or a batch of columns → their texts."""
    rows = rows_of(dataset, name)
    texts = [function(row) for row in rows]
    if any(isinstance(text, list) for text in texts):
        texts = function({column: [row.get(column) for row in rows] for column in (rows[0] if rows else {})})
    if len(texts) != len(rows) or not all(isinstance(text, str) for text in texts):
        raise ConfigError("`formatting_func` does not give one text for each row", where="formatting_func")
    return [{"text": text} for text in texts]


def lora_keys(peft_config: Any, model_type: str | None) -> dict[str, Any]:
    """The keys of an adapter of this shape. Raises ConfigError for what no key says."""
    from peft import LoraConfig
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as USUAL

    if type(peft_config) is not LoraConfig:
        raise ConfigError(
            f"`peft_config` is {type(peft_config).__name__}", where="peft_config",
            expected="peft's LoraConfig (finetuning_type: lora)",
        )  # fmt: skip
    said, usual = peft_config.to_dict(), LoraConfig().to_dict()
    problems = [
        Problem(f"`peft_config` has {name}={value!r}, which has no key here", "peft_config", fix="drop it")
        for name, value in said.items()
        if name not in _LORA and name not in _BESIDE and value != usual[name]
    ]
    if problems:
        raise ConfigError(problems)
    keys = {key: said[name] for name, key in _LORA.items()}
    keys["lora_target"] = keys["lora_target"] or USUAL.get(model_type or "", ["all"])
    return {"finetuning_type": "lora", **{key: listed(value) for key, value in keys.items() if value is not None}}


def listed(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value


def quantization_keys(config: Any) -> dict[str, Any]:
    """The keys of transformers' BitsAndBytesConfig."""
    if config is None:
        return {}
    bits = 4 if config.load_in_4bit else 8 if config.load_in_8bit else None
    if bits != 4:
        return {"quantization_bit": bits} if bits else {}
    return {
        "quantization_bit": 4,
        "quantization_type": config.bnb_4bit_quant_type,
        "double_quantization": config.bnb_4bit_use_double_quant,
    }


def trl_reward(function: Callable[..., Any]) -> Callable[..., Any]:
    """A reward function as TRL calls it: where prompts are conversations, so are completions."""

    def reward(prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]) -> Any:
        own = columns.pop("prompt", prompts)
        said: Sequence[Any] = completions
        if own and isinstance(own[0], Sequence) and not isinstance(own[0], str):
            said = [[{"role": "assistant", "content": text}] for text in completions]
        return call(function, {
            **{name: list(values) for name, values in columns.items()}, "prompts": list(own), "completions": list(said)
        })  # fmt: skip

    reward.__name__ = getattr(function, "__name__", type(function).__name__)
    return reward


def is_conversation(row: Mapping[str, Any]) -> bool:
    """Whether a row holds turns rather than texts."""
    return any(isinstance(row.get(name), list) for name in ("messages", "conversations", "prompt", "completion"))
