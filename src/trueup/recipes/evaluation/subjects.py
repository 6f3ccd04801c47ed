"""Which models an evaluation measures, and what each of them is compared with."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from trueup.config.building import is_url
from trueup.config.evaluating import START
from trueup.config.methods import needs_reference
from trueup.config.schema import RunConfig
from trueup.errors import ConfigError, ModelError
from trueup.models.hub import resolve_model
from trueup.models.load import hub_access, load_for_inference, load_tokenizer, read_model_config
from trueup.models.policy import Policy
from trueup.models.reference import LiveReference

log = logging.getLogger("trueup")

MODELS = "eval_models"


@dataclass(frozen=True)
class Subject:
    """A model to be measured. `cfg`: the evaluation's, with this model in it; `key`: which of its keys named it."""

    name: str
    cfg: RunConfig
    key: str = "model_name_or_path"

    @property
    def is_endpoint(self) -> bool:
        return is_url(self.cfg.model.model_name_or_path)

    def load(self) -> Policy:
        return load_for_inference(self.cfg.model, self.cfg.train)


def subjects_of(cfg: RunConfig) -> list[Subject]:
    """The models of `eval_models`, or the config's own with its adapters; names are as short as they can be."""
    if not cfg.evaluate.eval_models:
        adapters = [Path(name).name for name in cfg.model.adapter_name_or_path]
        return [Subject(" + ".join([short(str(cfg.model.model_name_or_path)), *adapters]), cfg)]
    found = []
    for name in cfg.evaluate.eval_models:
        own = cfg if name == START else cfg.replace(model_name_or_path=name, adapter_name_or_path=[])
        found.append((name, own))
    shorts = [short(name) for name, _ in found]
    return [
        Subject(s if shorts.count(s) == 1 else name, own, "model_name_or_path" if name == START else MODELS)
        for s, (name, own) in zip(shorts, found, strict=True)
    ]


def short(name: str) -> str:
    """The last part of a path or URL; of a checkpoint, with its run's name."""
    parts = [part for part in name.rpartition("#")[2].split("/") if part]
    if not parts:
        return name
    return "/".join(parts[-2:]) if parts[-1].startswith("checkpoint-") else parts[-1]


class Reference:
    """What the models are compared with: `ref_model`, the start, the first model, or the base without adapters.

    It is loaded when a model needs it, and not at all for one that it is a part of.
    """

    def __init__(self, cfg: RunConfig) -> None:
        self.cfg = _reference_config(cfg)
        self._policy: Policy | None = None
        named = bool(cfg.objective.ref_model)
        self._keys = ("ref_model", "ref_model_adapters") if named else ("model_name_or_path", "adapter_name_or_path")

    def check(self) -> None:
        """Whether it can be had. Raises ModelError."""
        if self.cfg is not None:
            name, location, _ = located(self.cfg, *self._keys)
            read_model_config(location, self.cfg.model, name, self._keys[0])

    def exists_for(self, subject: Subject) -> bool:
        """Whether there is something to compare a model with. Raises ModelError where it reads other tokens."""
        _, location, starts = located(subject.cfg)
        if self.cfg is None:
            return bool(starts)
        _, base, adapters = located(self.cfg)
        if base != location or (adapters and adapters != starts):
            _same_tokens(subject, self.cfg)
        return True

    def of(self, subject: Subject, policy: Policy) -> LiveReference | None:
        """The reference of one model; None where there is nothing to compare with.

        Raises:
            ModelError: the two do not read the same tokens.
        """
        _, location, starts = located(subject.cfg)
        if self.cfg is None:
            if not starts:
                return None
            log.warning(
                "comparing with %s without adapters; if the training started from an adapter, name it: ref_model, "
                "ref_model_adapters", location,
            )  # fmt: skip
            return LiveReference(policy, policy.model.disable_adapter)
        _, base, adapters = located(self.cfg)
        if (base, adapters) == (location, starts):
            return LiveReference(policy)
        if base == location and not adapters:
            switch: Callable[[], AbstractContextManager] = policy.model.disable_adapter if starts else nullcontext
            return LiveReference(policy, switch)
        if self._policy is None:
            self._policy = load_for_inference(self.cfg.model, self.cfg.train)
        return LiveReference(self._policy)

    @property
    def name(self) -> str | None:
        """How the report calls it."""
        if self.cfg is None:
            return None
        model = self.cfg.model
        return " + ".join([short(str(model.model_name_or_path)), *map(short, model.adapter_name_or_path)])


def _reference_config(cfg: RunConfig) -> RunConfig | None:
    objective = cfg.objective
    if objective.ref_model:
        return cfg.replace(
            model_name_or_path=objective.ref_model, adapter_name_or_path=list(objective.ref_model_adapters)
        )
    names = cfg.evaluate.eval_models
    if not names:
        return None
    if cfg.model.model_name_or_path:
        return cfg
    first = names[0] if len(names) > 1 and not is_url(names[0]) else None
    return cfg.replace(model_name_or_path=first, adapter_name_or_path=[]) if first else None


def located(cfg: RunConfig, *keys: str) -> tuple[str, str, list[str]]:
    """A config's base by name and by place, and the adapters on it; `keys` named the model and its adapters."""
    model = cfg.model
    both = (*keys, *("model_name_or_path", "adapter_name_or_path")[len(keys) :])
    return resolve_model(str(model.model_name_or_path), model.adapter_name_or_path, hub_access(model), both)


def _same_tokens(subject: Subject, reference: RunConfig) -> None:
    own, other = load_tokenizer(subject.cfg.model), load_tokenizer(reference.model)
    if own.get_vocab() != other.get_vocab():
        raise ModelError(
            f"{subject.name} and its reference read different tokens", where="eval_models",
            expected="a reference with the same tokenizer",
            fix="set ref_model to what this model was trained from, and measure it by itself",
        )  # fmt: skip


def require_reference(cfg: RunConfig, exists: bool, subject: Subject) -> None:
    """Whether preference can be measured by this objective. Raises ConfigError."""
    if not exists and needs_reference(cfg):
        raise ConfigError(
            f"preference by `pref_loss: {cfg.objective.pref_loss}` compares {subject.name} with a reference, and none "
            "is named", where="ref_model",
            fix="set ref_model to the model the training started from, or give base and adapter separately",
        )  # fmt: skip
