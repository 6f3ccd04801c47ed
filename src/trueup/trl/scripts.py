"""What TRL's example scripts take from their command line."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from trueup.errors import ConfigError
from trueup.trl.configs import Config

log = logging.getLogger("trueup")


@dataclass
class ScriptArguments:
    """Which data a script loads."""

    dataset_name: str | None = None
    dataset_config: str | None = None
    dataset_train_split: str = "train"
    dataset_test_split: str = "test"
    dataset_streaming: bool = False
    ignore_bias_buffers: bool = False


@dataclass
class ModelConfig:
    """Which model a script loads, and with which adapter."""

    model_name_or_path: str | None = None
    model_revision: str = "main"
    dtype: str | None = None
    attn_implementation: str | None = None
    use_peft: bool = False
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    lora_target_modules: list[str] | None = None
    lora_modules_to_save: list[str] | None = None
    lora_task_type: str = "CAUSAL_LM"
    use_rslora: bool = False
    use_dora: bool = False
    load_in_8bit: bool = False
    load_in_4bit: bool = False
    bnb_4bit_quant_type: str = "nf4"
    use_bnb_nested_quant: bool = False
    trust_remote_code: bool = False


@dataclass
class DatasetMixtureConfig:
    """Several datasets, which a script names in a config of its own."""

    datasets: list[Any] = field(default_factory=list)


def get_peft_config(args: ModelConfig) -> Any:
    """The adapter that was asked for, as peft describes it."""
    if not args.use_peft:
        return None
    from peft import LoraConfig

    targets = args.lora_target_modules
    return LoraConfig(
        task_type=args.lora_task_type, r=args.lora_r, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets, use_rslora=args.use_rslora,
        use_dora=args.use_dora, modules_to_save=args.lora_modules_to_save,
    )  # fmt: skip


def get_quantization_config(args: ModelConfig) -> Any:
    """How the weights were asked to be quantised, as transformers describes it; None: not at all."""
    if not (args.load_in_4bit or args.load_in_8bit):
        return None
    from types import SimpleNamespace

    return SimpleNamespace(
        load_in_4bit=args.load_in_4bit, load_in_8bit=args.load_in_8bit, bnb_4bit_quant_type=args.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=args.use_bnb_nested_quant,
    )  # fmt: skip


def get_kbit_device_map() -> None:
    """Nothing: a run has a device of its own."""


def get_dataset(config: DatasetMixtureConfig) -> Any:
    raise ConfigError(
        "mixing datasets in a script is not supported", where="datasets",
        fix="trueup.train(dataset=[…]) mixes: mix_strategy, interleave_probs",
    )  # fmt: skip


class TrlParser:
    """Words of a command line (`--name value`, `--flag`, `--config FILE`) for the dataclasses of a script."""

    def __init__(self, dataclass_types: Iterable[Any] | Any, **_: Any) -> None:
        self.types = list(dataclass_types) if isinstance(dataclass_types, Iterable) else [dataclass_types]

    def parse_args_and_config(
        self, args: Sequence[str] | None = None, return_remaining_strings: bool = False,
        fail_with_unknown_args: bool = True, **_: Any,
    ) -> tuple[Any, ...]:  # fmt: skip
        """An instance of each class. Raises ConfigError for words that none of them knows."""
        said = _read(list(sys.argv[1:] if args is None else args))
        if file := said.pop("config", None):
            said = {**yaml.safe_load(Path(str(file)).read_text(encoding="utf-8")), **said}
        found, known = [], set()
        for kind in self.types:
            own = said if issubclass(kind, Config) else {n: said[n] for n in _names(kind) if n in said}
            if issubclass(kind, Config):
                others = {name for other in self.types if not issubclass(other, Config) for name in _names(other)}
                own = {name: value for name, value in said.items() if name not in others - _SHARED}
                found.append(kind(**{name: _word(value) for name, value in own.items()}))
            else:
                hints = get_type_hints(kind)
                found.append(kind(**{name: _typed(value, hints[name]) for name, value in own.items()}))
            known |= own.keys()
        if unknown := [name for name in said if name not in known]:
            raise ConfigError(f"nobody here knows --{', --'.join(unknown)}", where="the command line")
        return tuple(found)

    parse_args_into_dataclasses = parse_args_and_config


_SHARED = {"trust_remote_code"}  # names that two classes of TRL have


def _names(kind: Any) -> list[str]:
    return [each.name for each in dataclasses.fields(kind)]


def _read(words: list[str]) -> dict[str, Any]:
    """`--name value …`, `--name=value` and `--flag` → names and values."""
    said: dict[str, Any] = {}
    name = None
    for word in words:
        if word.startswith("--"):
            name, has_value, value = word[2:].partition("=")
            name = name.replace("-", "_")
            said[name] = value if has_value else True
        elif name is None:
            raise ConfigError(f"{word!r} follows no --name", where="the command line")
        elif said[name] is True:
            said[name] = word
        else:
            said[name] = [*(said[name] if isinstance(said[name], list) else [said[name]]), word]
    off = {name[3:]: False for name, value in said.items() if name.startswith("no_") and value is True}
    return {name: value for name, value in said.items() if name[3:] not in off} | off


def _word(value: Any) -> Any:
    """`True` and `1e-6` as the values they are; other words stay words."""
    if not isinstance(value, str):
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def _typed(value: Any, hint: Any) -> Any:
    """A word as its field has it."""
    if "list" in str(hint):
        return value if isinstance(value, list) else [value]
    return str(value) if hint is str or "str" in str(hint) else _word(value)
