"""A fixed dataset under one objective, as the loop runs it (`trueup.training.step.Program`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from trueup.config.methods import stage_kind
from trueup.config.schema import RunConfig
from trueup.data.encode import EncodedDataset, Prepared
from trueup.data.forest import BatchPlan
from trueup.models.load import Loaded
from trueup.models.plain import tidy_generation
from trueup.models.policy import Policy
from trueup.models.reward import RewardModel
from trueup.recipes.batches import Batch, cut_indices, eval_batches
from trueup.recipes.coupling import RunningMean
from trueup.recipes.entropy import EntropyGauge
from trueup.recipes.feed import make_feed
from trueup.recipes.feedback import FeedbackLesson
from trueup.recipes.pairs import PairLesson
from trueup.recipes.predict import Predictor
from trueup.recipes.references import References
from trueup.recipes.reward import RewardLesson
from trueup.recipes.text import TextLesson
from trueup.training.backend import Backend
from trueup.types import Metrics


class Lesson(Protocol):
    """What one kind of example teaches: how its micro-batches become losses."""

    def counts(self, batch: Batch) -> dict[str, float]:
        """Denominators this micro-batch adds."""
        ...

    def loss(self, batch: Batch, totals: Mapping[str, float]) -> tuple[Tensor, Metrics]: ...

    def look_ahead(self, batches: Sequence[Batch], backend: Backend, steps_done: int | None) -> None:
        """What its examples must know of each other (`training.step.LooksAhead`)."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def lesson_of(
    cfg: RunConfig,
    policy: Policy,
    datasets: Mapping[str, EncodedDataset],
    references: References | None,
    backend: Backend,
    dataset_lasts: int,
    entropy: EntropyGauge,
) -> Lesson:
    """The lesson of the kind of example a stage trains on."""
    if isinstance(policy, RewardModel):
        return RewardLesson(cfg, policy, datasets)
    match stage_kind(cfg):
        case "pair":
            return PairLesson(cfg, policy, datasets, references, backend, entropy)
        case "feedback":
            return FeedbackLesson(cfg, policy, datasets, references, backend, dataset_lasts, entropy)
        case _:
            return TextLesson(cfg, policy, datasets, entropy)


class OfflineProgram:
    """What the loop runs (`training.step.Program`): batches of a fixed dataset under one objective."""

    def __init__(
        self,
        cfg: RunConfig,
        loaded: Loaded,
        tokenizer: PreTrainedTokenizerBase,
        prepared: Prepared,
        plan: BatchPlan,
        references: References | None,
        backend: Backend,
        predictor: Predictor | None = None,
    ) -> None:
        self.policy = loaded.policy
        self.predictor = predictor  # of evaluations that compare generated answers too
        self.adapters = loaded.adapters
        self.tokenizer = tokenizer
        if prepared.template.name != "empty":
            # Whoever loads the result renders what was trained, and stops where an answer was taught to end.
            prepared.template.attach(tokenizer)
            if loaded.policy.base.can_generate():
                tidy_generation(loaded.policy.base, prepared.template.stop_ids)
        self.feed = make_feed(cfg, prepared, plan, loaded.policy.shared, backend)
        self.datasets: dict[str, EncodedDataset] = {"train": self.feed.dataset, **prepared.eval}
        self.entropy = EntropyGauge(cfg.train, self.feed.steps_per_epoch)
        lasts = self.feed.dataset_lasts
        self.lesson = lesson_of(cfg, loaded.policy, self.datasets, references, backend, lasts, self.entropy)
        self.rank, self.world_size = backend.rank, backend.world_size
        self.trainable: dict[str, nn.Parameter] = loaded.policy.trainable()
        self.masters = self.adapters.masters if self.adapters is not None else {}
        self.head_elements = loaded.policy.head_elements
        self.examples_per_step = plan.rows_per_step
        self.steps_per_epoch = self.feed.steps_per_epoch
        self.eval_sets = {
            name: [Batch(name, group) for group in eval_batches(cfg, dataset)[self.rank :: self.world_size]]
            for name, dataset in prepared.eval.items()
        }

    def train(self, mode: bool = True) -> None:
        self.policy.model.train(mode)

    def micro_batches(self, epoch: int, step: int) -> list[Batch]:
        return [Batch("train", group) for group in self.feed.micro_batches(epoch, step)]

    def cut(self, batch: Batch, pieces: int) -> list[Batch]:
        return [Batch(batch.split, part) for part in cut_indices(batch.indices, pieces)]

    def forget_step(self) -> None:
        if isinstance(shift := getattr(self.lesson, "shift", None), RunningMean):
            shift.forget()

    def counts(self, batch: Batch) -> dict[str, float]:
        return self.lesson.counts(batch)

    def size(self, batch: Batch) -> int:
        return int(self.datasets[batch.split].lengths[batch.indices].sum())

    def describe(self, batch: Batch) -> list[str]:
        rows = self.datasets[batch.split].rows
        return [rows[i] for i in batch.indices]

    def look_ahead(self, batches: Sequence[Batch], backend: Backend, steps_done: int | None) -> None:
        self.entropy.begin(steps_done)
        self.lesson.look_ahead(batches, backend, steps_done)

    def loss(self, batch: Batch, totals: Mapping[str, float]) -> tuple[Tensor, Metrics]:
        """This batch's share of the step's loss, and its metrics."""
        loss, metrics = self.lesson.loss(batch, totals)
        if self.predictor is not None and batch.split != "train":
            metrics = {**metrics, **self.predictor.metrics(batch)}
        return loss, metrics

    def save_model(self, directory: Path, masters: Mapping[str, Tensor]) -> None:
        """Files that transformers and peft load: adapter or full weights, and the tokenizer."""
        if self.adapters is not None:
            self.adapters.save(directory, masters)
        else:
            # The module's parameters are the masters in compute dtype, and save_pretrained knows which are tied.
            self.policy.base.save_pretrained(directory, max_shard_size="5GB")
        self.tokenizer.save_pretrained(directory)

    def state_dict(self) -> dict[str, Any]:
        return {**self.lesson.state_dict(), **self.feed.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.feed.load_state_dict(state)
        self.lesson.load_state_dict({key: value for key, value in state.items() if key != "stream"})
