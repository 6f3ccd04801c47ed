"""Preference pairs as the loop sees them: micro-batches in, weighed losses out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trueup.config.schema import RunConfig
from trueup.data.encoded import Encoded, EncodedDataset
from trueup.data.forest import build_forest, num_predictions
from trueup.models.distributions import log_collisions, projection, vocabulary_kl
from trueup.models.logprobs import sum_by_sequence, token_logps
from trueup.models.policy import Policy
from trueup.objectives import OBJECTIVES, pairwise
from trueup.recipes.batches import Batch
from trueup.recipes.coupling import RunningMean, gather_values
from trueup.recipes.entropy import EntropyGauge
from trueup.recipes.objective import add_up, merged_metrics, terms_of
from trueup.recipes.references import References
from trueup.training.backend import Backend
from trueup.training.profile import phase
from trueup.types import Forest, Loss, Metrics, PairLogps, StepValues, TokenLogps


class PairLesson:
    """Losses on pairs; with `knowledge_weight`, rows of one answer beside them, learnt by their likelihood."""

    def __init__(
        self,
        cfg: RunConfig,
        policy: Policy,
        datasets: Mapping[str, EncodedDataset],
        references: References | None,
        backend: Backend,
        entropy: EntropyGauge,
    ) -> None:
        self.policy, self.datasets, self.references, self.entropy = policy, datasets, references, entropy
        self.objective = cfg.objective
        self.terms = terms_of(cfg)
        self.surveyed = [term for term in self.terms if term.objective.survey]
        self.needs_kl = any(term.objective.needs_divergence for term in self.terms)
        self._followed: int | None = None  # step before which the reference last moved
        self.shift = RunningMean(backend) if any(term.objective.needs_shift for term in self.terms) else None
        self.step: dict[tuple[str, bytes], dict[str, StepValues]] = {}

    def counts(self, batch: Batch) -> dict[str, float]:
        pairs, others = self._sorted(batch)
        counts = {"pairs": float(len(pairs))}
        if self.objective.knowledge_weight:
            counts["predictions"] = float(sum(map(num_predictions, self._examples(batch, others))))
        return counts

    def loss(self, batch: Batch, totals: Mapping[str, float]) -> tuple[Tensor, Metrics]:
        pairs, others = self._sorted(batch)
        examples = self._examples(batch, pairs)
        with phase("data"):
            forest = build_forest([*examples, *self._examples(batch, others)]).to(self.policy.device)
        hidden = self.policy.hidden(forest)
        logps = token_logps(hidden, self.policy.head, forest.target)
        of_pairs = sum(map(num_predictions, examples))
        total, metrics = logps.new_zeros(()), {}
        if pairs.size:
            results, metrics = self._pair_losses(Batch(batch.split, pairs), forest, logps, hidden, of_pairs)
            total = total + add_up(self.terms, results, totals)
        if others.size:
            knowledge, told = self._knowledge(forest, logps[of_pairs:])
            total = total + self.objective.knowledge_weight * knowledge / totals["predictions"]
            metrics |= told
        return total, {**metrics, **self.entropy.read(self.policy, hidden)}

    def _pair_losses(
        self, batch: Batch, forest: Forest, logps: Tensor, hidden: Tensor, count: int
    ) -> tuple[list[Loss], Metrics]:
        """Losses of the batch's pairs, which are the forest's first `count` predictions."""
        num_pairs = len(batch.indices)
        owner, logps, metrics = forest.owner[:count], logps[:count], {}
        reference, kl = self._reference(batch, forest, hidden, count)
        if reference is not None:
            metrics |= kl_to_reference(logps.detach(), reference, 2 * num_pairs, owner % 2 == 0, float(num_pairs))
        plain = pair_logps(owner, logps, reference, 2 * num_pairs)
        pairs = self._reweighed(plain, owner, logps, reference)
        if kl is not None:
            sums = sum_by_sequence(kl, owner, 2 * num_pairs)
            pairs = replace(pairs, kl_chosen=sums[0::2], kl_rejected=sums[1::2])
        if self.objective.use_weighting:
            weight = self._weights(hidden[:count], owner, logps, plain)
            pairs = replace(pairs, weight=weight)
            metrics["weights"] = (weight.sum(), float(num_pairs))
        coupled = self.step.get(_key(batch), {})
        results = []
        for term in self.terms:
            given: dict[str, Any] = dict(term.parameters)
            if term.name in coupled:
                given["step"] = coupled[term.name]
            if term.objective.needs_shift:
                given["shift"] = self._shift_and_see(pairs)
            results.append(term.objective.function(plain if term.is_anchor else pairs, **given))
        return results, {**merged_metrics(self.terms, results, float(num_pairs)), **metrics}

    def _reference(
        self, batch: Batch, forest: Forest, hidden: Tensor | None, count: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """The reference's log-probabilities [count] and, where `hidden` is given and a loss needs it, its divergence
        [count].
        """
        if self.references is None:
            return None, None
        if not self.needs_kl or hidden is None:
            whole = len(forest.owner) == count
            own = forest if whole else build_forest(self._examples(batch, batch.indices))
            return self.references.token_logps(batch, own).to(self.policy.device), None
        live = self.references.live
        assert live is not None
        with phase("reference"), live.running():
            other = live.policy.hidden(forest)[:count]
            logps = token_logps(other, live.policy.head, forest.target[:count])
        return logps, vocabulary_kl(other, live.project, hidden[:count], projection(self.policy.head))

    def _reweighed(self, plain: PairLogps, owner: Tensor, logps: Tensor, reference: Tensor | None) -> PairLogps:
        """LD-DPO's sums, or the plain ones."""
        if self.objective.ld_alpha is None:
            return plain
        lengths = torch.stack([plain.chosen_len, plain.rejected_len], 1).flatten().long()
        weights = pairwise.length_weights(owner, lengths, self.objective.ld_alpha)
        if reference is not None and self.objective.ld_reference:
            reference = weights * reference
        weighed = pair_logps(owner, weights * logps, reference, len(lengths))
        return replace(weighed, chosen_len=plain.chosen_len, rejected_len=plain.rejected_len)

    def _weights(self, hidden: Tensor, owner: Tensor, logps: Tensor, plain: PairLogps) -> Tensor:
        """WPO: Π over both answers of exp mean_t[log π(y_t) − log Σ_v π(v)²] (arXiv 2406.11827, eq. 2), no gradient."""
        aligned = logps.detach() - log_collisions(hidden, projection(self.policy.head))
        sums = sum_by_sequence(aligned, owner, 2 * len(plain.chosen))
        return torch.exp(sums[0::2] / plain.chosen_len + sums[1::2] / plain.rejected_len)

    def _shift_and_see(self, pairs: PairLogps) -> float:
        assert self.shift is not None
        if torch.is_grad_enabled():  # an evaluation moves nothing
            rewards = pairwise.implicit_rewards(pairs, self.objective.pref_beta)
            self.shift.see(torch.cat(rewards))
        return self.shift.mean

    def _knowledge(self, forest: Forest, logps: Tensor) -> tuple[Tensor, Metrics]:
        result = OBJECTIVES["sft"].function(TokenLogps(logps, forest.owner[-len(logps) :], forest.num_sequences))
        return result.sum, {"knowledge_loss": (result.sum.detach(), float(len(logps)))}

    # --- before a step ---------------------------------------------------------------------------

    def look_ahead(self, batches: Sequence[Batch], backend: Backend, steps_done: int | None) -> None:
        self.step = {}
        if self.shift is not None:  # before an evaluation too: a checkpoint folds, and may come before or after it
            self.shift.fold()
        due = self.objective.sync_ref_model and steps_done and steps_done % self.objective.ref_model_sync_steps == 0
        if due and steps_done != self._followed:  # a step may be begun twice (`training.shortage`)
            assert self.references is not None
            self._followed = steps_done
            self.references.follow(self.objective.ref_model_mixup_alpha)
        if self.surveyed and sum(backend.gather(len(batches))) > 1:
            self._survey(batches, backend)

    @torch.no_grad()
    def _survey(self, batches: Sequence[Batch], backend: Backend) -> None:
        """One more pass over the step, without gradient. A step of one micro-batch needs none."""
        own = [Batch(batch.split, self._sorted(batch)[0]) for batch in batches]
        with without_dropout(self.policy):
            found = [self._values(batch) for batch in own]
        for term in self.surveyed:
            values, places = gather_values([values[term.name] for values in found], backend)
            on_device = {name: value.to(self.policy.device) for name, value in values.items()}
            for batch, at in zip(own, places, strict=True):
                step = StepValues(on_device, at.to(self.policy.device))
                self.step.setdefault(_key(batch), {})[term.name] = step

    def _values(self, batch: Batch) -> dict[str, dict[str, Tensor]]:
        surveys = {term.name: term.objective.survey for term in self.surveyed}
        if not batch.indices.size:
            nothing = PairLogps(*(torch.zeros(0) for _ in range(6)))
            return {name: survey(nothing) for name, survey in surveys.items() if survey}
        forest = build_forest(self._examples(batch, batch.indices)).to(self.policy.device)
        logps = self.policy.token_logps(forest)
        reference, _ = self._reference(batch, forest, None, len(logps))
        plain = pair_logps(forest.owner, logps, reference, forest.num_sequences)
        pairs = self._reweighed(plain, forest.owner, logps, reference)
        return {name: survey(pairs) for name, survey in surveys.items() if survey}

    # --- examples --------------------------------------------------------------------------------

    def _sorted(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the batch's pairs, and of its rows of one answer."""
        if not self.objective.knowledge_weight:
            return batch.indices, batch.indices[:0]
        is_pair = self.datasets[batch.split].answer_lengths[batch.indices, 1] > 0
        return batch.indices[is_pair], batch.indices[~is_pair]

    def _examples(self, batch: Batch, indices: np.ndarray) -> list[Encoded]:
        dataset = self.datasets[batch.split]
        return [dataset[i] for i in indices]

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {} if self.shift is None else {"shift": self.shift.state()}
        if self.objective.sync_ref_model and self.references is not None:
            state |= self.references.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        state = dict(state)
        if self.shift is not None:
            self.shift.load(state.pop("shift"))
        if self.objective.sync_ref_model and self.references is not None:
            self.references.load_state_dict(state)


@contextmanager
def without_dropout(policy: Policy) -> Iterator[None]:
    """For passes that look at a step as a whole: a mask drawn there is not the one that the loss will draw."""
    training = policy.model.training
    policy.model.eval()
    try:
        yield
    finally:
        policy.model.train(training)


def _key(batch: Batch) -> tuple[str, bytes]:
    return batch.split, batch.indices.tobytes()


def pair_logps(owner: Tensor, logps: Tensor, reference: Tensor | None, num_sequences: int) -> PairLogps:
    """Per-token values of a batch of pairs → sums per side; sequences alternate chosen, rejected."""

    def sides(values: Tensor) -> tuple[Tensor, Tensor]:
        sums = sum_by_sequence(values, owner, num_sequences)
        return sums[0::2], sums[1::2]

    lengths = sides(torch.ones_like(logps))
    if reference is None:
        return PairLogps(*sides(logps), *lengths)
    return PairLogps(*sides(logps), *lengths, *sides(reference))


def kl_to_reference(
    logps: Tensor, reference: Tensor, num_sequences: int, of_chosen: Tensor, num_chosen: float | Tensor
) -> Metrics:
    """Σ_t (e^d − 1 − d), d = log π_ref − log π, per answer and per chosen answer: estimates on the data, not negative.

    The k3 estimator (Schulman 2020) evaluated on the data's tokens [N] instead of the policy's own samples; `of_chosen`
    [N] tells those of chosen answers. What a preference pushes away costs e^d: the whole grows without bound in runs
    that go well, the chosen answers' part does not.
    """
    d = reference - logps
    cost = torch.expm1(d) - d
    chosen = torch.where(of_chosen, cost, 0.0).sum()
    return {"kl": (cost.sum(), float(num_sequences)), "kl/chosen": (chosen, num_chosen)}
