"""Rotary positions stretched beyond the context a model was made for, by key or as an adapter was trained.

A stretch is part of the model's config before the model is built, in transformers' own terms; whatever is saved whole
carries it there. An adapter's directory has no config of its base, so `rope.json` beside its weights says how that base
read positions: whoever loads the adapter stretches the base in the same way, or refuses one that is something else.

The factor is LLaMA-Factory's: the length asked for over the model's context, rounded up; so are llama3's bounds.

`ntk` is what transformers' `dynamic` has for a row as long as that factor allows, for every row: a larger `rope_theta`
and nothing else (NTK-aware scaling, bloc97 2023). Whoever reads the config needs to know no more than that.
"""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from trueup import memory
from trueup.config.schema import ModelSection
from trueup.errors import ModelError

log = logging.getLogger("trueup")

RECORD = "rope.json"
#: kinds whose frequencies depend on the longest row that is read together with a row.
BY_LENGTH = ("dynamic", "longrope")
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


@dataclass(frozen=True)
class Rope:
    """How a model reads positions.

    Attributes:
        parameters: its config's `rope_parameters`.
        positions: its config's `max_position_embeddings`.
    """

    parameters: dict[str, Any]
    positions: int

    @property
    def kind(self) -> str:
        return str(self.parameters["rope_type"])

    @property
    def factor(self) -> float:
        return float(self.parameters.get("factor") or 1.0)

    @property
    def reach(self) -> int:
        """Positions it can read; transformers takes a dynamic rope's `max_position_embeddings` for what it had."""
        return int(self.positions * self.factor) if self.kind == "dynamic" else self.positions

    def __str__(self) -> str:
        return "not stretched" if self.kind == "default" else f"{self.kind}, factor {self.factor:g}"


@dataclass(frozen=True)
class Stretch:
    """What a model's files said, and what it is run with."""

    before: Rope
    after: Rope

    @property
    def kind(self) -> str:
        """`rope_scaling` that leads here; an `ntk` one is like any other rope that was made for as many positions."""
        return "ntk" if self.after.kind == "default" else self.after.kind

    @property
    def said(self) -> str:
        return (
            f"ntk, factor {self.after.positions / self.before.positions:g}" if self.kind == "ntk" else str(self.after)
        )

    def __str__(self) -> str:
        return f"{self.said}: {self.before.reach:,} → {self.after.reach:,} positions"


#: models that are run with another rope than their files say.
_STRETCHED: WeakKeyDictionary[nn.Module, Stretch] = WeakKeyDictionary()


def stretch_of(base: nn.Module) -> Stretch | None:
    """How a loaded model was stretched; None where it reads positions as its files say."""
    return _STRETCHED.get(base)


def rope_of(config: PretrainedConfig) -> Rope | None:
    """How a config's model reads positions; None where that is nothing that could be stretched."""
    text = config.get_text_config()
    parameters, positions = getattr(text, "rope_parameters", None), getattr(text, "max_position_embeddings", None)
    if not parameters or not positions or text.nested_rope_parameter_keys(parameters):
        return None
    return Rope({key: value for key, value in parameters.items() if key != "type"}, int(positions))


def context_of(config: PretrainedConfig, otherwise: int) -> int:
    """Tokens that a model can read at once, `otherwise` where its config does not say."""
    if (rope := rope_of(config)) is not None:
        return rope.reach
    return getattr(config.get_text_config(), "max_position_embeddings", None) or otherwise


def stretched(rope: Rope, kind: str, length: int, config: PretrainedConfig) -> Rope:
    """`rope` such that `length` positions fit; `config` says how many dimensions of a head turn."""
    factor = float(math.ceil(length / rope.positions))
    if kind == "ntk":
        theta = rope.parameters["rope_theta"] * (factor * factor - factor + 1) ** _exponent(config, rope)
        return Rope({**rope.parameters, "rope_theta": theta}, int(rope.positions * factor))
    parameters = {**rope.parameters, "rope_type": kind, "factor": factor}
    if kind in ("yarn", "llama3"):
        parameters["original_max_position_embeddings"] = rope.positions
    if kind == "llama3":
        parameters |= _LLAMA3
    return Rope(parameters, rope.positions if kind == "dynamic" else int(rope.positions * factor))


