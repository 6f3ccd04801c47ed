"""From a dataset on: to the form of the stage that its rows fit."""

from __future__ import annotations

from urllib.parse import urlencode

from trueup.builtin import BUILTIN_MODELS
from trueup.config.checks import default_output_dir
from trueup.web.draft import Draft
from trueup.web.workspace import Workspace

#: kind of rows → the stage that learns from them.
STAGES = {"text": "pt", "chat": "sft", "pair": "dpo", "ranking": "rm", "feedback": "kto", "prompt": "grpo"}


def train_address(place: Workspace, dataset: str, kind: str | None, model: str = BUILTIN_MODELS[0]) -> str:
    """The form of a training on a dataset, as its stage begins."""
    stage = STAGES.get(kind or "", "sft")
    draft = Draft.new(stage, model)
    usual = default_output_dir(model, draft.values.get("finetuning_type", "lora"), stage).removeprefix("saves/")
    draft.values |= {"dataset": dataset, "output_dir": place.output_dir(place.free_run_id(usual))}
    return "/train?" + urlencode({"draft": draft.pack()})
