"""TRL's configs: what a script says, kept as it says it, and the keys that it amounts to."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from enum import Enum
from typing import Any, ClassVar

from trueup.config import names
from trueup.config.schema import FIELDS, default
from trueup.errors import ConfigError, Problem

log = logging.getLogger("trueup")

#: what TRL asks of a batch's layout, which has no padding here.
_LAYOUT = ("padding_free", "pad_to_multiple_of", "label_pad_token_id", "padding_value")
#: keywords of `from_pretrained` → our keys.
_OF_LOADING = {
    "revision": "model_revision",
    "attn_implementation": "flash_attn",
    "trust_remote_code": "trust_remote_code",
    "cache_dir": "cache_dir",
    "token": "hf_hub_token",
}


class Config:
    """A config of TRL's: keywords in, attributes out; an attribute that was not given has TRL's default, or trueup's.

    Takes TRL's and transformers' names, and every key of trueup's own.
    """

    stage: ClassVar[str]
    #: TRL's defaults where trueup has others.
    defaults: ClassVar[dict[str, Any]] = {"max_length": 1024, "logging_steps": 10}
    #: TRL's name → ours, where the name alone would mean something else.
    renamed: ClassVar[dict[str, str]] = {}
    #: name → the values that ask for what happens anyway.
    at_rest: ClassVar[dict[str, tuple[Any, ...]]] = {}
    given: dict[str, Any]

    def __init__(self, output_dir: str | None = None, **given: Any) -> None:
        object.__setattr__(self, "given", {"output_dir": output_dir, **given})

    @classmethod
    def of(cls, args: Any, more: Mapping[str, Any]) -> Config:
        """From what a script gives as `args`: a config, transformers' TrainingArguments, or nothing.

        `more` are keywords that older versions of TRL took beside it.
        """
        if args is None:
            return cls(**more)
        if isinstance(args, Config):
            said = args.given
        elif dataclasses.is_dataclass(args):
            said = _changed(args)
        else:
            raise ConfigError(f"`args` is {type(args).__name__}", where="args", expected=cls.__name__)
        return cls(**{**said, **more})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        for values in (self.given, self.defaults):
            if name in values:
                return values[name]
        key = self.renamed.get(name) or names.SYNONYMS.get(name, name)
        if key in FIELDS:
            return default(key)
        if name in names.REFUSED:
            return names.REFUSED[name].neutral
        if name in names.IDLE or name in _LAYOUT:
            return None
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        self.given[name] = value

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in self.given.items())})"

    def keys(self) -> dict[str, Any]:
        """The keys of a trueup config. Raises ConfigError for what has none."""
        said = {name: _plain(value) for name, value in {**self.defaults, **self.given}.items()}
        said = {name: value for name, value in said.items() if value is not None and name not in _LAYOUT}
        said = _loading(said)
        found: dict[str, Any] = {"stage": self.stage}
        problems = []
        for name, value in self.translated(said).items():
            if name not in self.at_rest:
                found[self.renamed.get(name, name)] = value
            elif value not in self.at_rest[name]:
                rest = " or ".join(map(str, self.at_rest[name]))
                problems.append(Problem(f"`{name}: {value}` cannot be honoured", type(self).__name__, rest, "drop it"))
        if problems:
            raise ConfigError(problems)
        return found

    def translated(self, said: dict[str, Any]) -> dict[str, Any]:
        """What is said, where one name is not simply another one."""
        return said


class DPOConfig(Config):
    stage = "dpo"
    defaults = {**Config.defaults, "learning_rate": 1e-6, "disable_dropout": True}
    at_rest = {"disable_dropout": (True, False), "pad_token": ()}


class KTOConfig(DPOConfig):
    stage = "kto"


class ORPOConfig(DPOConfig):
    stage = "orpo"


class RewardConfig(DPOConfig):
    stage = "rm"
    defaults = {**DPOConfig.defaults, "learning_rate": 1e-4}


class SFTConfig(Config):
    stage = "sft"
    defaults = {**Config.defaults, "learning_rate": 2e-5}
    at_rest = {"loss_type": ("nll",), "eos_token": ("<EOS_TOKEN>",), "shuffle_dataset": (True, False)}
    #: of the rows, not of the run.
    of_rows = ("dataset_text_field", "completion_only_loss", "assistant_only_loss", "dataset_kwargs", "formatting_func")

    def translated(self, said: dict[str, Any]) -> dict[str, Any]:
        if said.get("loss_type") == "dft":
            said = {**said, "loss_type": "nll", "use_dft_loss": True}
        return {name: value for name, value in said.items() if name not in self.of_rows}


class GRPOConfig(Config):
    stage = "grpo"
    defaults = {"logging_steps": 10, "learning_rate": 1e-6, "num_generations": 8, "max_completion_length": 512}
    renamed = {"loss_type": "grpo_loss", "beta": "ppo_kl_coeff"}
    at_rest = {
        "use_vllm": (False,), "importance_sampling_level": ("token",), "disable_dropout": (False,),
        "log_completions": (True, False), "num_completions_to_print": tuple(range(1000)), "min_p": (0.0,),
        "shuffle_dataset": (True,), "repetition_penalty": (1.0,), "sync_ref_model": (False,),
        "top_entropy_quantile": (1.0,), "use_bias_correction_kl": (False,), "cast_lm_head_to_fp32": (True, False),
        "steps_per_generation": (1,), "use_transformers_paged": (False,),
        "multi_objective_aggregation": ("sum_then_normalize",),
    }  # fmt: skip

    def translated(self, said: dict[str, Any]) -> dict[str, Any]:
        """TRL's batches count answers, trueup's count prompts."""
        if said.get("importance_sampling_level") == "sequence":
            said |= {"importance_sampling_level": "token", "loss_type": "gspo"}
        answers = int(said.get("num_generations", 8))
        of_device = int(said.get("per_device_train_batch_size", default("per_device_train_batch_size")))
        of_step = of_device * int(said.get("gradient_accumulation_steps", 1))
        if of_step % answers:
            raise ConfigError(
                f"a step of {of_step} answers is no multiple of `num_generations: {answers}`", where="GRPOConfig",
                fix="change per_device_train_batch_size or gradient_accumulation_steps",
            )  # fmt: skip
        prompts = of_step // answers
        room = max(of_device // answers, 1)
        together = max(size for size in range(1, room + 1) if not prompts % size)
        log.info("a step of %d answers is %d prompts with %d answers each", of_step, prompts, answers)
        return {**said, "per_device_train_batch_size": together, "gradient_accumulation_steps": prompts // together}


def _plain(value: Any) -> Any:
    """An enumeration's value; a set of one as a list."""
    if isinstance(value, Enum):
        return value.value
    return list(value) if isinstance(value, tuple | set) else value