def _exponent(config: PretrainedConfig, rope: Rope) -> float:
    """d / (d − 2), d the dimensions of a head that turn: the slowest pair slows down by what is raised to it."""
    text = config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    turning = int(head * rope.parameters.get("partial_rotary_factor", 1.0))
    return turning / (turning - 2)


def fit_rope(config: PretrainedConfig, model: ModelSection, adapters: Sequence[str], name: str) -> Stretch | None:
    """Change a config as its adapters were trained, then as `rope_scaling` asks.

    Args:
        config: of a model that is not built yet.
        adapters: directories of those that will stand on it.
        name: the model's, for messages.

    Returns:
        What was changed; None if nothing.

    Raises:
        ModelError: the model cannot be stretched, or is stretched in another way already.
    """
    before = rope_of(config)
    record = _recorded(adapters)
    after = before
    if record is not None:
        after = record[1].after
        if before not in (record[1].before, after):
            raise _mismatch(record[0], record[1], before)
    if model.rope_scaling:
        after = _asked(after, record and record[1], model, config, name)
    if after is None or before is None or after == before:
        return None
    text = config.get_text_config()
    text.rope_parameters, text.max_position_embeddings = dict(after.parameters), after.positions
    try:
        text.standardize_rope_params()
        text.validate_rope()
        again = rope_of(type(text).from_dict(text.to_dict()))  # as it will be saved, and read
    except ValueError as error:
        raise _rigid(name, str(error)) from error
    if again != after:
        raise _rigid(name, f"a {config.model_type} config makes {again} of {after}")
    return Stretch(before, after)


def _asked(
    rope: Rope | None, earlier: Stretch | None, model: ModelSection, config: PretrainedConfig, name: str
) -> Rope:
    """What `rope_scaling` makes of a rope, to which an adapter's training may have stretched it `earlier`."""
    kind, length = str(model.rope_scaling), model.rope_scaling_length or 0
    if rope is None:
        raise _rigid(name, _why_rigid(config))
    had, said = (earlier.kind, earlier.said) if earlier else (rope.kind, str(rope))
    same = had == kind or (had, kind) == ("ntk", "dynamic")  # which is what training makes of it
    if same and length <= rope.reach:
        return rope
    if had != "default":
        raise ModelError(
            f"{name} is stretched already ({said}, {rope.reach:,} positions), and `rope_scaling: {kind}` asks for "
            f"{length:,} positions", where="rope_scaling",
            expected="a model, or an adapter, that was trained without a stretch or with this very one",
            fix="drop rope_scaling, and keep cutoff_len within those positions; or start from the model it was made of",
        )  # fmt: skip
    if length <= rope.positions:
        log.warning(
            "rope_scaling: %s has no effect: %d tokens fit into the %d positions that %s has; rope_scaling_length says "
            "how far to stretch it", kind, length, rope.positions, name,
        )  # fmt: skip
        return rope
    return stretched(rope, kind, length, config)


def _why_rigid(config: PretrainedConfig) -> str:
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None)
    if not parameters:
        return f"a {config.model_type} model has no rotary positions that transformers could stretch"
    return f"its layers turn positions in {len(text.nested_rope_parameter_keys(parameters))} ways"


def _rigid(name: str, why: str) -> ModelError:
    return ModelError(
        f"{name} cannot be stretched: {why}", where="rope_scaling",
        expected="one rope for all layers, as Llama, Qwen and Mistral have",
        fix="drop rope_scaling; set a smaller cutoff_len, or choose a model with the context you need",
    )  # fmt: skip


