"""LoRA adapters: where a run starts from, what it trains, and what it saves.

Three rules (docs/training.md tells them to users):
 * The reference is base + the adapters the run starts from.
 * A starting adapter of the wanted shape is continued; otherwise a new one is trained on top of it.
 * What is saved stands on the root base alone: starting adapters and the new one are concatenated along the rank,
   B·A = [B₁s₁ B₂s₂]·[A₁; A₂], so plain peft on the original base gives the trained policy.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from trueup import memory
from trueup.errors import ModelError, Problem

TRAINED = "default"  # peft's own name for the adapter that is saved at the top of a directory
REFERENCE = "reference"
WEIGHTS_FILE = "adapter_model.safetensors"

StateDict = dict[str, Tensor]
Part = tuple[LoraConfig, StateDict]


@dataclass
class Adapters:
    """The LoRA adapters on a model. `frozen` carry the start, `TRAINED` is what the optimizer moves."""

    model: PeftModel
    base_name: str
    frozen: list[str] = field(default_factory=list)
    frozen_parts: list[Part] = field(default_factory=list)  # as they were read, in fp32, to be saved again
    continued: bool = False
    masters: StateDict = field(default_factory=dict)  # fp32, by parameter: what a continued adapter's files hold

    def activate(self, names: Sequence[str]) -> None:
        """Make exactly these adapters act; gradients flow to the trained one only."""
        self.model.base_model.set_adapter(list(names) if len(names) > 1 else names[0])
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(belongs_to(name, TRAINED))

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """The model as it stood before the first step: starting adapters on, the trained one off."""
        start = [REFERENCE] if self.continued else []
        names = [*self.frozen, *start]
        if not names:
            with self.model.disable_adapter():
                yield
            return
        self.activate(names)
        try:
            yield
        finally:
            self.activate([*self.frozen, TRAINED])

    def save(self, directory: Path, masters: Mapping[str, Tensor]) -> None:
        """Write adapter_config.json and adapter_model.safetensors (fp32 masters) that stand on the root base."""
        parts = [*self.frozen_parts, _read_part(self.model, TRAINED, masters)]
        config, state = parts[0] if len(parts) == 1 else concatenate(parts, _module_names(self.model))
        config = copy.deepcopy(config)
        config.base_model_name_or_path = self.base_name
        config.inference_mode = True
        directory.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(str(directory))
        save_file(
            {k: v.contiguous() for k, v in state.items()},
            directory / WEIGHTS_FILE,
            {"format": "pt"},
        )


def belongs_to(path: str, adapter: str) -> bool:
    """Whether a parameter of this path is one of an adapter's."""
    return f".{adapter}." in path or path.endswith(f".{adapter}")


def attach_lora(
    base: PreTrainedModel,
    wanted: LoraConfig,
    starts: Sequence[str | Path],
    base_name: str,
    create_new: bool = False,
) -> Adapters:
    """Attach starting adapters and the one to train.

    Args:
        base: the root base model, without adapters.
        wanted: shape of the adapter the config asks for.
        starts: directories of adapters to start from, applied in sum.
        base_name: what the saved adapter names as its base.
        create_new: always train a new adapter on top, even if the last start has the wanted shape.

    Raises:
        ModelError: a start does not fit the base (C11), or cannot be carried along.
    """
    _check_targets(base, wanted)
    loaded = [_load_part(base, path) for path in starts]
    in_memory = bool(starts) and memory.is_name(starts[-1])  # it is this adapter that its owner wants trained
    continued = bool(loaded) and not create_new and (in_memory or _same_shape(base, loaded[-1][0], wanted))
    frozen_parts = loaded[:-1] if continued else loaded
    _refuse_uncarriable(frozen_parts, starts)

    config = copy.deepcopy(loaded[-1][0] if continued else wanted)
    config.inference_mode = False
    config.lora_dropout = wanted.lora_dropout
    model = _wrap(base, config, TRAINED)
    adapters = Adapters(model, base_name, continued=continued)
    if continued:
        _fill(model, TRAINED, loaded[-1], starts[-1])
        model.add_adapter(REFERENCE, _without_dropout(config))
        _fill(model, REFERENCE, loaded[-1], starts[-1])
        adapters.masters = _by_parameter(model, TRAINED, loaded[-1])
    for index, (part, path) in enumerate(zip(frozen_parts, starts, strict=False)):
        name = f"start_{index}"
        model.add_adapter(name, _without_dropout(part[0]))
        _fill(model, name, part, path)
        adapters.frozen.append(name)
        adapters.frozen_parts.append((part[0], {key: tensor.float() for key, tensor in part[1].items()}))
    _match_dtype(model, base.dtype)
    adapters.activate([*adapters.frozen, TRAINED])
    return adapters


