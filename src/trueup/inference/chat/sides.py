"""Who answers: a model, its adapters as voices of one engine, other models beside it, or models behind a URL."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from trueup.config.building import is_url
from trueup.config.schema import RunConfig
from trueup.data.examples import Message
from trueup.data.templates import ChatTemplate, load_template
from trueup.errors import ConfigError, ModelError
from trueup.inference.chat.critics import Critic
from trueup.models.hub import HubAccess, resolve_model
from trueup.models.load import load_for_inference, load_tokenizer
from trueup.models.tokenizer import hub_access
from trueup.rollout.endpoint import Endpoint
from trueup.rollout.endpoint_engine import EndpointEngine
from trueup.rollout.engines import BASE, Engine, Generation, Sampling
from trueup.training.run_files import read_config

log = logging.getLogger("trueup")


@dataclass
class Side:
    """One voice of the conversation, with what it has said so far.

    Attributes:
        voice: the engine's: None, as it was loaded.
        template: None behind a URL, which has its own.
        source: the model, for records.
        critic: how it values answers, where it was aligned from something that is here.
    """

    name: str
    engine: Any  # Engine or EndpointEngine
    template: ChatTemplate | None
    voice: str | None = None
    source: str = ""
    critic: Critic | None = None
    messages: list[Message] = field(default_factory=list)

    @property
    def opens_thought(self) -> bool:
        """Whether its prompts end inside a thought."""
        return self.template is not None and "<think>" in self.template.ends.opened

    def begin(self, sampling: Sampling) -> Generation:
        """Start the answer to `messages`. Raises TooLong, TemplateRefusal."""
        if self.template is None:
            return self.engine.chat([message.to_dict() for message in self.messages], sampling, self.voice)
        sampling = replace(sampling, stop_ids=tuple({*sampling.stop_ids, *self.template.stop_ids}))
        return self.engine.submit(self.template.encode_prompt(self.messages), sampling, self.voice)


@dataclass
class _House:
    """Weights that are loaded, and where they are from."""

    cfg: RunConfig
    location: str
    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    critics: int = 0

    @property
    def adapted(self) -> bool:
        return isinstance(self.engine.policy.model, PeftModel)


def load_sides(
    cfg: RunConfig, compare: bool = False, beside: Sequence[str] = (), key_env: str | None = None
) -> list[Side]:
    """The config's model, and those beside it; with `compare`, first of all the base without adapters.

    Adapters on one base share its weights.

    Raises:
        ConfigError: nothing to compare. ModelError: a model that cannot be loaded.
    """
    crew = _Crew(cfg, key_env)
    crew.first()
    for name in beside:
        crew.more(name)
    if compare:
        crew.base()
    return crew.sides


class _Crew:
    """The sides as they are gathered, and what is loaded for them."""

    def __init__(self, cfg: RunConfig, key_env: str | None) -> None:
        self.cfg, self.key_env = cfg, key_env
        self.access: HubAccess = hub_access(cfg.model)
        self.houses: list[_House] = []
        self.sides: list[Side] = []

    def first(self) -> None:
        """The config's own model, with its adapters."""
        model = self.cfg.model
        name = str(model.model_name_or_path)
        if is_url(name):
            self._behind(name, "assistant")
            return
        house, starts = self._house(self.cfg)
        source = " + ".join([name, *model.adapter_name_or_path])
        side = Side("assistant", house.engine, house.template, source=source)
        if starts:
            side.critic = self._critic(house, side, starts)
        self.sides.append(side)

    def base(self) -> None:
        """The base of the first model that has adapters."""
        house = next((house for house in self.houses if house.adapted), None)
        if house is None:
            raise ConfigError(
                "there is no adapter to compare with", where="--compare", fix="add --adapter_name_or_path DIR"
            )
        own = self.sides[0]
        if own.engine is house.engine and own.critic is None:  # it is the base itself
            own.name = BASE
            return
        own.name = "adapter" if len(self.sides) == 1 else own.name
        self.sides.insert(0, Side(BASE, house.engine, house.template, BASE, source=house.location))

    def more(self, name: str) -> None:
        """A model beside the others."""
        own = self.sides[0]
        if own.name == "assistant":
            model = self.cfg.model
            own.name = self._label([str(model.model_name_or_path), *model.adapter_name_or_path][-1:])
        label = self._label([name])
        if is_url(name):
            self._behind(name, label)
            return
        _, location, starts = resolve_model(name, [], self.access, ("--with", "--with"))
        house = next((house for house in self.houses if house.location == location), None)
        if house is None:
            house, starts = self._house(self.cfg.replace(model_name_or_path=name, adapter_name_or_path=[]))
            voice = None
        elif starts:
            house.engine.attach(label, starts)
            voice = label
        else:
            voice = BASE
        side = Side(label, house.engine, self._template(house.tokenizer, name), voice, name)
        if starts:
            side.critic = self._critic(house, side, starts)
        self.sides.append(side)

    # --- parts ----------------------------------------------------------------------------------

    def _behind(self, name: str, label: str) -> None:
        endpoint = Endpoint(name, key_env=self.key_env, tries=2, where="--with")
        self.sides.append(Side(label, EndpointEngine(endpoint), None, source=name))

    def _house(self, cfg: RunConfig) -> tuple[_House, list[str]]:
        model = cfg.model
        tokenizer = load_tokenizer(model)
        _, location, starts = resolve_model(str(model.model_name_or_path), model.adapter_name_or_path, self.access)
        template = self._template(tokenizer, starts[-1] if starts else str(model.model_name_or_path))
        policy = load_for_inference(model, cfg.train)
        # Each side's template has ends of its own, which its requests name.
        eos = tokenizer.eos_token_id
        engine = Engine(policy, tokenizer, template.stop_ids if eos is None else [eos])
        house = _House(cfg, location, engine, tokenizer, template)
        self.houses.append(house)
        return house, list(starts)

    def _template(self, tokenizer: PreTrainedTokenizerBase, name: str) -> ChatTemplate:
        """The template that is asked for, or the one a run was trained with."""
        data = self.cfg.data
        trained_with = None if data.template else _record(name).get("template")
        return load_template(
            tokenizer,
            data.template or trained_with,
            enable_thinking=data.enable_thinking,
            preserve_thinking=data.preserve_thinking,
            tool_format=data.tool_format,
            split_special_tokens=self.cfg.model.split_special_tokens,
        )

    def _critic(self, house: _House, side: Side, starts: Sequence[str]) -> Critic:
        """What answers are worth to a side with adapters: against what its run started from, as far as that is here."""
        record = _record(starts[-1])
        beta = record.get("pref_beta", self.cfg.objective.pref_beta)
        reference, against = BASE, BASE
        if before := self._starts_of(record, house):
            house.critics += 1
            reference, against = f"start {house.critics}", " + ".join(map(_short, before))
            house.engine.attach(reference, before)
        assert side.template is not None
        return Critic(house.engine, side.template, side.voice, reference, float(beta), against)

    def _starts_of(self, record: dict[str, Any], house: _House) -> list[str]:
        """The adapters that a run started from, or its `ref_model_adapters`; none, if its reference is the base."""
        ref = record.get("ref_model")
        name = ref or record.get("model_name_or_path")
        adapters = record.get("ref_model_adapters" if ref else "adapter_name_or_path") or []
        if not name:
            return []
        try:
            _, location, starts = resolve_model(str(name), list(adapters), self.access)
        except ModelError:
            location, starts = "", []
        if location != house.location:
            log.warning("rewards are against the base: %s, which the run was compared with, is not here", name)
            return []
        return list(starts)

    def _label(self, names: Sequence[str]) -> str:
        """The last part of a name, with a number where it is taken."""
        label = _short(names[-1]) if names else "assistant"
        taken = {BASE, *(side.name for side in self.sides)}
        number = 2
        while (found := label if number == 2 and label not in taken else f"{label}_{number}") in taken:
            number += 1
        return found


def _short(name: str) -> str:
    """The last part of a path or URL; of a checkpoint, with its run's name."""
    parts = [part for part in name.rpartition("#")[2].split("/") if part] or [name]
    return "/".join(parts[-2:]) if parts[-1].startswith("checkpoint-") else parts[-1]


def _record(name: str) -> dict[str, Any]:
    """What a run's directory, or that of a checkpoint's run, says it was told."""
    path = Path(name).expanduser()
    return read_config(path) or (read_config(path.parent) if path.name.startswith("checkpoint-") else {})
