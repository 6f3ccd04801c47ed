"""Unsloth's names on trueup: `from trueup.unsloth import FastLanguageModel`.

What is loaded is a plain transformers model, and what gets an adapter a plain peft model, for the trainers of
`trueup.trl`. With `load_in_4bit` its frozen weights are bitsandbytes' nf4, as there.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft import get_peft_model as attach
from torch import nn

from trueup import api
from trueup.config.load import load_config
from trueup.errors import ConfigError
from trueup.models.load import pick_device, pick_dtype
from trueup.models.plain import load_plain
from trueup.models.tokenizer import load_tokenizer
from trueup.trl.trainers import (
    DPOTrainer,
    GRPOTrainer,
    KTOTrainer,
    ORPOTrainer,
    RewardTrainer,
    SFTTrainer,
)

__all__ = [
    "DPOTrainer", "FastLanguageModel", "FastModel", "GRPOTrainer", "KTOTrainer", "ORPOTrainer", "PatchDPOTrainer",
    "RewardTrainer", "SFTTrainer", "is_bf16_supported", "is_bfloat16_supported",
]  # fmt: skip

log = logging.getLogger("trueup")

#: arguments that ask for what happens anyway at these values.
_LOADED_ANYWAY = {
    "fast_inference": False,
    "fix_tokenizer": True,
    "use_exact_model_name": False,
    "rope_scaling": None,
    "random_state": 3407,
    "max_lora_rank": 64,
    "gpu_memory_utilization": 0.6,
    "disable_log_stats": True,
}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class FastLanguageModel:
    """Loading a model, and putting an adapter on it."""

    @staticmethod
    def from_pretrained(
        model_name: str,
        max_seq_length: int = 2048,
        dtype: torch.dtype | None = None,
        load_in_4bit: bool | None = None,
        load_in_8bit: bool = False,
        full_finetuning: bool = False,
        token: str | None = None,
        device_map: Any = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
        use_gradient_checkpointing: Any = "unsloth",
        **more: Any,
    ) -> tuple[nn.Module, Any]:
        """(model, tokenizer). A directory that holds an adapter gives its base with that adapter.

        Args:
            max_seq_length: the longest example a trainer will train on, unless its config says another.
            dtype: bf16 where the device has it, unless given.
            load_in_4bit: unset, the weights stay in `dtype`, which is said.

        Raises:
            ConfigError: for an argument that cannot be honoured. ModelError: the model cannot be loaded.
        """
        _refuse(more, "from_pretrained", _LOADED_ANYWAY)
        if load_in_4bit is None and not full_finetuning:
            log.warning("weights are loaded whole: load_in_4bit, which is on in Unsloth, is off here unless it is set")
        keys = {
            "model_name_or_path": str(model_name), "trust_remote_code": trust_remote_code,
            "load_in_4bit": bool(load_in_4bit), "load_in_8bit": load_in_8bit, "hf_hub_token": token,
            "model_revision": revision, "bf16": dtype == torch.bfloat16 if dtype is not None else None,
            "fp16": True if dtype == torch.float16 else None,
        }  # fmt: skip
        cfg = load_config({name: value for name, value in keys.items() if value is not None}, verb="infer")
        tokenizer = load_tokenizer(cfg.model)
        model: Any = load_plain(cfg.model, cfg.train)
        return _equip(model, max_seq_length), tokenizer

    @staticmethod
    def get_peft_model(
        model: Any,
        r: int = 16,
        target_modules: Sequence[str] | str = PROJECTIONS,
        lora_alpha: int = 16,
        lora_dropout: float = 0.0,
        bias: str = "none",
        use_gradient_checkpointing: Any = "unsloth",
        random_state: int = 3407,
        max_seq_length: int | None = None,
        use_rslora: bool = False,
        modules_to_save: Sequence[str] | None = None,
        init_lora_weights: bool = True,
        loftq_config: Any = None,
        layers_to_transform: Any = None,
        **more: Any,
    ) -> Any:
        """The model with a LoRA adapter to train. Memory for activations is found by the run itself."""
        at_rest = {
            "temporary_location": None,
            "qat_scheme": None,
            "layers_pattern": None,
            "finetune_vision_layers": None,
        }
        _refuse({
            **{name: value for name, value in more.items() if name not in at_rest},
            **({} if bias == "none" else {"bias": bias}),
            **({} if init_lora_weights is True else {"init_lora_weights": init_lora_weights}),
            **({"loftq_config": loftq_config} if loftq_config else {}),
            **({"modules_to_save": modules_to_save} if modules_to_save else {}),
            **({"layers_to_transform": layers_to_transform} if layers_to_transform else {}),
        }, "get_peft_model")  # fmt: skip
        if isinstance(model, PeftModel):
            raise ConfigError("the model has an adapter already", where="get_peft_model", fix="train that one")
        targets = target_modules if isinstance(target_modules, str) else list(target_modules)
        config = LoraConfig(
            task_type="CAUSAL_LM", r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, target_modules=targets,
            use_rslora=use_rslora,
        )  # fmt: skip
        longest = max_seq_length or getattr(model, "max_seq_length", 2048)
        with torch.random.fork_rng():
            torch.manual_seed(random_state)
            return _equip(attach(model, config), longest)

    @staticmethod
    def for_inference(model: nn.Module) -> nn.Module:
        """The model, ready to generate."""
        return model.eval()

    @staticmethod
    def for_training(model: nn.Module, use_gradient_checkpointing: bool = True) -> nn.Module:
        """The model, ready to train; a run makes it so itself."""
        return model.train()


FastModel = FastLanguageModel


def PatchDPOTrainer() -> None:  # noqa: N802 (Unsloth's name)
    """Nothing: there is nothing to patch."""


def is_bfloat16_supported() -> bool:
    """Whether the device a run would take multiplies in bf16."""
    return pick_dtype(pick_device("auto"), None, None) == torch.bfloat16


is_bf16_supported = is_bfloat16_supported


def _equip(model: Any, max_seq_length: int) -> Any:
    """Unsloth's attributes and methods of a model."""
    model.max_seq_length = max_seq_length
    model.save_pretrained_merged = MethodType(_save_merged, model)
    for name in ("push_to_hub_merged", "save_pretrained_gguf", "push_to_hub_gguf"):
        setattr(model, name, MethodType(_later(name), model))
    return model