def _changed(args: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not at their defaults."""
    usual = type(args)(output_dir=args.output_dir) if hasattr(args, "output_dir") else type(args)()
    fields = [field.name for field in dataclasses.fields(args) if field.init]
    changed = {n: getattr(args, n) for n in fields if getattr(args, n) != getattr(usual, n)}
    return {**changed, "output_dir": getattr(args, "output_dir", None)}


def _loading(said: dict[str, Any]) -> dict[str, Any]:
    """`model_init_kwargs` as keys of their own."""
    loading = dict(said.pop("model_init_kwargs", None) or {})
    dtype = str(loading.pop("dtype", None) or loading.pop("torch_dtype", None) or "auto").removeprefix("torch.")
    loading.pop("device_map", None)  # a run has a device of its own
    loading.pop("use_cache", None)
    if dtype in ("bfloat16", "float16") and not {"bf16", "fp16"} & said.keys():
        said["bf16" if dtype == "bfloat16" else "fp16"] = True
    if unknown := [name for name in loading if name not in _OF_LOADING and loading[name] is not None]:
        raise ConfigError(
            f"`model_init_kwargs` has {', '.join(unknown)}, which has no key here", where="model_init_kwargs",
            expected=", ".join([*_OF_LOADING, "dtype"]), fix="load the model yourself, and give it as `model`",
        )  # fmt: skip
    found = {_OF_LOADING[name]: value for name, value in loading.items() if value is not None}
    return {**found, **said}