def attach_frozen(base: PreTrainedModel, starts: Sequence[str | Path]) -> PreTrainedModel | PeftModel:
    """The base with adapters acting on it in sum, nothing trained; unmerged, for bf16 weights would round them off."""
    if not starts:
        return base
    parts = [_load_part(base, path) for path in starts]
    names = [TRAINED if memory.is_name(path) else f"start_{index}" for index, path in enumerate(starts)]
    model = _wrap(base, copy.deepcopy(parts[0][0]), names[0])
    for name, part, path in zip(names, parts, starts, strict=True):
        if name != names[0]:
            model.add_adapter(name, copy.deepcopy(part[0]))
        _fill(model, name, part, path)
    _match_dtype(model, base.dtype)
    model.base_model.set_adapter(names if len(names) > 1 else names[0])
    return model.requires_grad_(False).eval()


def add_frozen(model: PreTrainedModel | PeftModel, names: Sequence[str], paths: Sequence[str | Path]) -> PeftModel:
    """More adapters, under names of their own, on a model or beside those it has; which of them act, others decide.

    Raises:
        ModelError: one does not fit the base; the model is as it was then.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    parts = [_load_part(base, path) for path in paths]
    added = []
    try:
        for name, part, path in zip(names, parts, paths, strict=True):
            if isinstance(model, PeftModel):
                model.add_adapter(name, copy.deepcopy(part[0]))
            else:
                model = _wrap(model, copy.deepcopy(part[0]), name)
            added.append(name)
            _fill(model, name, part, path)
    except ModelError:
        for name in added:
            model.delete_adapter(name)  # type: ignore[union-attr]
        raise
    assert isinstance(model, PeftModel)
    _match_dtype(model, base.dtype)
    for path, parameter in model.named_parameters():
        if any(belongs_to(path, name) for name in names):
            parameter.requires_grad_(False)
    return model


def attach_alone(base: PreTrainedModel, path: str | Path) -> PeftModel:
    """The base with one adapter as peft itself loads it, to be trained on. Raises ModelError if it does not fit."""
    config, _ = part = _load_part(base, path)
    config.inference_mode = False
    model = _wrap(base, config, TRAINED)
    _fill(model, TRAINED, part, path)
    return model


def merge_adapters(base: PreTrainedModel, starts: Sequence[str | Path]) -> PreTrainedModel:
    """Fold adapters into the base weights, in order: the starting point of full and freeze training, and of export."""
    for path in starts:
        part = _load_part(base, path)
        model = _wrap(base, part[0], TRAINED)
        _fill(model, TRAINED, part, path)
        base = model.merge_and_unload()
    if hasattr(base, "peft_config"):
        del base.peft_config
    return base


def _wrap(base: PreTrainedModel, config: LoraConfig, name: str) -> PeftModel:
    """`base` with a first adapter. peft's class for classifiers would want a head of its own in every adapter, also in
    those that a language model was trained with; its plain class keeps to what each config says.
    """
    make = get_peft_model if base.can_generate() else PeftModel
    return make(base, config, adapter_name=name, autocast_adapter_dtype=False)


def _match_dtype(model: PeftModel, dtype: torch.dtype) -> None:
    """Adapters in the base's dtype: peft makes those added later in fp32, and would cast every input to it.

    Only adapters are touched: a model keeps some tensors in fp32 on purpose, RoPE's frequencies among them.
    """
    for name, parameter in model.named_parameters():
        if ".lora_" in name or ".modules_to_save." in name:
            parameter.data = parameter.data.to(dtype)


def _load_part(base: PreTrainedModel, path: str | Path) -> Part:
    if memory.is_name(path):
        return memory.held(str(path), "adapter_name_or_path").adapter
    path = Path(path)
    config = PeftConfig.from_pretrained(str(path))
    if not isinstance(config, LoraConfig):
        raise ModelError(
            f"a {config.peft_type} adapter cannot be started from yet",
            where=str(path),
            expected="a LoRA adapter",
        )
    weights = path / WEIGHTS_FILE
    if not weights.is_file():
        raise ModelError(
            f"no {WEIGHTS_FILE}", where=str(path), expected="an adapter saved as safetensors",
            fix="convert a pickled adapter with `peft` on a machine that may trust it, and save it as safetensors",
        )  # fmt: skip
    config.base_model_name_or_path = base.name_or_path  # peft warns of two spellings of one base
    return config, load_file(weights)


def _fill(model: PeftModel, name: str, part: Part, path: str | Path) -> None:
    """Load a part's tensors into adapter `name`; every tensor must find its place (C11)."""
    expected = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    problems = [
        Problem(
            f"{key}: the adapter has {tuple(tensor.shape)}, the model wants {tuple(expected[key].shape)}",
            str(path),
        )
        if key in expected
        else Problem(f"{key}: no such module in the model", str(path))
        for key, tensor in part[1].items()
        if key not in expected or expected[key].shape != tensor.shape
    ]
    problems += [Problem(f"{key}: missing from the adapter", str(path)) for key in expected if key not in part[1]]
    if problems:
        more = [Problem(f"… and {len(problems) - 8} more tensors", str(path))] if len(problems) > 8 else []
        head = Problem(
            "the adapter does not fit this base model", str(path),
            fix="start from the base it was trained on (base_model_name_or_path in its adapter_config.json)",
        )  # fmt: skip
        raise ModelError([head, *problems[:8], *more])
    set_peft_model_state_dict(model, part[1], adapter_name=name)


