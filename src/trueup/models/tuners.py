"""Which adapter a config asks for, in peft's words: its kind, its shape, and the modules of a model that get one."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from peft import IA3Config, LoraConfig, OFTConfig, PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as IA3_TARGETS
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trueup.config.schema import TuningSection
from trueup.errors import ModelError, Problem
from trueup.models.policy import Policy
from trueup.models.quantise import is_packed
from trueup.models.rows import matrices, with_rows

log = logging.getLogger("trueup")

#: `finetuning_type` of adapters; the others move the model's own weights.
ADAPTERS = ("lora", "oft", "ia3")
#: what peft calls them.
KINDS: dict[str, type[PeftConfig]] = {"lora": LoraConfig, "oft": OFTConfig, "ia3": IA3Config}

#: (IA)³ scales what goes into these layers, the second ones of MLPs, and what comes out of others.
_SECOND = ("down_proj", "fc2", "fc_out", "w2", "wo", "dense_4h_to_h", "c_proj", "output.dense")


def adapter_config(
    tuning: TuningSection, base: PreTrainedModel, kind: type[Policy] = Policy, new_rows: Sequence[int] = ()
) -> PeftConfig:
    """The adapter that a config asks for on this model.

    Args:
        new_rows: ids of tokens whose rows in embeddings and head have to train.

    Raises:
        ModelError: experts cannot have such an adapter, it is not known where (IA)³ would go, or new rows would not
            train.
    """
    config = _config_of_kind(tuning, base, kind)
    if new_rows:
        _train_rows(config, tuning, base, new_rows)
    return config


def _train_rows(config: Any, tuning: TuningSection, base: PreTrainedModel, new_rows: Sequence[int]) -> None:
    """New tokens' rows train alone, unless the matrix does so whole."""
    paths = [path for path in matrices(base) if _leaf(path) not in tuning.additional_target]
    adapted = [path for path in paths if _is_target(config, path)]
    if paths and (adapted or not isinstance(config, LoraConfig)):
        what = f"{', '.join(map(_leaf, adapted))} cannot have an adapter and new rows" if adapted else (
            f"finetuning_type: {tuning.finetuning_type} does not train single rows of embeddings and head")  # fmt: skip
        raise ModelError(
            f"{what}, which resize_vocab asks for", where="resize_vocab",
            fix=f"train them whole: additional_target: {','.join(map(_leaf, paths))}",
        )  # fmt: skip
    with_rows(config, base, dict.fromkeys(paths, new_rows))
    if paths:
        shown = " and ".join(map(_leaf, paths))
        log.info("of %s the new rows train, %d, and no others; additional_target trains all", shown, len(new_rows))


def _is_target(config: Any, path: str) -> bool:
    return config.target_modules != "all-linear" and bool(check_target_module_exists(config, path))


def _config_of_kind(tuning: TuningSection, base: PreTrainedModel, kind: type[Policy]) -> PeftConfig:
    whole = [*tuning.additional_target, *kind.always_trained] or None
    common: dict[str, Any] = {"task_type": kind.task_type, "modules_to_save": whole}
    match tuning.finetuning_type:
        case "oft":
            return OFTConfig(
                r=tuning.oft_rank, oft_block_size=0 if tuning.oft_rank else tuning.oft_block_size,
                module_dropout=tuning.module_dropout, target_modules=_spelled(tuning.oft_target), **common,
            )  # fmt: skip
        case "ia3":
            targets = _ia3_targets(base, tuning.ia3_target)
            second = [name for name in targets if name.endswith(_SECOND)]
            return IA3Config(target_modules=targets, feedforward_modules=second, **common)
        case _:
            return _lora_config(tuning, base, common)


def _lora_config(tuning: TuningSection, base: PreTrainedModel, common: Mapping[str, Any]) -> LoraConfig:
    targets, parameters = _spelled(tuning.lora_target), []
    if isinstance(targets, list):
        parameters = sorted({place for name in targets for place in _experts(base, name)})
        targets = [name for name in targets if not _experts(base, name) or _is_module(base, name)]
    elif targets == "all-linear" and _experts(base, "experts"):
        log.warning("the experts' weights get no adapter from lora_target: all; name them too, as in q_proj,experts")
    if parameters and (tuning.lora_dropout or tuning.use_dora):
        raise ModelError(
            "adapters on experts take neither lora_dropout nor use_dora", where="lora_target",
            fix="drop these, or leave the experts out of lora_target",
        )  # fmt: skip
    return LoraConfig(
        r=tuning.lora_rank,
        lora_alpha=tuning.lora_alpha if tuning.lora_alpha is not None else 2 * tuning.lora_rank,
        lora_dropout=tuning.lora_dropout,
        target_modules=targets,
        target_parameters=parameters or None,
        use_rslora=tuning.use_rslora,
        use_dora=tuning.use_dora,
        rank_pattern=dict(tuning.rank_pattern),
        alpha_pattern=dict(tuning.alpha_pattern),
        **common,
    )


def _spelled(names: list[str]) -> str | list[str]:
    """peft's spelling: a keyword for all linear layers, a string for a regular expression, else names."""
    if names == ["all"]:
        return "all-linear"
    is_regex = len(names) == 1 and re.search(r"[\\^$*+?|()\[\]{}]", names[0])
    return names[0] if is_regex else list(names)


