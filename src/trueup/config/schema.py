"""All keys in one place: sections put together, looked up by key, written out again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from trueup.config.names import is_secret
from trueup.config.sections.build import BuildSection
from trueup.config.sections.data import DataSection
from trueup.config.sections.generate import EvaluateSection, ExportSection, GenerateSection
from trueup.config.sections.model import ModelSection
from trueup.config.sections.objective import ObjectiveSection
from trueup.config.sections.online import OnlineSection
from trueup.config.sections.reward import RewardSection
from trueup.config.sections.train import TrainSection
from trueup.config.sections.tuning import TuningSection
from trueup.config.values import Section

SECTIONS: dict[str, type[Section]] = {
    "model": ModelSection,
    "data": DataSection,
    "tuning": TuningSection,
    "objective": ObjectiveSection,
    "reward": RewardSection,
    "online": OnlineSection,
    "train": TrainSection,
    "generate": GenerateSection,
    "export": ExportSection,
    "evaluate": EvaluateSection,
    "build": BuildSection,
}
REDACTED = "<redacted>"
#: how a run is started, not what it is.
OF_THE_COMMAND = frozenset({"resume_from_checkpoint", "new_run", "overwrite_output_dir", "allow_changed"})

#: key → the section it is in, and its field.
SECTION_OF: dict[str, str] = {key: name for name, model in SECTIONS.items() for key in model.model_fields}
FIELDS: dict[str, FieldInfo] = {key: SECTIONS[name].model_fields[key] for key, name in SECTION_OF.items()}
SECRETS = frozenset(key for key in FIELDS if is_secret(key))
for _field in FIELDS.values():
    _field.description = " ".join((_field.description or "").split())


def kinds(annotation: Any) -> Iterator[Any]:
    """The plain types inside an annotation: `Annotated[bool | None, …]` → bool, NoneType."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from kinds(get_args(annotation)[0])
    elif origin in (Union, UnionType):
        for part in get_args(annotation):
            yield from kinds(part)
    else:
        yield origin or annotation


def is_flag(key: str) -> bool:
    """Whether `--key` alone means true."""
    return bool in kinds(FIELDS[key].annotation)


def is_nullable(key: str) -> bool:
    """Whether null is a value of its own, rather than another way to leave the key out."""
    return type(None) in kinds(FIELDS[key].annotation)


def default(key: str) -> Any:
    """The schema's default of a key."""
    return FIELDS[key].get_default(call_default_factory=True)


@dataclass(frozen=True)
class RunConfig:
    """Everything a run is told, checked. `explicit`: what the user set, by canonical name."""

    model: ModelSection
    data: DataSection
    tuning: TuningSection
    objective: ObjectiveSection
    reward: RewardSection
    online: OnlineSection
    train: TrainSection
    generate: GenerateSection
    export: ExportSection
    evaluate: EvaluateSection
    build: BuildSection
    explicit: frozenset[str] = field(default=frozenset(), compare=False)

    def __getitem__(self, key: str) -> Any:
        """The value of a canonical key."""
        return getattr(getattr(self, SECTION_OF[key]), key)

    def replace(self, **changes: Any) -> RunConfig:
        """A copy with some keys changed. Values come from code and are taken as they are."""
        sections = {name: getattr(self, name) for name in SECTIONS}
        for key, value in changes.items():
            name = SECTION_OF[key]
            sections[name] = sections[name].model_copy(update={key: value})
        return RunConfig(**sections, explicit=self.explicit)

    def resolved(self) -> dict[str, Any]:
        """The run as flat keys, for run.yaml: those that act in training or were changed, without secrets.

        Loading it again gives an equal config. Keys of the one command (whether to resume, to
        overwrite …) are no part of the run.
        """
        from trueup.config.methods import missing_condition, other_verb

        def acts(key: str) -> bool:
            overruled = key == "num_train_epochs" and self.train.max_steps > 0
            return not overruled and other_verb(key, self) is None and missing_condition(key, self) is None

        return {
            key: REDACTED if key in SECRETS and self[key] else self[key]
            for key in SECTION_OF
            if key not in OF_THE_COMMAND and (self[key] != default(key) or acts(key))
        }


def dump_yaml(cfg: RunConfig) -> str:
    """`resolved()` as YAML, by section."""
    flat = cfg.resolved()
    parts = []
    for name in SECTIONS:
        lines = {key: value for key, value in flat.items() if SECTION_OF[key] == name}
        if lines:
            body = yaml.safe_dump(lines, sort_keys=False, allow_unicode=True, width=1000)
            parts.append(f"# {name}\n{body}")
    return "\n".join(parts)


def json_schema() -> dict[str, Any]:
    """JSON Schema of the flat file, for editors, forms and docs. `x-section` is a key's group."""
    properties: dict[str, Any] = {}
    for name, model in SECTIONS.items():
        for key, rule in model.model_json_schema()["properties"].items():
            properties[key] = {
                **_standard(rule),
                "description": FIELDS[key].description,
                "x-section": name,
            }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "trueup run",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


#: pydantic keeps its own names for limits behind a validator.
_LIMITS = {
    "gt": "exclusiveMinimum",
    "ge": "minimum",
    "lt": "exclusiveMaximum",
    "le": "maximum",
}


def _standard(rule: Any) -> Any:
    if isinstance(rule, list):
        return [_standard(item) for item in rule]
    if not isinstance(rule, dict):
        return rule
    return {_LIMITS.get(name, name): _standard(value) for name, value in rule.items()}