def _save_merged(
    model: Any, save_directory: str, tokenizer: Any = None, save_method: str = "merged_16bit", **_: Any
) -> None:
    """Write the model with its adapter folded in (`merged_16bit`), or the adapter alone (`lora`)."""
    if save_method == "lora":
        model.save_pretrained(save_directory)
        if tokenizer is not None:
            tokenizer.save_pretrained(save_directory)
        return
    if save_method not in ("merged_16bit", "merged"):
        raise ConfigError(
            f"save_method {save_method!r} cannot be honoured", where="save_pretrained_merged",
            expected="merged_16bit or lora",
        )  # fmt: skip
    narrow = torch.float16 if model.dtype == torch.float16 else torch.bfloat16
    api.load(model, tokenizer=tokenizer).merge(Path(save_directory), narrow)


def _later(name: str) -> Any:
    def refuse(model: Any, *_: Any, **__: Any) -> None:
        raise ConfigError(
            f"{name} is not supported", where=name,
            fix="save_pretrained_merged writes the merged model, and `trueup export` that as GGUF",
        )  # fmt: skip

    return refuse


def _refuse(given: dict[str, Any], where: str, at_rest: dict[str, Any] | None = None) -> None:
    at_rest = at_rest or {}
    if other := [name for name, value in given.items() if name not in at_rest or value != at_rest[name]]:
        raise ConfigError(
            f"{', '.join(f'`{name}`' for name in other)} cannot be honoured", where=where,
            fix="drop it; `trueup help keys` lists what a run can be told",
        )  # fmt: skip