def _experts(base: PreTrainedModel, name: str) -> set[str]:
    """Places ("experts.down_proj") of the stacked weights of experts that a target's name means."""
    paths = [path.split(".") for path, p in base.named_parameters() if p.ndim == 3]
    parts = name.split(".")
    return {
        ".".join(path[-2:]) for path in paths
        if path[-len(parts) :] == parts or any(path[i : i + len(parts)] == parts for i in range(len(path) - 1))
    }  # fmt: skip


def _ia3_targets(base: PreTrainedModel, names: list[str]) -> list[str]:
    if names != ["all"]:
        return list(names)
    usual = IA3_TARGETS.get(base.config.get_text_config().model_type, ["k_proj", "v_proj", "down_proj"])
    if found := [name for name in usual if _is_module(base, name)]:
        return found
    raise ModelError(
        "it is not known which layers of this architecture (IA)³ scales", where="ia3_target",
        expected=f"some of {', '.join(linear_names(base))}",
    )  # fmt: skip


# --- modules of a model -------------------------------------------------------------------------


def linear_names(base: PreTrainedModel) -> list[str]:
    """Names of linear layers, the last parts of their paths."""
    return sorted({_leaf(name) for name, module in base.named_modules() if isinstance(module, nn.Linear)})


def targets_of(base: PreTrainedModel, config: Any) -> set[str]:
    """Paths of the modules an adapter's config adapts."""
    linear = {
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and _leaf(name) not in (config.modules_to_save or ())
    }
    if config.target_modules == "all-linear":
        head = base.get_output_embeddings()
        return {name for name in linear if base.get_submodule(name) is not head}
    return {name for name in linear if check_target_module_exists(config, name)}


def _is_module(base: PreTrainedModel, name: str) -> bool:
    return any(
        (path == name or path.endswith(f".{name}")) and isinstance(module, nn.Linear | nn.Embedding)
        for path, module in base.named_modules()
    )


#: kind of adapter → the key that names its targets.
_KEYS = {LoraConfig: "lora_target", OFTConfig: "oft_target", IA3Config: "ia3_target"}


def check_targets(base: PreTrainedModel, wanted: Any) -> None:
    """Every name of a target must be a module's (peft passes over those that are not), and no whole module quantised.

    Raises:
        ModelError: with every name that matches nothing, and the names there are.
    """
    modules = dict(base.named_modules())
    problems = []
    for key, names in ((_KEYS[type(wanted)], wanted.target_modules), ("additional_target", wanted.modules_to_save)):
        if isinstance(names, str):
            if names != "all-linear" and (fault := _pattern_fault(names, list(modules))):
                example = list(modules)[-1]
                problems.append(Problem(fault, key, f"a regular expression for whole paths such as {example}"))
            continue
        for name in sorted(names or ()):
            found = [module for path, module in modules.items() if path == name or path.endswith(f".{name}")]
            if not found:
                expected = f"all, or some of {', '.join(linear_names(base))}"
                if key == "additional_target":
                    expected = "the last part of a module's path, such as embed_tokens or lm_head"
                problems.append(Problem(f"no module of the model is called {name!r}", key, expected))
            elif key == "additional_target" and any(is_packed(m) for module in found for m in module.modules()):
                problems.append(
                    Problem(f"{name} is quantised and cannot train whole", key, fix="give it an adapter: lora_target")
                )
    if problems:
        raise ModelError(problems)


def _pattern_fault(pattern: str, modules: Sequence[str]) -> str | None:
    try:
        found = any(re.fullmatch(pattern, path) for path in modules)
    except re.error as error:
        return f"{pattern!r} is no regular expression: {error}"
    return None if found else f"no module of the model matches {pattern!r}"


def _leaf(path: str) -> str:
    return path.rsplit(".", 1)[-1]


# --- comparing ----------------------------------------------------------------------------------


def same_shape(base: PreTrainedModel, start: PeftConfig, wanted: PeftConfig) -> bool:
    """Whether continuing `start` trains exactly what `wanted` describes."""
    return type(start) is type(wanted) and _shape(base, start) == _shape(base, wanted)


def _shape(base: PreTrainedModel, config: Any) -> list[Any]:
    whole = set(config.modules_to_save or ())
    shape: list[Any] = [whole, targets_of(base, config)]
    match config:
        case LoraConfig():
            shape += [
                config.r, config.lora_alpha, config.use_rslora, config.use_dora, config.bias, config.rank_pattern,
                config.alpha_pattern, set(config.target_parameters or ()),
            ]  # fmt: skip
        case OFTConfig():
            shape += [config.r or None, config.oft_block_size or None, config.block_share, config.bias]
        case IA3Config():
            shape.append(set(config.feedforward_modules or ()))
    return shape


def is_plain(config: PeftConfig) -> bool:
    """Whether an adapter is plain LoRA on layers, which can be added to others by stacking ranks."""
    if not isinstance(config, LoraConfig):
        return False
    return not (config.modules_to_save or config.use_dora or config.bias != "none" or config.target_parameters)


def without_dropout(config: PeftConfig) -> None:
    """What does not train does not drop: the step-0 policy is its reference."""
    for name in ("lora_dropout", "module_dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.0)


def with_dropout_of(config: Any, wanted: Any) -> None:
    """An adapter that is gone on with drops what the config asks for now."""
    for name in ("lora_dropout", "module_dropout"):
        if hasattr(config, name):
            setattr(config, name, getattr(wanted, name))
