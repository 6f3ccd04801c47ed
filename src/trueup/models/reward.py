"""A reward model: a sequence classifier of one label as a function from forests to scores.

The score is a linear map of the hidden state at a row's last token, so no logits exist and answers share their prompt.
Files are those of `AutoModelForSequenceClassification`, which reads a row at its last token that is not padding; so
does this module, also where a tokenizer pads with the token that ends an answer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

from trueup import memory
from trueup.config.schema import ModelSection
from trueup.errors import ModelError
from trueup.models.hub import ADAPTER_CONFIG, resolve_model
from trueup.models.load import load_frozen, read_model_config
from trueup.models.policy import Policy
from trueup.models.tokenizer import hub_access, load_tokenizer
from trueup.types import Forest, Segment

HEAD = "score"  # transformers' name for the head of every decoder that classifies sequences
CLASSIFIER = "ForSequenceClassification"

Ids = Sequence[int] | np.ndarray


class RewardModel(Policy):
    """A decoder with a head of one number. The head is kept in fp32."""

    auto_class = AutoModelForSequenceClassification
    task_type = "SEQ_CLS"
    always_trained = (HEAD,)

    @classmethod
    def prepare(cls, config: PretrainedConfig) -> None:
        """One label; what was trained to tell several classes apart is no reward model."""
        if has_head(config) and config.num_labels != 1:
            raise ModelError(
                f"the model has {config.num_labels} labels", where="model_name_or_path",
                expected="one number for an answer", fix="choose a reward model (num_labels 1), or a language model",
            )  # fmt: skip
        config.num_labels = 1

    def __init__(self, base: PreTrainedModel, model: nn.Module | None = None) -> None:
        super().__init__(base, model)
        head = getattr(base, HEAD, None)
        plain = head.original_module if isinstance(head, ModulesToSaveWrapper) else head
        if not isinstance(plain, nn.Linear) or plain.bias is not None:
            raise ModelError(
                f"{type(base).__name__} has no plain linear head called {HEAD}", where="model_name_or_path",
                expected="a decoder that transformers can load as a sequence classifier",
            )  # fmt: skip
        self.score: nn.Module = head.float()

    @property
    def pad_id(self) -> int | None:
        """The token that transformers takes for padding."""
        return self.base.config.get_text_config().pad_token_id

    def pad_with(self, token: int | None) -> None:
        """Set the padding token, which a saved model has to name."""
        self.base.config.pad_token_id = self.base.config.get_text_config().pad_token_id = token

    def rewards(self, forest: Forest) -> Tensor:
        """Scores [S] (fp32) of the forest's sequences, in order."""
        forest = at_ends(forest, self.pad_id).to(self.device)
        return self.score(self.hidden(forest).float()).squeeze(1)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Ids], answers: Sequence[Ids], batch_tokens: int = 8192) -> Tensor:
        """Scores [S] (fp32, on the CPU) of answers to prompts, both as token ids, without dropout.

        Neighbours with the same prompt share it. `batch_tokens` bounds a forward pass.
        """
        training = self.model.training
        self.model.eval()
        try:
            scores = [self.rewards(forest).cpu() for forest in forests(prompts, answers, batch_tokens)]
        finally:
            self.model.train(training)
        return torch.cat(scores) if scores else torch.zeros(0)

    # --- the check at load compares directions of hidden states: a new head's scores may be too small to tell

    def _read(self, forest: Forest) -> Tensor:
        return _projected(self.hidden(forest.to(self.device)))

    def _read_plainly(self, rows: Tensor, first: int) -> Tensor:
        hidden = self.base.get_decoder()(input_ids=rows, use_cache=False).last_hidden_state
        return _projected(hidden[:, first - 1 : -1])


