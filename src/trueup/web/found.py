"""What a key may be set to: models, adapters, datasets and functions that lie here, templates, losses. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping

from trueup.builtin import BUILTIN_MODELS
from trueup.config.losses import STAGE_LOSSES
from trueup.data.registry import known_names
from trueup.data.template_names import TEMPLATES
from trueup.errors import UserError
from trueup.web.draft import CODE_KEYS
from trueup.web.workspace import Workspace

SUGGESTED = ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen3-0.6B", "HuggingFaceTB/SmolLM2-135M-Instruct")
#: functions that compare answers with a column of the data; they need no file (trueup.rollout.verify)
BUILT_IN_REWARDS = ("exact_match", "numeric", "regex", "json_schema", "sql_result")
_MODELS = ("model_name_or_path", "ref_model", "reward_model", "judge_model")
_ADAPTERS = ("adapter_name_or_path", "ref_model_adapters", "reward_model_adapters")
_DATASETS = ("dataset", "eval_dataset", "export_quantization_dataset")


def found_here(name: str, place: Workspace, values: Mapping[str, str]) -> list[str] | None:
    """What may be chosen for a key beyond what the schema says; None where that says it all."""
    if name in _MODELS:
        return [*BUILTIN_MODELS, *place.models(), *place.trained(), *SUGGESTED]
    if name in _ADAPTERS:
        return place.adapters()
    if name == "eval_models":
        return [*place.adapters(), *(path.removeprefix("./") for path in place.trained())]
    if name in _DATASETS:
        try:
            return known_names(place.root / values.get("dataset_dir", "data"))
        except UserError:
            return known_names(place.root / "data-that-is-not-there")
    if name == "pref_loss":
        return list(STAGE_LOSSES.get(values.get("stage", ""), ()))
    if name == "template":
        return sorted(TEMPLATES)
    if name == "reward_funcs":
        return [*place.code(), *BUILT_IN_REWARDS]
    return place.code() if name in CODE_KEYS else None
