"""Reward models of any kind as functions on texts: classifiers that are no decoders with a head called `score`.

`models/reward.py` reads decoders, by the forest. Encoders and others go through here, with their own tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from trueup.config.schema import ModelSection
from trueup.errors import ModelError
from trueup.models.hub import locate, unreachable
from trueup.models.load import hub_access, load_tokenizer, read_model_config
from trueup.models.reward import HEAD, has_head
from trueup.models.tokenizer import UNCHANGED


class TextScorer:
    """A sequence classifier of one label on pairs of a question and an answer."""

    def __init__(self, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer

    @torch.inference_mode()
    def __call__(self, questions: Sequence[str], answers: Sequence[str], batch_size: int = 32) -> list[float]:
        """A number for each answer; what does not fit into the model is cut off at its end."""
        scores: list[float] = []
        for start in range(0, len(answers), batch_size):
            pairs = list(questions[start : start + batch_size]), list(answers[start : start + batch_size])
            batch = self.tokenizer(*pairs, padding=True, truncation=True, return_tensors="pt")
            logits = self.model(**batch.to(next(self.model.parameters()).device)).logits
            scores += logits[:, 0].float().tolist()
        return scores


def is_text_classifier(model: ModelSection, name: str) -> bool:
    """Whether `name` is a whole classifier that `models/reward.py` cannot read: it has no head called `score`."""
    access = hub_access(model)
    config = read_model_config(locate(name, access, "reward_model"), model, name, "reward_model")
    if not has_head(config):
        return False
    with torch.device("meta"):
        return not hasattr(AutoModelForSequenceClassification.from_config(config), HEAD)


def load_text_scorer(model: ModelSection, name: str, device: torch.device, dtype: torch.dtype) -> TextScorer:
    """A classifier with its tokenizer, frozen.

    Raises:
        ModelError: it cannot be loaded, or says more than one number.
    """
    access = hub_access(model)
    section = model.model_copy(update={**UNCHANGED, "model_name_or_path": name, "adapter_name_or_path": []})
    try:
        found = AutoModelForSequenceClassification.from_pretrained(
            locate(name, access, "reward_model"), dtype=dtype, use_safetensors=True, device_map={"": device},
            revision=access.revision, token=access.token, cache_dir=access.cache_dir,
            trust_remote_code=model.trust_remote_code,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise unreachable(name, access, error, "reward_model") from error
    if found.config.num_labels != 1:
        raise ModelError(
            f"{name} has {found.config.num_labels} labels", where="reward_model", expected="one number for an answer",
            fix="choose a reward model (num_labels 1)",
        )  # fmt: skip
    return TextScorer(found, load_tokenizer(section))