def _projected(hidden: Tensor) -> Tensor:
    """[…, 8] directions of hidden states […, H], of order one whatever their width and scale."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(hidden.shape[-1], 8, generator=generator).to(hidden.device)
    return torch.nn.functional.normalize(hidden.float(), dim=-1) @ directions


def has_head(config: PretrainedConfig) -> bool:
    """Whether a saved model is a sequence classifier."""
    return any(CLASSIFIER in name for name in config.architectures or ())


def is_reward_model(model: ModelSection) -> bool:
    """Whether a config's model, or the last adapter on it, was made to score answers."""
    name, location, starts = resolve_model(model.model_name_or_path, model.adapter_name_or_path, hub_access(model))
    if starts and not memory.is_name(starts[-1]):
        config = json.loads((Path(starts[-1]) / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        return config.get("task_type") == RewardModel.task_type
    return has_head(read_model_config(location, model, name))


def at_ends(forest: Forest, pad_id: int | None) -> Forest:
    """The forest, read once a sequence: at its last token that is not padding, as transformers does."""
    ids = forest.input_ids.tolist()
    read_at = torch.tensor([_end(forest, path, ids, pad_id) for path in forest.paths], device=forest.input_ids.device)
    owner = torch.arange(forest.num_sequences, device=read_at.device)
    return replace(forest, read_at=read_at, target=forest.input_ids[read_at], owner=owner)


def _end(forest: Forest, path: Sequence[int], ids: Sequence[int], pad_id: int | None) -> int:
    segments = [forest.segments[s] for s in reversed(path)]
    places = (place for segment in segments for place in range(segment.stop - 1, segment.start - 1, -1))
    return next((place for place in places if ids[place] != pad_id), segments[0].stop - 1)


def forests(prompts: Sequence[Ids], answers: Sequence[Ids], batch_tokens: int) -> list[Forest]:
    """Rows as forests of at most `batch_tokens` tokens, or of one row; neighbours with equal prompts share them."""
    batches: list[_Rows] = []
    for prompt, answer in zip(prompts, answers, strict=True):
        prompt, answer = np.asarray(prompt, dtype=np.int64), np.asarray(answer, dtype=np.int64)
        if not batches or batches[-1].size + len(prompt) + len(answer) > batch_tokens:
            batches.append(_Rows())
        batches[-1].add(prompt, answer)
    return [rows.forest() for rows in batches]


class _Rows:
    """A forest that grows by one answer at a time."""

    def __init__(self) -> None:
        self.size = 0
        self.parts: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.segments: list[Segment] = []
        self.paths: list[tuple[int, ...]] = []
        self.root: tuple[int, np.ndarray] | None = None  # the last prompt, and its segment

    def add(self, prompt: np.ndarray, answer: np.ndarray) -> None:
        if self.root is None or not np.array_equal(self.root[1], prompt):
            self.root = (self._segment(prompt, -1, 0) if len(prompt) else -1, prompt)
        path = [self.root[0]] if len(prompt) else []
        if len(answer):
            path.append(self._segment(answer, self.root[0], len(prompt)))
        self.paths.append(tuple(path))

    def _segment(self, ids: np.ndarray, parent: int, depth: int) -> int:
        self.segments.append(Segment(self.size, self.size + len(ids), parent))
        self.parts.append(ids)
        self.positions.append(np.arange(depth, depth + len(ids)))
        self.size += len(ids)
        return len(self.segments) - 1

    def forest(self) -> Forest:
        nothing = torch.zeros(0, dtype=torch.int64)  # what is read is for `at_ends` to say
        ids, positions = (torch.from_numpy(np.concatenate(parts)) for parts in (self.parts, self.positions))
        return Forest(
            ids, positions, tuple(self.segments), nothing, nothing, nothing, len(self.paths), tuple(self.paths)
        )


def load_reward_model(
    model: ModelSection,
    name: str,
    adapters: Sequence[str] = (),
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> RewardModel:
    """A trained reward model, frozen: `scores = load_reward_model(…)(prompt_ids, answer_ids)`.

    Args:
        model: how models are found (hub, token, cache); its own name and adapters are not read.
        name: an output directory of stage rm, or any decoder of one label that transformers can load.
        adapters: adapters on it, where `name` is a base.

    Raises:
        ModelError: it cannot be loaded, or has no trained head.
    """
    section = model.model_copy(update={"model_name_or_path": name, "adapter_name_or_path": list(adapters)})
    found = load_frozen(section, name, list(adapters), device or torch.device("cpu"), dtype, RewardModel)
    check_trained(found, name)
    if found.pad_id is None:
        found.pad_with(load_tokenizer(section).pad_token_id)
    return found


def check_trained(found: RewardModel, name: str) -> None:
    """Whether the head comes from training, its model's or an adapter's, and was not made up while loading."""
    if not has_head(found.base.config) and not isinstance(found.score, ModulesToSaveWrapper):
        kind = ", ".join(found.base.config.architectures or ["its kind is unknown"])
        raise ModelError(
            f"{name} is no reward model: {kind}", where="model_name_or_path",
            expected=f"an output of stage: rm, or a model …{CLASSIFIER} of one label",
        )  # fmt: skip
