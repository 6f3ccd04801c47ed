"""Adapters: where a run starts from, what it trains, and what it saves.

Three rules (docs/training.md tells them to users):
 * The reference is base + the adapters the run starts from.
 * A starting adapter of the wanted shape is continued; otherwise a new one is trained on top of it.
 * What is saved stands on the root base alone: starting adapters and the new one are concatenated along the rank,
   B·A = [B₁s₁ B₂s₂]·[A₁; A₂], so plain peft on the original base gives the trained policy.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from trueup import memory
from trueup.errors import ModelError, Problem
from trueup.models.quantise import is_quantised
from trueup.models.rope import check_adapter, write_record
from trueup.models.rows import filled, lighten, put_rows, rows_of, with_rows, without_rows
from trueup.models.tuners import KINDS, check_targets, is_plain, same_shape, with_dropout_of, without_dropout
from trueup.models.vocabulary import grow, largest, refuse_missing

TRAINED = "default"  # peft's own name for the adapter that is saved at the top of a directory
REFERENCE = "reference"
WEIGHTS_FILE = "adapter_model.safetensors"
INITIAL_FILE = "initial_adapter.safetensors"  # of LoftQ: on a base that is not quantised, the difference to it acts

StateDict = dict[str, Tensor]
Part = tuple[Any, StateDict]  # peft's config, and tensors as peft saves them


@dataclass
class Adapters:
    """The adapters on a model. `frozen` carry the start, `TRAINED` is what the optimizer moves."""

    model: PeftModel
    base_name: str
    frozen: list[str] = field(default_factory=list)
    frozen_parts: list[Part] = field(default_factory=list)  # as they were read, in fp32, to be saved again
    continued: bool = False
    initial: Part | None = None  # what the trained one started as, fp32, where that was not nothing
    base_changed: bool = False  # by that start
    masters: StateDict = field(default_factory=dict)  # fp32, by parameter: what a continued adapter's files hold

    def activate(self, names: Sequence[str]) -> None:
        """Make exactly these adapters act; gradients flow to the trained one only."""
        self.model.base_model.set_adapter(list(names) if len(names) > 1 else names[0])
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(belongs_to(name, TRAINED))

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """The model as it stood before the first step: starting adapters on, the trained one off."""
        start = [REFERENCE] if self.continued or self.initial is not None else []
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
        taken_out = [_negated(self.initial)] if self.initial is not None and self.base_changed else []
        parts = [*self.frozen_parts, *taken_out, _read_part(self.model, TRAINED, masters)]
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
        if self.initial is not None and not self.base_changed:
            save_file({k: v.contiguous() for k, v in self.initial[1].items()}, directory / INITIAL_FILE)
        write_record(directory, self.model.get_base_model())


def belongs_to(path: str, adapter: str) -> bool:
    """Whether a parameter of this path is one of an adapter's."""
    return f".{adapter}." in path or path.endswith(f".{adapter}")


@dataclass(frozen=True)
class Start:
    """How a new adapter starts where it does not start at nothing (models/principal.py)."""

    fill: Callable[[PeftModel], None]  # gives adapter `TRAINED` its first values
    changes_base: bool  # PiSSA does: what is saved, for the base as it was, is then the difference to the start