def check_built(base: PreTrainedModel, stretch: Stretch | None, name: str) -> None:
    """Whether a model that was built from a changed config reads positions as that says; remembers that it does.

    Raises:
        ModelError: its code does not read that part of the config.
    """
    if stretch is None:
        return
    text = base.config.get_text_config()
    wanted = _frequencies(text, stretch.after.kind)
    found = [buffer for path, buffer in base.named_buffers() if path.endswith("inv_freq")]
    if not any(f.shape == wanted.shape and torch.allclose(f.float().cpu(), wanted, rtol=1e-2) for f in found):
        raise _rigid(name, f"{type(base).__name__} does not read rope_parameters")
    _STRETCHED[base] = stretch


def _frequencies(text: PretrainedConfig, kind: str) -> torch.Tensor:
    """[dimensions that turn / 2] what transformers computes of a config; linear by 1 is a rope as it is."""
    if kind == "default":
        text, kind = copy.deepcopy(text), "linear"
        text.rope_parameters = {**text.rope_parameters, "factor": 1.0}
    return ROPE_INIT_FUNCTIONS[kind](text, torch.device("cpu"))[0]


def write_record(directory: Path, base: nn.Module) -> None:
    """Write beside an adapter how its base reads positions, where that is not as its files say."""
    if (stretch := stretch_of(base)) is not None:
        (directory / RECORD).write_text(json.dumps(asdict(stretch), indent=2) + "\n", encoding="utf-8")


def read_record(adapter: str | Path) -> Stretch | None:
    """How an adapter's base was stretched when it was trained; None if it was not.

    Raises:
        ModelError: the file cannot be read.
    """
    path = Path(adapter) / RECORD
    if memory.is_name(adapter) or not path.is_file():
        return None
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        return Stretch(Rope(**said["before"]), Rope(**said["after"]))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(
            f"it does not say how the adapter's base reads positions: {error}", where=str(path),
            expected="before and after, each with parameters and positions", fix="copy the adapter's directory anew",
        ) from error  # fmt: skip


def _recorded(adapters: Sequence[str]) -> tuple[str, Stretch] | None:
    """What the adapters of a model say, and which of them says it. Raises ModelError if two disagree."""
    found = [(path, stretch) for path in adapters if (stretch := read_record(path)) is not None]
    for path, stretch in found[1:]:
        if stretch != found[0][1]:
            raise ModelError(
                f"{found[0][0]} was trained with {found[0][1]}, and {path} with {stretch}",
                where="adapter_name_or_path", expected="adapters of one base", fix="leave one of them out",
            )  # fmt: skip
    return found[0] if found else None


def check_adapter(base: PreTrainedModel, path: str | Path) -> None:
    """Whether a model reads positions as an adapter was trained; says so if the adapter knows of no stretch.

    Raises:
        ModelError: it does not.
    """
    record, rope = read_record(path), rope_of(base.config)
    if record is None:
        if (stretch := stretch_of(base)) is not None and not memory.is_name(path):
            log.warning("%s was trained without a stretch, and stands on a model with %s", path, stretch)
        return
    if rope != record.after:
        raise _mismatch(str(path), record, rope)
    _STRETCHED.setdefault(base, record)  # a model that somebody else has built


def _mismatch(path: str, record: Stretch, rope: Rope | None) -> ModelError:
    now = "has no rotary positions" if rope is None else f"has {rope} and {rope.positions:,} positions"
    return ModelError(
        f"the adapter was trained with {record}, and this model {now}", where=path,
        expected="the model that it was trained on", fix="give that model's name, and let the adapter stretch it; "
        "beside others, on a model of its own",
    )  # fmt: skip


def varies_beyond(base: PreTrainedModel) -> int | None:
    """The length from which on a row is read otherwise beside a longer one; None where that never is so."""
    rope = rope_of(base.config)
    if rope is None or rope.kind not in BY_LENGTH:
        return None
    return int(rope.parameters.get("original_max_position_embeddings") or rope.positions)
