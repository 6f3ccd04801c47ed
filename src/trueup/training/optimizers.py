"""Optimizers over fp32 masters by transformers' names, from torch, transformers, bitsandbytes and the projects that
keep the others; and their state as tensors and numbers.

Nothing of an optimizer's own (un)pickling is used: `state_tensors` and `state_numbers` take everything apart, and
`load_state` puts it together again, projections included.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers.optimization import Adafactor

from trueup.config import optimizer_state
from trueup.config.optimizer_state import is_embedding, is_matrix_of_a_layer, layer_of
from trueup.config.optimizers import LORA_PLUS_EMBEDDINGS, OPTIMIZERS, read_arguments
from trueup.errors import ConfigError

_log = logging.getLogger("trueup")

# As transformers' Trainer: biases and normalisation weights are not decayed ("ln_1" is GPT-2's
# spelling).
_NOT_DECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)|(?:^|\.)ln_")

_SHARED = ("qmap1", "qmap2")  # bitsandbytes' tables, the same for every tensor
_MAPS = {"qmap1": "dynamic", "qmap2": "udynamic"}
_MOVING = ("step", "k", "weight_sum", "lr_max", "scheduled_lr")  # numbers of a whole group


@dataclass(frozen=True)
class Wanted:
    """What an optimizer is made from.

    factors        parameter → learning rate over `learning_rate`, where it is not 1
    head_elements  weights of one attention head's projection; only Adam-mini asks
    """

    name: str = "adamw_torch"
    learning_rate: float = 5e-5
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    arguments: Mapping[str, Any] = field(default_factory=dict)
    targets: Sequence[str] = ()
    factors: Mapping[str, float] = field(default_factory=dict)
    warmup_steps: int = 0
    head_elements: int | None = None


Groups = list[dict[str, Any]]


@runtime_checkable
class _Averaging(Protocol):
    """A schedule-free optimizer: its weights are those it trains, or their average."""

    def train(self) -> None: ...
    def eval(self) -> None: ...


def is_decayed(name: str) -> bool:
    """Whether weight decay applies to the parameter of this name."""
    return _NOT_DECAYED.search(name.lower()) is None


def rate_factors(names: Sequence[str], multipliers: Mapping[str, float], decay: float | None) -> dict[str, float]:
    """Learning rates over the run's: the product of the multipliers whose pattern is found in a name, and `decay` once
    for each layer between a parameter and the last one (embeddings lie below the first).

    Raises ConfigError for a pattern that is found in no name, and for one that is no pattern.
    """
    factors = dict.fromkeys(names, 1.0)
    for pattern, factor in multipliers.items():
        try:
            found = [name for name in names if re.search(pattern, name)]
        except re.error as error:
            raise ConfigError(f"{pattern!r} is no regular expression: {error}", where="lr_multipliers") from error
        if not found and pattern != LORA_PLUS_EMBEDDINGS:
            raise ConfigError(
                f"no trained parameter's name holds {pattern!r}",
                where="lr_multipliers",
                expected=f"parts of names such as {next(iter(names))}",
            )
        for name in found:
            factors[name] *= float(factor)
    if decay:
        layer = {name: found for name in names if (found := layer_of(name)) is not None}
        top = max(layer.values(), default=0)
        for name in names:
            depth = top - layer[name] if name in layer else top + 1 if is_embedding(name) else 0
            factors[name] *= decay**depth
    return {name: factor for name, factor in factors.items() if factor != 1.0}


def make_optimizer(masters: Mapping[str, Tensor], wanted: Wanted) -> torch.optim.Optimizer:
    """The optimizer over these masters.

    Raises ConfigError when it is unknown, its package is missing, or it has nothing to work on.
    """
    if wanted.name not in OPTIMIZERS:
        raise ConfigError(
            f"optim: {wanted.name} is not supported", where="optim", expected=f"one of {', '.join(OPTIMIZERS)}"
        )
    row = OPTIMIZERS[wanted.name]
    if row.package and importlib.util.find_spec(row.package) is None:
        raise ConfigError(
            f"optim: {wanted.name} needs the package {row.package}, which is not installed",
            where="optim",
            fix=f"{row.install}; or set optim: adamw_torch",
        )
    try:
        optimizer = _BUILDERS[wanted.name](masters, wanted)
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"optim: {wanted.name} could not be made: {error}", where="optim_args") from error
    if isinstance(optimizer, _Averaging):
        optimizer.train()
    if row.projects:
        optimizer.register_step_post_hook(_let_go_of_decompositions)
    return optimizer


def wanted_from(
    settings: Any, names: Sequence[str], warmup: int, head_elements: int | None = None, everywhere: bool = True
) -> Wanted:
    """From the train section's keys; with `everywhere`, those too that name parts of the model.

    Raises ConfigError for arguments the optimizer does not take.
    """
    try:
        arguments = read_arguments(settings.optim, settings.optim_args)
    except KeyError:
        arguments = {}  # an unknown optimizer is named when it is made
    except ValueError as error:
        raise ConfigError(f"optim_args: {error}", where="optim_args") from error
    return Wanted(
        settings.optim,
        settings.learning_rate,
        (settings.adam_beta1, settings.adam_beta2),
        settings.adam_epsilon,
        settings.weight_decay,
        arguments,
        settings.optim_target_modules if everywhere else (),
        rate_factors(names, settings.lr_multipliers, settings.layer_lr_decay) if everywhere else {},
        warmup,
        head_elements,
    )


def check_optimizer(settings: Any) -> None:
    """Make a run's optimizer for a layer of a few numbers, before there is a model.

    Raises ConfigError when it is unknown, its package is missing or its arguments are no good.
    """
    layer = {
        "layers.0.weight": torch.zeros(4, 4), "norm.weight": torch.zeros(4)
    }  # fmt: skip
    wanted = wanted_from(settings, [], 0, 16, everywhere=False)
    make_optimizer(layer, wanted)


# --- groups ---------------------------------------------------------------------------------------


def _groups(masters: Mapping[str, Tensor], wanted: Wanted, apart: Mapping[str, Any] | None = None) -> Groups:
    """Parameter groups by weight decay and learning rate, those at the run's own rate first.

    apart  options of the matrices that `optim_target_modules` names, which get groups of their own
    """
    chosen = projected(masters, wanted) if apart is not None else set()
    sorted_: dict[tuple[bool, float, bool], list[Tensor]] = defaultdict(list)
    for name, master in masters.items():
        sorted_[name in chosen, wanted.factors.get(name, 1.0), is_decayed(name)].append(master)
    groups = []
    for (aside, factor, decayed), tensors in sorted(sorted_.items(), key=lambda item: (item[0][1] != 1.0, item[0][0])):
        decay = wanted.weight_decay if decayed else 0.0
        rate = {} if factor == 1.0 else {"lr": wanted.learning_rate * factor}
        groups.append({"params": tensors, "weight_decay": decay, **rate, **(apart or {} if aside else {})})
    return groups


def projected(masters: Mapping[str, Tensor], wanted: Wanted) -> set[str]:
    """Names of the matrices a projecting optimizer works on: all of the layers', or those named.

    Raises ConfigError when there are none.
    """
    found = optimizer_state.projected({name: master.shape for name, master in masters.items()}, wanted.targets)
    if not found:
        raise ConfigError(
            f"optim: {wanted.name} finds none of the matrices it is to project",
            where="optim_target_modules",
            expected="all, or parts of names such as q_proj, of weights that train",
            fix="set finetuning_type: full, or freeze with layers that train",
        )
    return found


# --- one function an optimizer --------------------------------------------------------------------


def _adamw(masters: Mapping[str, Tensor], w: Wanted) -> torch.optim.Optimizer:
    return torch.optim.AdamW(_groups(masters, w), lr=w.learning_rate, betas=w.betas, eps=w.eps, fused=True)


def _sgd(masters: Mapping[str, Tensor], w: Wanted) -> torch.optim.Optimizer:
    return torch.optim.SGD(_groups(masters, w), lr=w.learning_rate, **w.arguments)


def _adagrad(masters: Mapping[str, Tensor], w: Wanted) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(_groups(masters, w), lr=w.learning_rate, eps=w.eps, **w.arguments)


def _rmsprop(masters: Mapping[str, Tensor], w: Wanted) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(_groups(masters, w), lr=w.learning_rate, eps=w.eps, **w.arguments)


def _adafactor(masters: Mapping[str, Tensor], w: Wanted) -> torch.optim.Optimizer:
    options = {"scale_parameter": False, "relative_step": False, **w.arguments}
    return Adafactor(_groups(masters, w), lr=w.learning_rate, **options)


def _bitsandbytes(masters: Mapping[str, Tensor], w: Wanted) -> torch.optim.Optimizer:
    optim: Any = importlib.import_module("bitsandbytes.optim")
    kind = next(kind for kind in ("adamw", "lion", "ademamix", "rmsprop") if kind in w.name)
    options: dict[str, Any] = {"lr": w.learning_rate, "optim_bits": 8 if "8bit" in w.name else 32, **w.arguments}
    if kind == "rmsprop":
        return optim.RMSprop(_groups(masters, w), eps=w.eps, **options)
    options["is_paged"] = w.name.startswith("paged")
    if options["is_paged"] and next(iter(masters.values())).device.type == "cpu":
        _log.warning("optim: %s pages between a GPU and its host; on a CPU its moments stay where they are", w.name)
        warnings.filterwarnings("ignore", "Paged optimizers are not supported on CPU")
    if kind == "lion":
        return optim.Lion(_groups(masters, w), betas=w.betas, **options)
    if kind == "ademamix":
        betas = (*w.betas, options.pop("beta3", 0.9999))
        return optim.AdEMAMix(_groups(masters, w), betas=betas, eps=w.eps, **options)
    return optim.AdamW(_groups(masters, w), betas=w.betas, eps=w.eps, **options)


class _Several(torch.optim.Optimizer):
    """Optimizers that share the work, as one: their groups in a row, their states in one mapping."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        super().__init__([{"params": group["params"]} for part in parts for group in part.param_groups], {})
        self.parts = list(parts)
        self.param_groups = [group for part in parts for group in part.param_groups]
        for part in parts:
            part.state = self.state

    def step(self, closure: Callable | None = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()


def _muon(masters: Mapping[str, Tensor], w: Wanted) -> torch.optim.Optimizer:
    matrices = {name: master for name, master in masters.items() if is_matrix_of_a_layer(name, master.dim())}
    others = {name: master for name, master in masters.items() if name not in matrices}
    if not matrices:
        raise ConfigError("optim: muon finds no matrix of a layer to train", where="optim", fix="optim: adamw_torch")
    # Steps as long as AdamW's, so that its learning rates hold (Moonlight, arXiv 2502.16982, eq. 4).
    options = {"adjust_lr_fn": "match_rms_adamw", **w.arguments}
    muon = torch.optim.Muon(_groups(matrices, w), lr=w.learning_rate, weight_decay=w.weight_decay, **options)
    return _Several([muon, _adamw(others, w)]) if others else muon


def _galore(masters: Mapping[str, Tensor], w: Wanted) -> torch.optim.Optimizer:
    package: Any = importlib.import_module("galore_torch")
    options = {**optimizer_state.PROJECTED, "update_proj_gap": 200, "scale": 0.25, **w.arguments}
    groups = _groups(masters, w, options)
    if w.name == "galore_adafactor":
        options = {"scale_parameter": False, "relative_step": False}
        return package.GaLoreAdafactor(groups, lr=w.learning_rate, **options)
    options = {"lr": w.learning_rate, "betas": w.betas, "eps": w.eps, "no_deprecation_warning": True}
    return package.GaLoreAdamW(groups, **options)


def _galore_projector(optimizer: Any, group: Mapping[str, Any], numbers: Mapping[str, Any]) -> Any:
    package: Any = importlib.import_module("galore_torch.galore_projector")
    options = {key: group[key] for key in ("update_proj_gap", "scale", "proj_type")}
    return package.GaLoreProjector(group["rank"], **options)


def _apollo(masters: Mapping[str, Tensor], w: Wanted) -> torch.optim.Optimizer:
    package: Any = importlib.import_module("apollo_torch")
    options = {
        **optimizer_state.PROJECTED, "update_proj_gap": 200, "scale": 1.0, "proj": "random",
        "scale_type": "channel", **w.arguments,
    }  # fmt: skip
    front = options.pop("scale_front", False)
    with _requiring_gradients(masters):
        groups = _groups(masters, w, options)
        return package.APOLLOAdamW(groups, lr=w.learning_rate, betas=w.betas, eps=w.eps, scale_front=front)


def _let_go_of_decompositions(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Projections as tensors of their own: a slice of an SVD's result holds all of it, and in another order of memory
    than a checkpoint does, which rounds products otherwise.
    """
    for state in optimizer.state.values():
        projector = state.get("projector")
        if projector is None or projector.ortho_matrix is None:
            continue
        matrix = projector.ortho_matrix
        projector.ortho_matrix = _compact(matrix) if isinstance(matrix, Tensor) else [_compact(part) for part in matrix]


def _compact(matrix: Tensor) -> Tensor:
    whole = matrix.is_contiguous() and matrix.untyped_storage().nbytes() == matrix.numel() * matrix.itemsize
    return matrix if whole else matrix.contiguous().clone()


def _apollo_projector(optimizer: Any, group: Mapping[str, Any], numbers: Mapping[str, Any]) -> Any:
    return optimizer._initialize_projector(group, numbers)


def _adam_mini(masters: Mapping[str, Tensor], w: Wanted) -> torch.optim.Optimizer:
    package: Any = importlib.import_module("adam_mini")
    if w.head_elements is None:
        raise ConfigError("optim: adam_mini does not know the heads of this model", where="optim")
    with _requiring_gradients(masters):
        optimizer = package.Adam_mini(
            masters.items(), lr=w.learning_rate, betas=w.betas, eps=w.eps, weight_decay=w.weight_decay, verbose=False
        )
    optimizer.head_numel = w.head_elements  # it would divide hidden² by the heads, wrong where they are wider
    for name, group in zip(masters, optimizer.param_groups, strict=True):
        group["lr"] = w.learning_rate * w.factors.get(name, 1.0)
        group["weight_decay"] = w.weight_decay if is_decayed(name) else 0.0
    return optimizer


def _schedule_free(masters: Mapping[str, Tensor], w: Wanted) -> torch.optim.Optimizer:
    package: Any = importlib.import_module("schedulefree")
    groups, options = _groups(masters, w), {"lr": w.learning_rate, **w.arguments}
    if w.name == "schedule_free_sgd":
        return package.SGDScheduleFree(groups, warmup_steps=w.warmup_steps, **options)
    if w.name == "schedule_free_radam":
        return package.RAdamScheduleFree(groups, betas=w.betas, eps=w.eps, **options)
    return package.AdamWScheduleFree(groups, betas=w.betas, eps=w.eps, warmup_steps=w.warmup_steps, **options)


class _requiring_gradients:
    """Some constructors pass over tensors that do not require gradients; masters get theirs by hand."""

    def __init__(self, masters: Mapping[str, Tensor]) -> None:
        self.masters = masters

    def __enter__(self) -> None:
        for master in self.masters.values():
            master.requires_grad_(True)

    def __exit__(self, *_: Any) -> None:
        for master in self.masters.values():
            master.requires_grad_(False)


def _builder(name: str) -> Callable[[Mapping[str, Tensor], Wanted], torch.optim.Optimizer]:
    if OPTIMIZERS[name].package == "bitsandbytes":
        return _bitsandbytes
    named = {
        "sgd": _sgd, "adagrad": _adagrad, "rmsprop": _rmsprop, "adafactor": _adafactor, "muon": _muon,
        "apollo_adamw": _apollo, "adam_mini": _adam_mini,
    }  # fmt: skip
    if name in named:
        return named[name]
    return _galore if name.startswith("galore") else _schedule_free if name.startswith("schedule_free") else _adamw


_BUILDERS = {name: _builder(name) for name in OPTIMIZERS}


# --- state ----------------------------------------------------------------------------------------


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimizer's state: moments, projections, tables counted once; without masters and gradients."""
    seen: dict[int, int] = {}
    for state in optimizer.state.values():
        for value in state.values():
            for tensor in _tensors_of(value).values():
                seen[tensor.data_ptr()] = tensor.numel() * tensor.itemsize
    return sum(seen.values())


def state_tensors(optimizer: torch.optim.Optimizer, masters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state's tensors as `kind.parameter_name` (exp_avg, exp_avg_sq, step …); a projection's under
    `projector/ortho_matrix`.
    """
    return {
        f"{kind}{path}.{name}": tensor
        for name, master in masters.items()
        for kind, value in optimizer.state.get(master, {}).items()
        if kind not in _SHARED
        for path, tensor in _tensors_of(value).items()
    }


def state_numbers(optimizer: torch.optim.Optimizer, masters: Mapping[str, Tensor]) -> dict[str, Any]:
    """The rest of the state: JSON-able numbers by parameter, and those of whole groups."""
    numbers = {
        name: found
        for name, master in masters.items()
        if (found := _numbers_of(optimizer.state.get(master, {})))
    }  # fmt: skip
    groups = [{key: group[key] for key in _MOVING if key in group} for group in optimizer.param_groups]
    return {"parameters": numbers, "groups": groups if any(groups) else []}


def load_state(
    optimizer: torch.optim.Optimizer,
    masters: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, Any],
) -> None:
    """Put back what `state_tensors` and `state_numbers` gave."""
    optimizer.state.clear()
    group_of = {id(tensor): group for group in optimizer.param_groups for tensor in group["params"]}
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, value in tensors.items():
        kind, _, name = key.partition(".")
        parts[name][kind] = value
    for name, master in masters.items():
        plain = {k: v for k, v in numbers.get("parameters", {}).get(name, {}).items() if "/" not in k}
        state: dict[str, Any] = dict(plain)
        for kind, value in parts[name].items():
            if "/" not in kind:
                state[kind] = _placed(optimizer, group_of[id(master)], master, kind, value)
        _give_tables(optimizer, state, master.device)
        inner = {kind: v for kind, v in parts[name].items() if "/" in kind}
        if inner:
            of_projector = numbers.get("parameters", {}).get(name, {})
            make = _apollo_projector if "seed" in plain else _galore_projector
            projector = make(optimizer, group_of[id(master)], plain)
            _fill_projector(projector, inner, of_projector, master.device)
            state["projector"] = projector
        if state:
            optimizer.state[master] = state
    for group, saved in zip(optimizer.param_groups, numbers.get("groups") or [], strict=False):
        group.update(saved)


def _tensors_of(value: Any) -> dict[str, Tensor]:
    """Path → tensor of one entry of a state: itself, or those of a projection."""
    if isinstance(value, Tensor):
        return {"": value}
    matrix = getattr(value, "ortho_matrix", None)
    if isinstance(matrix, Tensor):
        return {"/ortho_matrix": matrix}
    return {f"/ortho_matrix/{i}": part for i, part in enumerate(matrix or ())}


def _numbers_of(state: Mapping[str, Any]) -> dict[str, Any]:
    numbers = {k: v for k, v in state.items() if isinstance(v, bool | int | float)}
    projector = state.get("projector")
    for name in ("seed", "svd_count"):  # what APOLLO's random projections go on from
        if projector is not None and hasattr(projector, name):
            numbers[f"projector/{name}"] = getattr(projector, name)
    return numbers


def _fill_projector(projector: Any, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any], device: Any) -> None:
    matrices = [tensors[key].to(device, copy=True) for key in sorted(tensors)]
    projector.ortho_matrix = matrices[0] if "projector/ortho_matrix" in tensors else matrices
    for key, value in numbers.items():
        if key.startswith("projector/"):
            setattr(projector, key.removeprefix("projector/"), value)


def _placed(optimizer: Any, group: Mapping[str, Any], master: Tensor, kind: str, value: Tensor) -> Tensor:
    """A state's tensor on its device, in paged memory where the optimizer pages."""
    if getattr(optimizer, "is_paged", False) and kind in ("state1", "state2") and value.shape == master.shape:
        buffer = optimizer.get_state_buffer(master, dtype=value.dtype)
        return buffer.copy_(value)
    on_host = kind == "step" and not group.get("fused")
    return value.clone() if on_host else value.to(master.device, copy=True)


def _give_tables(optimizer: Any, state: dict[str, Any], device: torch.device) -> None:
    """bitsandbytes' tables of 8-bit numbers, which are no part of a checkpoint."""
    for index, (kind, name) in enumerate(_MAPS.items(), start=1):
        if f"absmax{index}" in state:
            optimizer.name2qmap[name] = optimizer.name2qmap[name].to(device)
            state[kind] = optimizer.name2qmap[name]
