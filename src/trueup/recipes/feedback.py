"""Single answers with a label as the loop sees them (KTO, BCO): micro-batches in, weighed losses out."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trueup.config.schema import RunConfig
from trueup.data.encoded import Answer, Encoded, EncodedDataset
from trueup.data.forest import build_forest
from trueup.errors import DataError
from trueup.models.logprobs import sum_by_sequence, token_logps
from trueup.models.policy import Policy
from trueup.recipes.batches import Batch
from trueup.recipes.coupling import RunningMean, gather_values
from trueup.recipes.entropy import EntropyGauge
from trueup.recipes.objective import add_up, merged_metrics, terms_of
from trueup.recipes.pairs import kl_to_reference, without_dropout
from trueup.recipes.references import References
from trueup.training.backend import Backend
from trueup.training.profile import phase
from trueup.types import FeedbackLogps, Metrics

log = logging.getLogger("trueup")

#: What KTO's paper finds good for (λ_D n_D) / (λ_U n_U).
RATIO = (1.0, 4 / 3)


class FeedbackLesson:
    """Losses on single answers; KTO's estimate of the KL on prompts with answers of other prompts."""

    def __init__(
        self,
        cfg: RunConfig,
        policy: Policy,
        datasets: Mapping[str, EncodedDataset],
        references: References | None,
        backend: Backend,
        dataset_lasts: int,
        entropy: EntropyGauge,
    ) -> None:
        assert references is not None
        self.policy, self.datasets, self.references, self.entropy = policy, datasets, references, entropy
        self.beta, self.cutoff = cfg.objective.pref_beta, cfg.data.cutoff_len
        self.seed = cfg.train.seed if cfg.train.data_seed is None else cfg.train.data_seed
        self.terms = terms_of(cfg)
        self.dataset_lasts = max(1, dataset_lasts)  # steps: an epoch, or one where rows are streamed
        self.needs_mismatched = any(term.objective.needs_mismatched for term in self.terms)
        self.shift = RunningMean(backend) if any(term.objective.needs_shift for term in self.terms) else None
        self.mismatched: Tensor | None = None  # [M] log-ratios over the whole step
        self._partners: dict[str, tuple[int, np.ndarray]] = {}  # split → epoch, and each row's partner in it
        self._prompts: dict[str, tuple[str, np.ndarray]] = {}  # split → its fingerprint, a number for each row's prompt

    def counts(self, batch: Batch) -> dict[str, float]:
        wanted = sum(is_wanted(example) for example in self._examples(batch))
        return {"answers": float(len(batch.indices)), "desirable": float(wanted)}

    def loss(self, batch: Batch, totals: Mapping[str, float]) -> tuple[Tensor, Metrics]:
        examples = self._examples(batch)
        with phase("data"):
            forest = build_forest(examples).to(self.policy.device)
        hidden = self.policy.hidden(forest)
        logps = token_logps(hidden, self.policy.head, forest.target)
        reference = self.references.token_logps(batch, forest).to(logps.device)
        count = len(examples)

        def sums(values: Tensor) -> Tensor:
            return sum_by_sequence(values, forest.owner, count)

        wanted = torch.tensor([is_wanted(example) for example in examples], device=logps.device)
        given = FeedbackLogps(sums(logps), sums(torch.ones_like(logps)), wanted, sums(reference))
        results = [term.objective.function(given, **self._arguments(term, given)) for term in self.terms]
        metrics = merged_metrics(self.terms, results, float(count))
        metrics |= kl_to_reference(logps.detach(), reference, count, wanted[forest.owner], wanted.sum().float())
        metrics |= self.entropy.read(self.policy, hidden)
        return add_up(self.terms, results, totals), metrics

    def _arguments(self, term, given: FeedbackLogps) -> dict[str, Any]:
        arguments: dict[str, Any] = dict(term.parameters)
        if term.objective.needs_mismatched:
            arguments["mismatched"] = self.mismatched
        if term.objective.needs_shift:
            assert self.shift is not None
            if torch.is_grad_enabled():  # an evaluation moves nothing
                self.shift.see(self.beta * (given.answer - given.reference))
            arguments["shift"] = self.shift.mean
        return arguments

    @torch.no_grad()
    def look_ahead(self, batches: Sequence[Batch], backend: Backend, steps_done: int | None) -> None:
        """KTO's mismatched pairs of the whole step: prompt → answer of another row, other ones in every epoch."""
        if self.shift is not None:  # before an evaluation too: a checkpoint folds, and may come before or after it
            self.shift.fold()
        if self.needs_mismatched:
            epoch = 0 if steps_done is None else steps_done // self.dataset_lasts
            with without_dropout(self.policy):
                ratios = [{"ratio": self._log_ratios(batch, epoch)} for batch in batches]
            values, _ = gather_values(ratios, backend)
            self.mismatched = values.get("ratio", torch.zeros(0)).to(self.policy.device)

    def _log_ratios(self, batch: Batch, epoch: int) -> Tensor:
        dataset = self.datasets[batch.split]
        if len(dataset) < 2:
            return torch.zeros(0)
        others = self._partners_of(batch.split, epoch)
        forest = build_forest([crossed(dataset[i], dataset[int(others[i])], self.cutoff) for i in batch.indices])
        forest = forest.to(self.policy.device)
        gap = self.policy.token_logps(forest) - self.references.live_token_logps(forest)
        return sum_by_sequence(gap, forest.owner, len(batch.indices))

    def _partners_of(self, split: str, epoch: int) -> np.ndarray:
        """Drawn once an epoch, from the seed and the epoch alone: a run that is resumed draws the same."""
        dataset = self.datasets[split]
        if self._prompts.get(split, ("",))[0] != dataset.fingerprint:
            self._prompts[split] = dataset.fingerprint, numbered_prompts(dataset)
        if self._partners.get(split, (-1,))[0] != epoch:
            self._partners[split] = epoch, partners(self._prompts[split][1], self.seed, epoch)
        return self._partners[split][1]

    def _examples(self, batch: Batch) -> list[Encoded]:
        dataset = self.datasets[batch.split]
        return [dataset[i] for i in batch.indices]

    def state_dict(self) -> dict[str, Any]:
        return {} if self.shift is None else {"shift": self.shift.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.shift is not None:
            self.shift.load(state["shift"])


def is_wanted(example: Encoded) -> bool:
    """The label of an encoded row of feedback."""
    return bool(example.scores[0])


def numbered_prompts(dataset: EncodedDataset) -> np.ndarray:
    """A number for each row, the same for equal prompts."""
    numbers: dict[bytes, int] = {}
    return np.array([numbers.setdefault(example.prompt.tobytes(), len(numbers)) for example in dataset])


def partners(prompts: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """For each of ≥ 2 rows one with another prompt, drawn anew in every epoch.

    Rows of one prompt stand together in a random order, and each takes the row as far behind it as the largest such
    group is long: that is in another group, and every row is taken once. Where one prompt has more than half of the
    rows, some rows are taken more often; where all are equal, any other row has to do.
    """
    rng = np.random.default_rng([seed, epoch, 1])
    order = rng.permutation(len(prompts))
    _, first, group, sizes = np.unique(prompts[order], return_index=True, return_inverse=True, return_counts=True)
    order = order[np.argsort(first[group], kind="stable")]
    other = np.empty(len(prompts), dtype=np.int64)
    other[order] = np.roll(order, 1 if len(sizes) == 1 else sizes.max())
    if len(sizes) > 1:
        for row in np.flatnonzero(prompts[other] == prompts):
            other[row] = rng.choice(np.flatnonzero(prompts != prompts[row]))
    return other


def crossed(own: Encoded, other: Encoded, cutoff: int) -> Encoded:
    """The prompt of one row with the answer of another, cut to fit."""
    (answer,) = other.answers
    room = cutoff - len(own.prompt)
    return Encoded(own.row, own.prompt, (Answer(answer.ids[:room], answer.mask[:room]),))


def tell_balance(cfg: RunConfig, dataset: EncodedDataset) -> None:
    """Say so when wanted and unwanted answers are out of the balance that KTO's paper recommends.

    Raises:
        DataError: all answers have the same label (D14); of a stream, whose beginning tells little, it is only said.
    """
    wanted = sum(map(is_wanted, dataset))
    unwanted = len(dataset) - wanted
    if not wanted or not unwanted:
        label, other = ("unwanted", "wanted") if unwanted else ("wanted", "unwanted")
        what = f"all {len(dataset):,} rows are {label} answers: nothing shows the difference that is to be learnt"
        if not cfg.data.streaming:
            raise DataError(
                what, where="dataset", fix=f"add rows of {other} answers, or learn wanted ones by stage: sft"
            )
        log.warning("%s, as far as has been read", what)
        return
    up, down = cfg.objective.kto_chosen_weight, cfg.objective.kto_rejected_weight
    ratio = up * wanted / (down * unwanted)
    if not RATIO[0] - 0.01 <= ratio <= RATIO[1] + 0.01:
        low, high = (bound * down * unwanted / wanted for bound in RATIO)
        log.warning(
            "%s wanted and %s unwanted answers weigh %.2f to 1; recommended is 1 to 1.33: kto_chosen_weight between "
            "%.2f and %.2f, or kto_rejected_weight between %.2f and %.2f",
            f"{wanted:,}", f"{unwanted:,}", ratio, low, high,
            up * wanted / unwanted / RATIO[1], up * wanted / unwanted / RATIO[0],
        )  # fmt: skip
