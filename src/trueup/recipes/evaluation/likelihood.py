"""What a model makes of given answers, one figure an answer: log-probabilities, entropy, distance to a reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trueup.config.schema import RunConfig
from trueup.data.encoded import EncodedDataset
from trueup.data.forest import build_forest
from trueup.models.distributions import projection, vocabulary_kl
from trueup.models.logprobs import sum_by_sequence, token_entropy, token_logps
from trueup.models.policy import Policy
from trueup.models.reference import LiveReference
from trueup.models.reward import RewardModel
from trueup.objectives.pairwise import implicit_rewards
from trueup.recipes.objective import Term, add_up, terms_of
from trueup.types import PairLogps


@dataclass(frozen=True)
class Readings:
    """Sums over the trained tokens of S answers, in the order of the data; None where it was not asked for.

    Attributes:
        logps, reference: [S] log-probabilities under the model and its reference.
        tokens: [S] how many tokens were summed.
        entropy: [S] of the model's next-token distributions.
        kl: [S] KL(π ‖ π_ref) of the next-token distributions at these tokens, over the whole vocabulary.
    """

    logps: np.ndarray
    tokens: np.ndarray
    reference: np.ndarray | None = None
    entropy: np.ndarray | None = None
    kl: np.ndarray | None = None


@torch.no_grad()
def read_answers(
    policy: Policy,
    dataset: EncodedDataset,
    rows: int,
    live: LiveReference | None = None,
    divergence: bool = False,
    tell: Callable[[int], None] = lambda done: None,
) -> Readings:
    """Read every answer of a set, `rows` examples at a time, as an evaluation in training batches them.

    Args:
        live: the reference, if there is one; it may be the same model with its adapters off.
        divergence: entropy and, with a reference, KL as well: two or three more products of the head.
    """
    parts: list[dict[str, Tensor]] = []
    policy.model.eval()
    for start in range(0, len(dataset), rows):
        examples = [dataset[i] for i in range(start, min(start + rows, len(dataset)))]
        forest = build_forest(examples).to(policy.device)
        hidden = policy.hidden(forest)
        found = {"logps": token_logps(hidden, policy.head, forest.target)}
        found["tokens"] = torch.ones_like(found["logps"])
        if divergence:
            found["entropy"] = token_entropy(hidden, policy.head)
        if live is not None and live.policy is policy and live.switch is nullcontext:  # the model is its own reference
            found["reference"] = found["logps"]
            if divergence:
                found["kl"] = torch.zeros_like(found["logps"])
        elif live is not None:
            with live.running():
                other = live.policy.hidden(forest)
                found["reference"] = token_logps(other, live.policy.head, forest.target)
            if divergence and _vocabulary(live.policy) == _vocabulary(policy):
                found["kl"] = vocabulary_kl(hidden, projection(policy.head), other, live.project)
        parts.append({
            name: sum_by_sequence(values, forest.owner, forest.num_sequences).cpu() for name, values in found.items()
        })  # fmt: skip
        tell(min(start + rows, len(dataset)))
    names = parts[0] if parts else ("logps", "tokens")
    return Readings(**{name: torch.cat([part[name] for part in parts]).double().numpy() for name in names})


def _vocabulary(policy: Policy) -> int:
    return policy.base.get_input_embeddings().weight.shape[0]


@dataclass(frozen=True)
class Preferences:
    """What a model prefers, pair by pair, [B] each. `longer`: tokens by which the chosen answer is longer."""

    chosen: np.ndarray
    rejected: np.ndarray
    longer: np.ndarray
    loss: np.ndarray | None

    @property
    def margins(self) -> np.ndarray:
        return self.chosen - self.rejected

    @property
    def hits(self) -> np.ndarray:
        """1 where the chosen answer has the higher reward, ½ where they tie."""
        return wins(self.margins)


def wins(margins: np.ndarray) -> np.ndarray:
    """[n] margins → 1, ½ for a tie, 0."""
    return (margins > 0) + 0.5 * (margins == 0)


def preferences(cfg: RunConfig, found: Readings) -> Preferences:
    """The rewards by which a config's objective compares two answers, and its loss, from readings of pairs.

    The loss is None where it is no sum over pairs by themselves (AOT, BCO's shift, TDPO, WPO, LD-DPO); rewards are then
    β(log π − log π_ref).
    """
    terms = terms_of(cfg)
    pairs = _pair_logps(found)
    apart = cfg.objective.ld_alpha is None and not cfg.objective.use_weighting and all(map(_stands_alone, terms))
    longer = (pairs.chosen_len - pairs.rejected_len).numpy()
    if not apart:
        chosen, rejected = implicit_rewards(pairs, cfg.objective.pref_beta)
        return Preferences(chosen.numpy(), rejected.numpy(), longer, None)
    rows = [_one_pair(terms, pairs, i) for i in range(len(pairs.chosen))]
    columns = np.array(rows, dtype=np.float64).reshape(-1, 3).T
    return Preferences(columns[0], columns[1], longer, columns[2])


def _stands_alone(term: Term) -> bool:
    o = term.objective
    return o.takes is PairLogps and not (o.survey or o.needs_shift or o.needs_divergence or o.needs_mismatched)


def _pair_logps(found: Readings) -> PairLogps:
    def sides(values: np.ndarray) -> tuple[Tensor, Tensor]:
        both = torch.from_numpy(values)
        return both[0::2], both[1::2]

    reference = () if found.reference is None else sides(found.reference)
    return PairLogps(*sides(found.logps), *sides(found.tokens), *reference)


def _one_pair(terms: Sequence[Term], pairs: PairLogps, i: int) -> tuple[float, float, float]:
    """Both rewards and the loss of a pair."""
    values = (pairs.chosen, pairs.rejected, pairs.chosen_len, pairs.rejected_len, pairs.ref_chosen, pairs.ref_rejected)
    one = PairLogps(*(None if v is None else v[i : i + 1] for v in values))  # type: ignore[arg-type]
    results = [term.objective.function(one, **term.parameters) for term in terms]
    told = next(r.metrics for r in results if "rewards/chosen" in r.metrics)
    return float(told["rewards/chosen"][0]), float(told["rewards/rejected"][0]), float(add_up(terms, results, _ONE))


_ONE = {"pairs": 1.0}


def scored_preferences(model: RewardModel, dataset: EncodedDataset, rows: int) -> Preferences:
    """The same of a reward model: the scores themselves; its loss on a pair is −log σ(margin)."""
    found: list[float] = []
    for start in range(0, len(dataset), rows):
        part = [dataset[i] for i in range(start, min(start + rows, len(dataset)))]
        prompts = [example.prompt for example in part for _ in range(2)]
        found += model(prompts, [answer.ids for example in part for answer in example.answers[:2]]).tolist()
    scores = np.array(found, dtype=np.float64)
    lengths = dataset.answer_lengths
    margins = scores[0::2] - scores[1::2]
    return Preferences(
        scores[0::2], scores[1::2], (lengths[:, 0] - lengths[:, 1]).astype(float), np.logaddexp(0, -margins)
    )