def attach_trained(
    base: PreTrainedModel,
    wanted: PeftConfig,
    starts: Sequence[str | Path],
    base_name: str,
    create_new: bool = False,
    start: Start | None = None,
) -> Adapters:
    """Attach starting adapters and the one to train.

    Args:
        base: the root base model, without adapters.
        wanted: shape of the adapter the config asks for.
        starts: directories of adapters to start from, applied in sum.
        base_name: what the saved adapter names as its base.
        create_new: always train a new adapter on top, even if the last start has the wanted shape.
        start: first values of a new adapter; it is then never an old one that is continued.

    Raises:
        ModelError: a start does not fit the base (C11), or cannot be carried along.
    """
    check_targets(base, wanted)
    loaded = [_load_part(base, path) for path in starts]
    _make_room(base, loaded)
    in_memory = bool(starts) and memory.is_name(starts[-1])  # it is this adapter that its owner wants trained
    fits = bool(loaded) and (in_memory or same_shape(base, loaded[-1][0], wanted))
    continued = fits and not create_new and start is None
    frozen_parts = loaded[:-1] if continued else loaded
    _refuse_uncarriable(frozen_parts, starts, wanted)

    config = copy.deepcopy(loaded[-1][0] if continued else wanted)
    config.inference_mode = False
    for part in (wanted, *(config for config, _ in frozen_parts)):  # who trains has all rows, for it is saved alone
        with_rows(config, base, rows_of(part, base))
    frozen_parts = [_rows_into_base(base, part) for part in frozen_parts]
    with_dropout_of(config, wanted)
    model = _wrap(base, config, TRAINED)
    adapters = Adapters(model, base_name, continued=continued)
    if continued:
        whole = config, filled(base, config, loaded[-1][1], loaded[-1][0])
        _fill(model, TRAINED, whole, starts[-1])
        _add(model, REFERENCE, loaded[-1], starts[-1])
        adapters.masters = _by_parameter(model, TRAINED, whole)
    for index, (part, path) in enumerate(zip(frozen_parts, starts, strict=False)):
        name = f"start_{index}"
        _add(model, name, part, path)
        adapters.frozen.append(name)
        adapters.frozen_parts.append((part[0], {key: tensor.float() for key, tensor in part[1].items()}))
    if start is not None:
        start.fill(model)
    _match_dtype(model, base.dtype)
    if start is not None:
        config, state = _read_part(model, TRAINED, {})
        adapters.initial = config, {key: tensor.clone() for key, tensor in state.items()}  # what trains moves on
        adapters.base_changed = start.changes_base
        _add(model, REFERENCE, adapters.initial, "the initial adapter")
        _match_dtype(model, base.dtype)
    adapters.activate([*adapters.frozen, TRAINED])
    return adapters


def _add(model: PeftModel, name: str, part: Part, path: str | Path) -> None:
    """One more adapter, which acts and does not train."""
    config = copy.deepcopy(part[0])
    without_dropout(config)
    _inject(model, name, config)
    _fill(model, name, part, path)


def attach_frozen(base: PreTrainedModel, starts: Sequence[str | Path]) -> PreTrainedModel | PeftModel:
    """The base with adapters acting on it in sum, nothing trained; unmerged, for bf16 weights would round them off."""
    if not starts:
        return base
    parts = [_load_part(base, path) for path in starts]
    _make_room(base, parts)
    last = max((i for i, (config, _) in enumerate(parts) if rows_of(config, base)), default=0)
    parts = [part if i >= last else _rows_into_base(base, part) for i, part in enumerate(parts)]  # one's rows can act
    names = [TRAINED if memory.is_name(path) else f"start_{index}" for index, path in enumerate(starts)]
    _check_kinds(parts, starts)
    model = _wrap(base, copy.deepcopy(parts[0][0]), names[0])
    for name, part, path in zip(names, parts, starts, strict=True):
        if name != names[0]:
            _inject(model, name, copy.deepcopy(part[0]))
        _fill(model, name, part, path)
    _match_dtype(model, base.dtype)
    model.base_model.set_adapter(names if len(names) > 1 else names[0])
    return model.requires_grad_(False).eval()


def _check_kinds(parts: Sequence[Part], paths: Sequence[str | Path]) -> None:
    """peft lets adapters of one kind act on a model together."""
    if len(kinds := {type(config) for config, _ in parts}) > 1 or (len(parts) > 1 and LoraConfig not in kinds):
        shown = ", ".join(f"{path} ({kind_of(config)})" for (config, _), path in zip(parts, paths, strict=True))
        raise ModelError(
            f"these adapters cannot act together: {shown}", where="adapter_name_or_path",
            expected="LoRA adapters, or one adapter of another kind", fix="merge all but the last: trueup export",
        )  # fmt: skip


