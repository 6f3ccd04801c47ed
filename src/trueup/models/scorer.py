"""A reward model as a function from token ids to numbers: a sequence classifier of one label, maybe with adapters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification

from trueup.config.schema import ModelSection
from trueup.errors import ModelError
from trueup.models.hub import resolve_model, unreachable
from trueup.models.load import hub_access


class Scorer:
    """Scores whole conversations, each by the hidden state of its last token."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model.requires_grad_(False).eval()

    @torch.inference_mode()
    def score(self, sequences: Sequence[Sequence[int]], batch_tokens: int = 16384) -> list[float]:
        """A number for each sequence of token ids, in order."""
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]), reverse=True)
        scores = [0.0] * len(sequences)
        while order:
            size = max(1, batch_tokens // max(1, len(sequences[order[0]])))
            group, order = order[:size], order[size:]
            for i, value in zip(group, self._batch([sequences[i] for i in group]).tolist(), strict=True):
                scores[i] = value
        return scores

    def _batch(self, rows: Sequence[Sequence[int]]) -> Tensor:
        config = self.model.config
        device = next(self.model.parameters()).device
        # transformers reads a row's score at its last token that is not padding, and takes an end-of-text that is also
        # the padding token for padding. So the padding is a token that no row ends with.
        pad = min(set(range(len(rows) + 1)) - {int(row[-1]) for row in rows})
        before, config.pad_token_id = config.pad_token_id, pad
        try:
            width = max(map(len, rows))
            ids = torch.full((len(rows), width), pad)
            mask = torch.zeros_like(ids)
            for i, row in enumerate(rows):
                ids[i, : len(row)] = torch.as_tensor(row)
                mask[i, : len(row)] = 1
            logits = self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
        finally:
            config.pad_token_id = before
        return logits[:, 0].float().cpu()


def load_scorer(
    model: ModelSection, name: str, adapters: Sequence[str], device: torch.device, dtype: torch.dtype
) -> Scorer:
    """The reward model `name`: a classifier's directory or hub id, or an adapter's directory (its base is found).

    Raises:
        ModelError: it cannot be loaded, or says more than one number.
    """
    access = hub_access(model)
    keys = "reward_model", "reward_model_adapters"
    root, location, starts = resolve_model(name, list(adapters), access, keys)
    common = dict(revision=access.revision, token=access.token, cache_dir=access.cache_dir,
                  trust_remote_code=model.trust_remote_code)  # fmt: skip
    try:
        config = AutoConfig.from_pretrained(location, **common)
        is_classifier = any("SequenceClassification" in kind for kind in config.architectures or ())
        if is_classifier and config.num_labels != 1:
            raise ModelError(
                f"{root} has {config.num_labels} labels", where="reward_model", expected="one number for an answer",
                fix="choose a reward model (num_labels 1)",
            )  # fmt: skip
        if not is_classifier and not starts:
            raise ModelError(
                f"{root} is no reward model: {', '.join(config.architectures or ['its kind is unknown'])}",
                where="reward_model", expected="an output of stage: rm, or a …ForSequenceClassification of one label",
            )  # fmt: skip
        config.num_labels = 1
        found = AutoModelForSequenceClassification.from_pretrained(
            location, config=config, dtype=dtype, use_safetensors=True, device_map={"": device}, **common
        )
        for start in starts:
            found = PeftModel.from_pretrained(found, start, is_trainable=False).merge_and_unload()
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise unreachable(root, access, error, "reward_model") from error
    return Scorer(found)
