"""Adapters folded into a base: the model that is exported, and the same with adapters beside it, to compare with.

Both are fp32: adapters are folded into fp32 weights, and what is written is rounded once.
"""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoConfig, LlamaConfig, PreTrainedModel

from trueup import memory
from trueup.config.schema import ModelSection
from trueup.errors import ModelError, Problem
from trueup.models.adapters import attach_frozen, kind_of
from trueup.models.load import load_base
from trueup.models.policy import Policy
from trueup.models.tuners import KINDS

log = logging.getLogger("trueup")

_COMBINED = "combined"


@dataclass(frozen=True)
class Combination:
    """How several adapters become one change of the weights.

    Attributes:
        method: "sum", which adds what each does, or a `combination_type` of peft's `add_weighted_adapter`.
        weights: one an adapter; none means 1 each.
        density: share of values that the pruning methods keep.
        seed: of the random ones.
    """

    method: str = "sum"
    weights: tuple[float, ...] = ()
    density: float = 0.5
    seed: int = 42

    @property
    def plain(self) -> bool:
        return self.method == "sum" and not any(weight != 1 for weight in self.weights)


def check_starts(starts: Sequence[str], combination: Combination) -> list[Problem]:
    """What keeps adapters from being folded in as asked, from their settings alone."""
    configs = {path: PeftConfig.from_pretrained(path) for path in starts if not memory.is_name(path)}
    problems = [
        Problem(f"{path} is a {kind_of(config)} adapter", "adapter_name_or_path", "a LoRA adapter")
        for path, config in configs.items()
        if type(config) not in KINDS.values() or not (combination.plain or isinstance(config, LoraConfig))
    ]
    if problems or combination.plain:
        return problems
    for path, config in configs.items():
        beyond = ("modules_to_save", "use_dora", "target_parameters", "trainable_token_indices")
        whole = [name for name in beyond if getattr(config, name, None)]
        if config.bias != "none":
            whole.append("bias")
        if not isinstance(config.init_lora_weights, bool):
            whole.append(f"init_lora_weights: {config.init_lora_weights}")
        if whole and len(configs) > 1:
            problems.append(
                Problem(
                    f"{path} holds more than plain LoRA ({', '.join(whole)}), which cannot be weighed against others",
                    "merge_method",
                    fix="merge_method: sum without merge_weights",
                )  # fmt: skip
            )
    ranks = {path: max([config.r, *config.rank_pattern.values()]) for path, config in configs.items()}
    rows_and_columns = not combination.method.endswith("svd") and combination.method != "sum"
    if rows_and_columns and len(set(ranks.values())) > 1:
        shown = ", ".join(f"{path}: {rank}" for path, rank in ranks.items())
        problems.append(
            Problem(
                f"`merge_method: {combination.method}` needs adapters of one rank ({shown})",
                "merge_method",
                fix="merge_method: sum, which is exact, or "
                + ("svd" if combination.method == "linear" else f"{combination.method}_svd"),
            )  # fmt: skip
        )
    return problems


def load_beside(
    model: ModelSection,
    root: str,
    location: str,
    starts: Sequence[str],
    combination: Combination,
    device: torch.device,
    kind: type[Policy] = Policy,
) -> PreTrainedModel | PeftModel:
    """The model in fp32 with its adapters beside it, acting as they will once they are folded in.

    Raises:
        ModelError: the base cannot be loaded, or an adapter does not fit.
    """
    base = load_base(location, model, device, torch.float32, root, kind, quantised=False, adapters=starts)
    # A base that was quantised remembers how it was packed, and would be saved so: transformers works it out anew.
    base._weight_conversions = None  # type: ignore[assignment]
    for parameter in base.parameters():
        parameter.data = parameter.data.float()  # what such a base did not quantise keeps its own format
    attached = attach_frozen(base, starts)
    if isinstance(attached, PeftModel) and not combination.plain:
        _combine(attached, combination)
    return attached


