"""What an export is going to write, and everything that is wrong with it, before any weights are read."""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trueup.config.schema import RunConfig
from trueup.data.chat_template import ChatTemplate
from trueup.data.templates import load_template
from trueup.errors import ConfigError, Problem, ResourceError, UserError
from trueup.inference.export.push import check_push
from trueup.inference.export.stage import check_space, check_target
from trueup.models.device_memory import free_memory
from trueup.models.estimate import shape_only
from trueup.models.expansion import insert_blocks
from trueup.models.hub import resolve_model
from trueup.models.load import pick_device
from trueup.models.merging import Combination, check_starts
from trueup.models.policy import Policy
from trueup.models.quantise import stored_quantisation
from trueup.models.reward import RewardModel, is_reward_model
from trueup.models.tokenizer import hub_access, load_tokenizer
from trueup.models.vocabulary import check_vocabulary

log = logging.getLogger("trueup")
T = TypeVar("T")

#: method → (module it takes, how to get it).
LIBRARIES = {
    "bnb": ("bitsandbytes", "pip install 'trueup[quant]'"),
    "gptq": ("gptqmodel", "pip install 'trueup[gptq]'"),
    "awq": ("llmcompressor", "pip install 'trueup[awq]'"),
}
_GGUF = ("gguf", "pip install 'trueup[gguf]'")
#: bytes of a weight in each GGUF format.
_GGUF_WIDTH = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32}


@dataclass(frozen=True)
class Plan:
    """An export that can begin.

    Attributes:
        root, location, starts: the base's name, where it is, and the adapters on it.
        kind: what the model is: a language model, or a reward model.
        shape: the model without weights.
        dtype: of the weights that are written.
    """

    cfg: RunConfig
    target: Path
    root: str
    location: str
    starts: list[str]
    kind: type[Policy]
    shape: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    dtype: torch.dtype
    combination: Combination
    device: torch.device
    before: list[Tensor] = field(default_factory=list)  # what base and adapters answered to the probe

    @property
    def is_reward(self) -> bool:
        return issubclass(self.kind, RewardModel)

    @property
    def shard_bytes(self) -> int:
        return max(1, int(self.cfg.export.export_size * 1e9))

    @cached_property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.shape.parameters())

    @property
    def bytes_needed(self) -> int:
        """On disk at the worst moment."""
        export = self.cfg.export
        full = self.parameters * self.dtype.itemsize
        packed = self.parameters * 1.2 if export.export_quantization_bit else 0  # embeddings stay as they are
        gguf = self.parameters * _GGUF_WIDTH[export.export_gguf] if export.export_gguf else 0
        return int(full + packed + gguf)


