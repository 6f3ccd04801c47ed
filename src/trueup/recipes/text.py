"""Text and chats as the loop sees them: micro-batches in, likelihoods out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from trueup.config.schema import RunConfig
from trueup.data.encoded import EncodedDataset
from trueup.data.forest import build_forest, num_predictions
from trueup.models.distributions import projection, top_entropy
from trueup.models.logprobs import graded_logps, token_logps
from trueup.models.policy import Policy
from trueup.recipes.batches import Batch
from trueup.recipes.entropy import EntropyGauge
from trueup.recipes.objective import terms_of
from trueup.training.backend import Backend
from trueup.training.profile import phase
from trueup.types import Metrics, TokenLogps


class TextLesson:
    """A loss on the trained tokens, averaged over the whole step: their likelihood, or that weighed."""

    def __init__(
        self, cfg: RunConfig, policy: Policy, datasets: Mapping[str, EncodedDataset], entropy: EntropyGauge
    ) -> None:
        self.policy, self.datasets, self.entropy = policy, datasets, entropy
        (self.term,) = terms_of(cfg)
        self.grades = cfg.train.compute_accuracy

    def counts(self, batch: Batch) -> dict[str, float]:
        dataset = self.datasets[batch.split]
        return {"predictions": float(sum(num_predictions(dataset[i]) for i in batch.indices))}

    def loss(self, batch: Batch, totals: Mapping[str, float]) -> tuple[Tensor, Metrics]:
        dataset = self.datasets[batch.split]
        with phase("data"):
            forest = build_forest([dataset[i] for i in batch.indices]).to(self.policy.device)
        hidden = self.policy.hidden(forest)
        logps, graded = self._logps(hidden, forest.target, batch.split)
        unsure = self._unsure(hidden) if self.term.objective.needs_entropy else None
        seen = TokenLogps(logps, forest.owner, forest.num_sequences, unsure)
        result = self.term.objective.function(seen, **self.term.parameters)
        return result.sum / totals["predictions"], {
            **result.metrics, **graded, **self.entropy.read(self.policy, hidden)
        }  # fmt: skip

    def _logps(self, hidden: Tensor, target: Tensor, split: str) -> tuple[Tensor, Metrics]:
        """Log-probabilities [N]; in evaluations, if asked for, with the share that the model would have written."""
        if not self.grades or split == "train":
            return token_logps(hidden, self.policy.head, target), {}
        logps, right = graded_logps(hidden, self.policy.head, target)
        return logps, {"accuracy": (right.sum(), float(len(right)))}

    def _unsure(self, hidden: Tensor) -> Tensor:
        return top_entropy(hidden.detach(), projection(self.policy.head))

    def look_ahead(self, batches: Sequence[Batch], backend: Backend, steps_done: int | None) -> None:
        """Nothing: no example depends on another."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert not state