def _by_parameter(model: PeftModel, name: str, part: Part) -> StateDict:
    """A part's tensors, fp32, under the names of the parameters of adapter `name` that they were loaded into."""
    parameters = {parameter.data_ptr(): path for path, parameter in model.named_parameters()}
    filled = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return {
        parameters[tensor.data_ptr()]: part[1][key].float()
        for key, tensor in filled.items()
        if tensor.data_ptr() in parameters
    }


def _same_shape(base: PreTrainedModel, start: LoraConfig, wanted: LoraConfig) -> bool:
    """Whether continuing `start` trains exactly what `wanted` describes."""

    def shape(config: LoraConfig):
        return (
            config.r, config.lora_alpha, config.use_rslora, config.use_dora, config.bias,
            config.rank_pattern, config.alpha_pattern, set(config.modules_to_save or ()), _targets(base, config),
        )  # fmt: skip

    return shape(start) == shape(wanted)


def _targets(base: PreTrainedModel, config: LoraConfig) -> set[str]:
    """Paths of the modules a LoRA config adapts."""
    linear = {
        name
        for name, module in base.named_modules()
        if isinstance(module, torch.nn.Linear) and _leaf(name) not in (config.modules_to_save or ())
    }
    if config.target_modules == "all-linear":
        head = base.get_output_embeddings()
        return {name for name in linear if base.get_submodule(name) is not head}
    return {name for name in linear if check_target_module_exists(config, name)}


def _check_targets(base: PreTrainedModel, wanted: LoraConfig) -> None:
    """Every name in `lora_target` and `additional_target` must be a module's; peft passes over those that are not.

    Raises:
        ModelError: with every name that matches nothing, and the names there are.
    """
    linear = sorted({_leaf(name) for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)})
    modules = [name for name, _ in base.named_modules() if name]
    problems = []
    for key, names in (("lora_target", wanted.target_modules), ("additional_target", wanted.modules_to_save)):
        if isinstance(names, str):
            if names != "all-linear" and (fault := _pattern_fault(names, modules)):
                problems.append(Problem(fault, key, f"a regular expression for whole paths such as {modules[-1]}"))
            continue
        for name in sorted(names or ()):
            if not any(path == name or path.endswith(f".{name}") for path in modules):
                expected = f"all, or some of {', '.join(linear)}"
                if key == "additional_target":
                    expected = "the last part of a module's path, such as embed_tokens or lm_head"
                problems.append(Problem(f"no module of the model is called {name!r}", key, expected))
    if problems:
        raise ModelError(problems)


def _pattern_fault(pattern: str, modules: Sequence[str]) -> str | None:
    try:
        found = any(re.fullmatch(pattern, path) for path in modules)
    except re.error as error:
        return f"{pattern!r} is no regular expression: {error}"
    return None if found else f"no module of the model matches {pattern!r}"


