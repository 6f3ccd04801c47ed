"""A model that a Python program hands over: lent to a run, trained in place, and given back as it is known there.

While it is lent, the model is what a run would have loaded: its LoRA adapter is taken off and read like one from a
directory, its weights are in the run's device and dtype. Afterwards it has one adapter again, the trained one, and
transformers' own attention and classes. The reverse of all that a run does to a model is in `give_back`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel

from trueup.errors import ModelError
from trueup.models.fused import unfuse
from trueup.models.quantise import is_packed, settle, unsettle

TRAINED = "default"  # peft's own name for an adapter, and that of the one a run trains


class GivenModel:
    """A transformers model, or a peft model with one LoRA adapter.

    Attributes:
        model: what the program holds; after a run that put an adapter on it, the peft model with that adapter.
        adapter: (config, tensors in fp32) of its adapter while it is lent.
    """

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        self.model = model
        self.adapter: tuple[LoraConfig, dict[str, Tensor]] | None = None
        self._lent: tuple[PreTrainedModel, str | None] | None = None  # with its own attention
        self._wrapped: nn.Module | None = None
        self._settled = False  # whether its quantised layers computed otherwise before

    @property
    def base(self) -> PreTrainedModel:
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def name(self) -> str | None:
        """Where its base came from, as far as it knows."""
        return getattr(self.base, "name_or_path", "") or None

    @property
    def has_adapter(self) -> bool:
        return isinstance(self.model, PeftModel)

    def lend(self, device: torch.device, dtype: torch.dtype, auto_class: Any, key: str) -> PreTrainedModel:
        """The base, without its adapter, on a device and in a dtype. Raises ModelError if a run has no use for it."""
        base = self.base
        _check(self.model, base, auto_class, key)
        if isinstance(self.model, PeftModel):
            self.adapter = _take_off(self.model)
            self._wrapped = self.model
        base.to(device)
        self._settled = bool(settle(base))
        for name, parameter in base.named_parameters():
            # Buffers keep their dtype: RoPE's frequencies are fp32 in every model. Packed weights are no such numbers.
            if not is_packed(base.get_submodule(name.rpartition(".")[0])):
                parameter.data = parameter.data.to(dtype)
        self._lent = base, base.config._attn_implementation
        return base

    def used_as(self, model: nn.Module) -> None:
        """Hear what a run has made of the base."""
        self._wrapped = model

    def give_back(self) -> None:
        """Put the model into the state in which transformers and peft know it, with what it has learnt."""
        if self._lent is None:
            return
        base, attention = self._lent
        unfuse(base)
        if self._settled:
            unsettle(base)
        base.set_attn_implementation(attention)
        if base.is_activation_checkpointing:
            base.activation_checkpointing_disable()
        if isinstance(self._wrapped, PeftModel):
            _tidy(self._wrapped)
            if not isinstance(self.model, PeftModel):
                self.model = self._wrapped
        base.eval()
        self._lent = self.adapter = self._wrapped = None


def _check(model: nn.Module, base: PreTrainedModel, auto_class: Any, key: str) -> None:
    problem = None
    if type(base) not in auto_class._model_mapping.values():
        wanted = "AutoModelFor" + auto_class.__name__.removeprefix("AutoModelFor")
        problem = f"a {type(base).__name__} is not what this run trains", f"load it with {wanted}, or give its name"
    elif not isinstance(model, PeftModel) and any(".lora_" in name for name, _ in base.named_parameters()):
        problem = "it carries an adapter that it does not know of", "give the peft model that get_peft_model returned"
    if problem:
        raise ModelError(f"the model in memory cannot be used: {problem[0]}", where=key, fix=problem[1])


def _take_off(model: PeftModel) -> tuple[LoraConfig, dict[str, Tensor]]:
    """(config, tensors) of the only adapter, which the base has no longer."""
    config = model.peft_config.get(TRAINED)
    plain = isinstance(config, LoraConfig) and len(model.peft_config) == 1
    if not plain or config.modules_to_save or config.use_dora or config.bias != "none":
        raise ModelError(
            "the peft model in memory has something else than one plain LoRA adapter called 'default'",
            where="adapter_name_or_path", expected="get_peft_model(model, LoraConfig(…)), without modules_to_save, "
            "DoRA or biases", fix="save it, and give base and adapter by their directories",
        )  # fmt: skip
    state = get_peft_model_state_dict(model, adapter_name=TRAINED, save_embedding_layers=False)
    tensors = {key: tensor.detach().float().cpu().clone() for key, tensor in state.items()}
    base = model.base_model.unload()
    if hasattr(base, "peft_config"):
        del base.peft_config
    return config, tensors


def _tidy(model: PeftModel) -> None:
    """Leave the one adapter that was trained, or acted, under peft's own name."""
    for name in list(model.peft_config):
        if name != TRAINED:
            model.delete_adapter(name)
    model.set_adapter(TRAINED)


def shape_of(adapter: LoraConfig) -> Mapping[str, Any]:
    """The keys of a config that describe an adapter of this shape."""
    targets = adapter.target_modules
    return {
        "lora_rank": adapter.r,
        "lora_alpha": adapter.lora_alpha,
        "lora_dropout": adapter.lora_dropout,
        "use_rslora": adapter.use_rslora,
        "lora_target": sorted(targets) if isinstance(targets, set | list | tuple) else targets,
    }