def _combine(model: PeftModel, combination: Combination) -> None:
    """One adapter in place of several, by peft."""
    names = list(model.peft_config)
    weights = list(combination.weights) or [1.0] * len(names)
    method = "cat" if combination.method == "sum" else combination.method
    density = {"density": combination.density} if _prunes(method) else {}
    lora: Any = model.base_model
    torch.manual_seed(combination.seed)  # dare_… drops at random
    try:
        lora.add_weighted_adapter(names, weights, _COMBINED, combination_type=method, **density)
    except (ValueError, RuntimeError) as error:
        raise ModelError(
            f"peft cannot combine these adapters by {method}: {error}", where="merge_method",
            fix="use merge_method: sum, or adapters of one rank on the same modules",
        ) from error  # fmt: skip
    for module in model.modules():
        if isinstance(module, LoraLayer) and _COMBINED in module.scaling:
            module.scaling[_COMBINED] = 1.0  # weights and scalings are inside; with rsLoRA peft would scale again
    lora.set_adapter(_COMBINED)
    for name in names:
        model.delete_adapter(name)
    model.requires_grad_(False)


def _prunes(method: str) -> bool:
    return method.startswith(("ties", "dare", "magnitude"))


def fold(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The adapters that act, folded into their base, in place."""
    if not isinstance(model, PeftModel):
        return model
    _part_what_is_adapted(model.get_base_model())
    merged = model.merge_and_unload()
    if hasattr(merged, "peft_config"):
        del merged.peft_config
    _untie_what_differs(merged)
    return merged


def _part_what_is_adapted(model: PreTrainedModel) -> None:
    """Embeddings and head on one tensor, and an adapter on one of them only: folding it must not move the other."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    adapted = isinstance(head, BaseTunerLayer) or isinstance(embeddings, BaseTunerLayer)
    if head is not None and adapted and head.weight.data_ptr() == embeddings.weight.data_ptr():
        plain = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
        plain.weight = nn.Parameter(plain.weight.detach().clone(), requires_grad=False)


def _untie_what_differs(model: PreTrainedModel) -> None:
    """A head that shared the embeddings' weights, and does no longer, is saved as its own."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or not model.config.get_text_config().tie_word_embeddings:
        return
    if head.weight.data_ptr() == embeddings.weight.data_ptr():
        return
    if torch.equal(head.weight, embeddings.weight):
        head.weight = embeddings.weight
        return
    log.info("only one of embeddings and head was trained: they are written apart (tie_word_embeddings: false)")
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
    model.tie_weights()  # with nothing to tie, it forgets what was


def round_weights(model: PreTrainedModel, dtype: torch.dtype, keep: str | None = None) -> None:
    """Let an fp32 model's weights be such as `dtype` has, in place and still fp32; those below module `keep` stay.

    Raises:
        ModelError: one is too large for it.
    """
    largest = torch.finfo(dtype).max
    for name, parameter in model.named_parameters():
        if keep is not None and name.startswith(keep):
            continue
        if dtype == torch.float16 and float(parameter.data.abs().max()) > largest:
            raise ModelError(
                f"{name} holds values beyond float16's largest, {largest:.0f}", where="infer_dtype",
                fix="set infer_dtype: bfloat16 or float32",
            )  # fmt: skip
        parameter.data = parameter.data.to(dtype).float()


def cast(model: PreTrainedModel, dtype: torch.dtype, keep: str | None = None) -> None:
    """Keep the weights in `dtype`, in place; those below module `keep` stay as they are. Buffers keep their dtype."""
    for name, parameter in model.named_parameters():
        if keep is None or not name.startswith(keep):
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def load_written(
    directory: Path, model: ModelSection, device: torch.device, dtype: torch.dtype, kind: type[Policy] = Policy
) -> PreTrainedModel:
    """A directory that was just written, as transformers reads it: its own config says all, and the keys nothing."""
    plain = model.model_copy(update={"quantization_bit": None, "rope_scaling": None})
    return load_base(str(directory), plain, device, dtype, str(directory), kind)


def load_gguf(directory: Path, name: str, device: torch.device) -> PreTrainedModel:
    """A GGUF file's weights, in fp32, in the model that `directory` describes, as transformers reads them."""
    config = AutoConfig.from_pretrained(str(directory))
    if config.model_type == "mistral":  # GGUF calls it llama, which it is but for a window that such a file excludes
        values = config.to_dict()
        config = LlamaConfig(**{k: v for k, v in values.items() if k not in ("model_type", "architectures")})
    with redirect_stderr(sys.stderr if sys.stderr.isatty() else io.StringIO()):  # its bar is noise in a log file
        found = Policy.auto_class.from_pretrained(
            str(directory), gguf_file=name, config=config, dtype=torch.float32, device_map={"": device}
        )
    return found.eval()