def _refuse_uncarriable(parts: Sequence[Part], starts: Sequence[str | Path]) -> None:
    problems = []
    for (config, _), path in zip(parts, starts, strict=False):
        if config.modules_to_save or config.use_dora or config.bias != "none":
            problems.append(
                Problem(
                    "this adapter holds fully trained modules, DoRA magnitudes or biases, which cannot be "
                    "concatenated with a new adapter",
                    str(path),
                    fix="ask for the same lora_rank, lora_alpha and lora_target so that it is continued, "
                    "or merge it into the base first",
                )
            )
    if problems:
        raise ModelError(problems)


def _without_dropout(config: LoraConfig) -> LoraConfig:
    """What does not train does not drop: the step-0 policy is its reference."""
    config = copy.deepcopy(config)
    config.lora_dropout = 0.0
    return config


def _read_part(model: PeftModel, name: str, masters: Mapping[str, Tensor]) -> Part:
    # The masters bear the model's parameter names, so peft picks and renames them like its own state dict.
    state = {**model.state_dict(), **masters}
    tensors = get_peft_model_state_dict(model, state_dict=state, adapter_name=name, save_embedding_layers=False)
    return model.peft_config[name], {key: tensor.detach().float().cpu() for key, tensor in tensors.items()}


def _scaling(config: LoraConfig, module: str, rank: int) -> float:
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), module), config.lora_alpha)
    return alpha / math.sqrt(rank) if config.use_rslora else alpha / rank


def concatenate(parts: Sequence[Part], module_names: Collection[str]) -> Part:
    """One LoRA adapter equal to the sum of several, by stacking ranks.

    Args:
        parts: (config, state dict as peft saves it, fp32) of each adapter.
        module_names: paths of all modules of the base, so that a short target name never matches too much.

    Returns:
        (config, state dict) with scaling 1 everywhere: the parts' scalings are folded into B.
    """
    modules: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    for config, state in parts:
        for key, a in state.items():
            if ".lora_A." not in key and ".lora_embedding_A" not in key:
                continue
            path = key.removeprefix("base_model.model.").split(".lora_")[0]
            scale = _scaling(config, path, a.shape[0])
            rows, columns = modules.setdefault(key, ([], []))
            rows.append(a)
            columns.append(state[key.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")] * scale)
    # Modules that train whole are the last adapter's alone, and exact: nothing before it carries any.
    state: StateDict = {key: tensor for key, tensor in parts[-1][1].items() if ".lora_" not in key}
    ranks: dict[str, int] = {}
    for key, (rows, columns) in modules.items():
        state[key] = torch.cat(rows, dim=0)
        state[key.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")] = torch.cat(columns, dim=1)
        ranks[key.removeprefix("base_model.model.").split(".lora_")[0]] = state[key].shape[0]
    config = copy.deepcopy(parts[-1][0])
    config.target_modules, config.r, config.rank_pattern = _describe_ranks(ranks, module_names)
    config.lora_alpha = config.r
    config.alpha_pattern = dict(config.rank_pattern)
    config.use_rslora = False
    config.lora_dropout = 0.0
    config.init_lora_weights = True
    return config, state


def _describe_ranks(ranks: Mapping[str, int], module_names: Collection[str]) -> tuple[set[str], int, dict[str, int]]:
    """(target modules, default rank, rank pattern): by leaf name where that says the same, else by full path."""
    values = list(ranks.values())
    default = max(set(values), key=values.count)
    by_leaf: dict[str, set[int]] = {}
    for path, rank in ranks.items():
        by_leaf.setdefault(_leaf(path), set()).add(rank)
    namesakes = {name for name in module_names if _leaf(name) in by_leaf}
    if namesakes == set(ranks) and all(len(found) == 1 for found in by_leaf.values()):
        leaf_rank = {leaf: found.pop() for leaf, found in by_leaf.items()}
        return (
            set(leaf_rank),
            default,
            {leaf: rank for leaf, rank in leaf_rank.items() if rank != default},
        )
    return set(ranks), default, {path: rank for path, rank in ranks.items() if rank != default}


def _leaf(path: str) -> str:
    return path.rsplit(".", 1)[-1]


def _module_names(model: PeftModel) -> set[str]:
    names = (name.removeprefix("base_model.model.") for name, _ in model.named_modules())
    return {name for name in names if ".lora_" not in name and not name.endswith(".base_layer")}