def add_frozen(model: PreTrainedModel | PeftModel, names: Sequence[str], paths: Sequence[str | Path]) -> PeftModel:
    """More adapters, under names of their own, on a model or beside those it has; which of them act, others decide.

    Raises:
        ModelError: one does not fit the base; the model is as it was then.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    parts = [_load_part(base, path) for path in paths]
    for path, part in zip(paths, parts, strict=True):
        refuse_missing(base, path, _rows_needed(base, part))
    added = []
    try:
        for name, part, path in zip(names, parts, paths, strict=True):
            if isinstance(model, PeftModel):
                _inject(model, name, copy.deepcopy(part[0]))
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
    _make_room(base, [part])
    config.inference_mode = False
    model = _wrap(base, config, TRAINED)
    _fill(model, TRAINED, part, path)
    return model


def merge_adapters(base: PreTrainedModel, starts: Sequence[str | Path]) -> PreTrainedModel:
    """Fold adapters into the base weights, in order: the starting point of full and freeze training, and of export."""
    for path in starts:
        base = merge_part(base, _load_part(base, path), path)
    return base


def merge_part(base: PreTrainedModel, part: Part, path: str | Path) -> PreTrainedModel:
    """Fold one adapter into the base weights. Raises ModelError where it does not fit."""
    _make_room(base, [part])
    model = _wrap(base, part[0], TRAINED)
    _fill(model, TRAINED, part, path)
    base = model.merge_and_unload()
    if hasattr(base, "peft_config"):
        del base.peft_config
    return base


def take_off(model: PeftModel) -> tuple[PreTrainedModel, Part]:
    """The base without its adapter `TRAINED`, and that adapter, in fp32."""
    part = _read_part(model, TRAINED, {})
    base = model.base_model.unload()
    if hasattr(base, "peft_config"):
        del base.peft_config
    return base, part


def _wrap(base: PreTrainedModel, config: LoraConfig, name: str) -> PeftModel:
    """`base` with a first adapter. peft's class for classifiers would want a head of its own in every adapter, also in
    those that a language model was trained with; its plain class keeps to what each config says.
    """
    make = get_peft_model if base.can_generate() else PeftModel
    with _layers_as_peft_should_see_them(base, config):
        model = make(base, config, adapter_name=name, autocast_adapter_dtype=False)
    lighten(model)
    return model


def _inject(model: PeftModel, name: str, config: PeftConfig) -> None:
    with _layers_as_peft_should_see_them(model.get_base_model(), config):
        model.add_adapter(name, config)
    lighten(model)


def make_room(base: PreTrainedModel, starts: Sequence[str | Path]) -> None:
    """Grow a base's vocabulary to that of the adapters that will be put on it; in place."""
    _make_room(base, [_shapes_of(path) for path in starts if not memory.is_name(path)])


def _shapes_of(path: str | Path) -> Part:
    """An adapter whose tensors are not read."""
    weights, shapes = Path(path) / WEIGHTS_FILE, {}
    if weights.is_file():
        with safe_open(weights, "pt") as file:
            names = file.keys()
            shapes = {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in names}
    return PeftConfig.from_pretrained(str(path)), shapes


def _make_room(base: PreTrainedModel, parts: Sequence[Part]) -> None:
    grow(base, max([0, *(_rows_needed(base, part) for part in parts)]))


#: what embeddings and heads are called where an adapter trains them whole.
_WHOLE = ("embed_tokens.weight", "lm_head.weight", "wte.weight", "embed_out.weight", "word_embeddings.weight")


def _rows_needed(base: PreTrainedModel, part: Part) -> int:
    """Rows of the embeddings that an adapter was trained with, as far as it tells."""
    config, state = part
    whole = [len(tensor) for key, tensor in state.items() if key.endswith(_WHOLE) and ".lora_" not in key]
    return max([0, *whole, *(largest(ids) for ids in rows_of(config, base).values())])


def _rows_into_base(base: PreTrainedModel, part: Part) -> Part:
    """Rows of an adapter that does not train, written into the base: the adapter without them."""
    config, state = copy.deepcopy(part[0]), part[1]
    put_rows(base, config, state)
    return config, without_rows(config, state)


