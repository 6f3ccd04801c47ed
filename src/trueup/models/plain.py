"""Models as transformers and peft have them, for programs that go on with them by themselves."""

from __future__ import annotations

from collections.abc import Sequence

from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel

from trueup.config.schema import ModelSection, TrainSection
from trueup.errors import ModelError
from trueup.models.adapters import attach_alone
from trueup.models.hub import resolve_model
from trueup.models.load import load_base, pick_device, pick_dtype, read_model_config
from trueup.models.policy import Policy
from trueup.models.tokenizer import hub_access


def load_plain(model: ModelSection, train: TrainSection, kind: type[Policy] = Policy) -> PreTrainedModel | PeftModel:
    """A config's model on its device and in its dtype; with an adapter, a peft model whose adapter trains.

    Raises:
        ModelError: it cannot be loaded, or stands on several adapters.
    """
    name, location, starts = resolve_model(model.model_name_or_path, model.adapter_name_or_path, hub_access(model))
    if len(starts) > 1:
        raise ModelError(
            f"{model.model_name_or_path} stands on {len(starts)} adapters, and a peft model has one",
            where="adapter_name_or_path", fix="merge all but the last",
        )  # fmt: skip
    device = pick_device(model.device)
    base = load_base(location, model, device, pick_dtype(device, train.bf16, train.fp16), name, kind, adapters=starts)
    return attach_alone(base, starts[0]) if starts else base


def model_type(model: ModelSection) -> str:
    """What transformers calls the architecture ("qwen2")."""
    name, location, _ = resolve_model(model.model_name_or_path, model.adapter_name_or_path, hub_access(model))
    return read_model_config(location, model, name).model_type


def tidy_generation(base: PreTrainedModel, stop_ids: Sequence[int]) -> None:
    """Generation settings that stop where answers end, and that transformers will agree to save."""
    settings = base.generation_config or GenerationConfig()
    settings.eos_token_id = list(stop_ids)
    try:
        settings.validate(strict=True)
    except ValueError:  # some published models set a temperature beside do_sample: false, and saving would refuse it
        settings.do_sample = True
    base.generation_config = settings
