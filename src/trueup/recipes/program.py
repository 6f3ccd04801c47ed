"""A fixed dataset under one objective, as the loop runs it (`trueup.training.step.Program`)."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from trueup.config.schema import RunConfig
from trueup.data.encode import EncodedDataset, Prepared
from trueup.data.encoded import Encoded
from trueup.data.forest import BatchPlan, build_forest, num_predictions
from trueup.models.load import Loaded
from trueup.models.logprobs import sum_by_sequence
from trueup.objectives import OBJECTIVES, Objective, pairwise
from trueup.recipes.batches import Batch, eval_batches
from trueup.recipes.references import References
from trueup.training.backend import Backend
from trueup.types import Forest, Loss, Metrics, PairLogps, TokenLogps


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
    ) -> None:
        self.policy = loaded.policy
        self.adapters = loaded.adapters
        self.tokenizer = tokenizer
        if prepared.template.name != "empty":
            # Whoever loads the result renders what was trained, and stops where an answer was taught to end.
            prepared.template.attach(tokenizer)
            tidy_generation(loaded.policy.base, prepared.template.stop_ids)
        self.datasets: dict[str, EncodedDataset] = {"train": prepared.train, **prepared.eval}
        self.plan = plan
        self.objective = objective_of(cfg)
        self.parameters = objective_parameters(cfg, self.objective)
        self.sft_weight = cfg.objective.pref_ftx
        self.references = references
        self.rank, self.world_size = backend.rank, backend.world_size
        self.trainable: dict[str, nn.Parameter] = loaded.policy.trainable()
        self.examples_per_step = plan.rows_per_step
        self.steps_per_epoch = plan.steps_per_epoch
        self.eval_sets = {
            name: [Batch(name, group) for group in eval_batches(cfg, dataset)[self.rank :: self.world_size]]
            for name, dataset in prepared.eval.items()
        }
        self._steps = functools.lru_cache(maxsize=2)(plan.steps)

    def train(self, mode: bool = True) -> None:
        self.policy.model.train(mode)

    def micro_batches(self, epoch: int, step: int) -> list[Batch]:
        units = self._steps(epoch)[step]
        return [Batch("train", group) for group in self.plan.micro_batches(units, self.rank, self.world_size)]

    def counts(self, batch: Batch) -> dict[str, float]:
        if self.objective.denominator == "pairs":
            return {"pairs": float(len(batch.indices))}
        return {"predictions": float(sum(num_predictions(example) for example in self._examples(batch)))}

    def size(self, batch: Batch) -> int:
        return int(self.datasets[batch.split].lengths[batch.indices].sum())

    def describe(self, batch: Batch) -> list[str]:
        return [example.row for example in self._examples(batch)]

    def _examples(self, batch: Batch) -> list[Encoded]:
        dataset = self.datasets[batch.split]
        return [dataset[i] for i in batch.indices]

    def loss(self, batch: Batch, totals: Mapping[str, float]) -> tuple[Tensor, Metrics]:
        """This batch's share of the step's loss, and its metrics."""
        forest = build_forest(self._examples(batch)).to(self.policy.device)
        logps = self.policy.token_logps(forest)
        if self.objective.takes is TokenLogps:
            result = self.objective.function(TokenLogps(logps, forest.owner, forest.num_sequences), **self.parameters)
        else:
            result = self._pair_loss(batch, forest, logps)
        return result.sum / totals[self.objective.denominator], result.metrics

    def _pair_loss(self, batch: Batch, forest: Forest, logps: Tensor) -> Loss:
        reference, metrics = None, {}
        if self.references is not None:
            reference = self.references.token_logps(batch, forest).to(logps.device)
            metrics["kl"] = kl_to_reference(logps.detach(), reference, forest.num_sequences)
        pairs = pair_logps(forest, logps, reference)
        result = self.objective.function(pairs, **self.parameters)
        if not self.sft_weight:
            return Loss(result.sum, {**result.metrics, **metrics})
        nll = pairwise.chosen_nll(pairs)
        metrics["sft_loss"] = (nll.detach(), float(len(batch.indices)))
        return Loss(result.sum + self.sft_weight * nll, {**result.metrics, **metrics})

    def save_model(self, directory: Path, masters: Mapping[str, Tensor]) -> None:
        """Files that transformers and peft load: adapter or full weights, and the tokenizer."""
        if self.adapters is not None:
            self.adapters.save(directory, masters)
        else:
            # The module's parameters are the masters in compute dtype, and save_pretrained knows which are tied.
            self.policy.base.save_pretrained(directory, max_shard_size="5GB")
        self.tokenizer.save_pretrained(directory)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert not state


def tidy_generation(base: PreTrainedModel, stop_ids: Sequence[int]) -> None:
    """Generation settings that stop where answers end, and that transformers will agree to save."""
    settings = base.generation_config or GenerationConfig()
    settings.eos_token_id = list(stop_ids)
    try:
        settings.validate(strict=True)
    except ValueError:  # some published models set a temperature beside do_sample: false, and saving would refuse it
        settings.do_sample = True
    base.generation_config = settings


def pair_logps(forest: Forest, logps: Tensor, reference: Tensor | None) -> PairLogps:
    """Per-token values of a batch of pairs → sums per side; sequences alternate chosen, rejected."""

    def sides(values: Tensor) -> tuple[Tensor, Tensor]:
        sums = sum_by_sequence(values, forest.owner, forest.num_sequences)
        return sums[0::2], sums[1::2]

    lengths = sides(torch.ones_like(logps))
    if reference is None:
        return PairLogps(*sides(logps), *lengths)
    return PairLogps(*sides(logps), *lengths, *sides(reference))


def kl_to_reference(logps: Tensor, reference: Tensor, num_sequences: int) -> tuple[Tensor, float]:
    """(sum, count) of Σ_t (e^d − 1 − d), d = log π_ref − log π, per answer: an estimate on the data, never negative.

    The k3 estimator (Schulman 2020) evaluated on the data's tokens instead of the policy's own samples.
    """
    d = reference - logps
    return (torch.expm1(d) - d).sum(), float(num_sequences)


def objective_of(cfg: RunConfig) -> Objective:
    """The registered objective that a stage and `pref_loss` name."""
    stage = cfg.objective.stage
    return OBJECTIVES["sft" if stage in ("pt", "sft") else cfg.objective.pref_loss]


def objective_parameters(cfg: RunConfig, objective: Objective) -> dict[str, Any]:
    """Keyword arguments of the objective's function, from the keys it declares."""
    return {name: getattr(cfg.objective, key) for name, key in objective.parameters.items()}