@contextmanager
def _layers_as_peft_should_see_them(base: PreTrainedModel, config: PeftConfig) -> Iterator[None]:
    """Quantised layers as plain ones where (IA)³ is to come: peft 0.21's own layer for them answers bf16 in fp32."""
    marks = [name for name in ("is_loaded_in_4bit", "is_loaded_in_8bit") if getattr(base, name, False)]
    marks = marks if isinstance(config, IA3Config) else []
    for name in marks:
        setattr(base, name, False)
    try:
        yield
    finally:
        for name in marks:
            setattr(base, name, True)


def _match_dtype(model: PeftModel, dtype: torch.dtype) -> None:
    """Adapters in the base's dtype: peft makes those added later in fp32, and would cast every input to it.

    Only adapters are touched: a model keeps some tensors in fp32 on purpose, RoPE's frequencies among them.
    """
    for path, parameter in model.named_parameters():
        if any(belongs_to(path, name) for name in model.peft_config):
            parameter.data = parameter.data.to(dtype)


def _load_part(base: PreTrainedModel, path: str | Path) -> Part:
    if memory.is_name(path):
        return memory.held(str(path), "adapter_name_or_path").adapter
    path = Path(path)
    config = PeftConfig.from_pretrained(str(path))
    check_adapter(base, path)
    if type(config) not in KINDS.values():
        raise ModelError(
            f"a {kind_of(config)} adapter cannot be started from", where=str(path),
            expected=f"an adapter of kind {', '.join(KINDS)}",
        )  # fmt: skip
    weights = path / WEIGHTS_FILE
    if not weights.is_file():
        raise ModelError(
            f"no {WEIGHTS_FILE}", where=str(path), expected="an adapter saved as safetensors",
            fix="convert a pickled adapter with `peft` on a machine that may trust it, and save it as safetensors",
        )  # fmt: skip
    config.base_model_name_or_path = base.name_or_path  # peft warns of two spellings of one base
    part = config, load_file(weights)
    if (path / INITIAL_FILE).is_file() and not is_quantised(base):
        # Where it started it made up for a quantised base's losses, which this base has not had.
        started = config, load_file(path / INITIAL_FILE)
        return concatenate([part, _negated(started)], {name for name, _ in base.named_modules()})
    return part


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


def _refuse_uncarriable(parts: Sequence[Part], starts: Sequence[str | Path], wanted: PeftConfig) -> None:
    """Adapters are saved as one; only LoRA adapters can be, those of another kind cannot even act together."""
    problems = []
    for (config, _), path in zip(parts, starts, strict=False):
        if not is_plain(config) or not isinstance(wanted, LoraConfig) or wanted.use_dora or wanted.target_parameters:
            problems.append(
                Problem(
                    f"this {kind_of(config)} adapter cannot be concatenated with a new {kind_of(wanted)} adapter",
                    str(path),
                    "plain LoRA adapters: no modules trained whole, DoRA magnitudes, biases or experts",
                    fix="ask for the same kind and shape so that it is continued, or merge it into the base first: "
                    "trueup export",
                )
            )
    if problems:
        raise ModelError(problems)


def _read_part(model: PeftModel, name: str, masters: Mapping[str, Tensor]) -> Part:
    # The masters bear the model's parameter names, so peft picks and renames them like its own state dict.
    state = {**model.state_dict(), **masters}
    tensors = get_peft_model_state_dict(model, state_dict=state, adapter_name=name, save_embedding_layers=False)
    return model.peft_config[name], {key: tensor.detach().float().cpu() for key, tensor in tensors.items()}


def _negated(part: Part) -> Part:
    """The LoRA adapter that takes back what `part` adds."""
    config, state = part
    return config, {key: -value if "lora_B" in key or "embedding_B" in key else value for key, value in state.items()}


def kind_of(config: PeftConfig) -> str:
    """What people call an adapter's kind."""
    dora = getattr(config, "use_dora", False)
    return "DoRA" if dora else str(getattr(config.peft_type, "value", config.peft_type))


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