class _Found:
    """Problems as they turn up; the kind of the first decides the kind of the error."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.kind: type[UserError] | None = None

    def add(self, problems: list[Problem], kind: type[UserError] = ConfigError) -> None:
        if problems:
            self.problems += problems
            self.kind = self.kind or kind

    def run(self, work: Callable[[], T]) -> T | None:
        """A result, or None and what was wrong."""
        try:
            return work()
        except UserError as error:
            self.add(error.problems, type(error))
            return None

    def raise_all(self) -> None:
        if self.problems:
            assert self.kind is not None
            raise self.kind(self.problems)


def make_plan(cfg: RunConfig) -> Plan:
    """Look at everything that an export needs.

    Raises:
        UserError: with everything that is wrong, all at once.
    """
    found, export, model = _Found(), cfg.export, cfg.model
    target = Path(str(export.export_dir)).expanduser()
    found.add(check_target(target, export.overwrite_export_dir))
    found.add(_missing_libraries(cfg))
    if export.export_hub_model_id:
        found.add(check_push(cfg))
    names = (str(model.model_name_or_path), model.adapter_name_or_path, hub_access(model))
    resolved = found.run(lambda: resolve_model(*names))
    if resolved is None:
        found.raise_all()
    assert resolved is not None
    root, location, starts = resolved
    combination = Combination(
        export.merge_method, tuple(export.merge_weights), export.merge_density, cfg.train.seed
    )  # fmt: skip
    found.add(found.run(lambda: check_starts(starts, combination)) or [])
    if is_reward_model(model):
        kind: type[Policy] = RewardModel
        if export.export_gguf:
            found.add([Problem("a reward model cannot be written as GGUF", "export_gguf", fix="drop export_gguf")])
    else:
        kind = Policy
    shape = found.run(lambda: _shape(cfg, kind))
    tokenizer = found.run(lambda: load_tokenizer(model))
    template = found.run(lambda: template_of(cfg, tokenizer)) if tokenizer is not None else None
    if shape is None or tokenizer is None or template is None:
        found.raise_all()
    assert shape is not None and tokenizer is not None and template is not None
    found.run(lambda: check_vocabulary(shape, tokenizer, root))
    found.add(_check_base(shape, root))
    tokenizer = copy.deepcopy(tokenizer)
    template.attach(tokenizer)
    if export.export_gguf and kind is Policy and importlib.util.find_spec(_GGUF[0]):
        from trueup.inference.export.gguf_file import check_gguf

        found.add(check_gguf(shape, tokenizer, export.export_gguf))
    plan = Plan(
        cfg, target, root, location, starts, kind, shape, tokenizer, template, _dtype(cfg, shape), combination,
        pick_device("cpu" if export.export_device == "cpu" else model.device),
    )  # fmt: skip
    found.add(check_space(target, plan.bytes_needed), ResourceError)
    found.raise_all()
    _say_memory(plan)
    return plan


def _shape(cfg: RunConfig, kind: type[Policy]) -> PreTrainedModel:
    """Of what is written."""
    shape = shape_only(cfg, kind)
    if cfg.export.num_expand:
        insert_blocks(shape, cfg.export.num_expand)
    return shape


def template_of(cfg: RunConfig, tokenizer: Any) -> ChatTemplate:
    """The template that a config asks for, or the tokenizer's own."""
    data = cfg.data
    return load_template(
        tokenizer, data.template, data.default_system, data.enable_thinking, data.preserve_thinking,
        data.tool_format, cfg.model.split_special_tokens,
    )  # fmt: skip


def _missing_libraries(cfg: RunConfig) -> list[Problem]:
    export, wanted = cfg.export, []
    if export.export_gguf:
        wanted.append(("export_gguf", *_GGUF))
    if export.export_quantization_bit:
        wanted.append(("export_quantization_method", *LIBRARIES[str(export.export_quantization_method)]))
    return [
        Problem(f"this needs {module}, which is not installed", key, fix=install)
        for key, module, install in wanted
        if importlib.util.find_spec(module) is None
    ]


def _check_base(shape: PreTrainedModel, root: str) -> list[Problem]:
    """Whether adapters can be folded into a base that may be quantised."""
    stored = stored_quantisation(shape.config)
    if stored is None:
        return []
    if "bitsandbytes" in stored["quant_method"]:
        log.warning("%s is quantised by bitsandbytes: its weights are written out in full, rounded as they are", root)
        return []
    return [
        Problem(
            f"{root} is quantised ({stored['quant_method']}), and adapters cannot be folded into such weights",
            "model_name_or_path",
            "a model that is not quantised, or one of bitsandbytes",
            "give the model that it was quantised from",
        )  # fmt: skip
    ]


def _dtype(cfg: RunConfig, shape: PreTrainedModel) -> torch.dtype:
    wanted = cfg.model.infer_dtype
    if wanted != "auto":
        return getattr(torch, wanted)
    own = shape.config.dtype
    own = getattr(torch, own) if isinstance(own, str) else own
    return own if own in (torch.float32, torch.bfloat16, torch.float16) else torch.float32


def _say_memory(plan: Plan) -> None:
    needed, free = plan.parameters * 4, free_memory(plan.device)
    if needed > free:
        log.warning(
            "adapters are folded in fp32, which takes %.1f GB of memory; %.1f GB are free on %s",
            needed / 1e9, free / 1e9, plan.device,
        )  # fmt: skip
