"""What a config makes of the registered objectives: one or several, weighed and with their parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trueup import memory
from trueup.config.losses import pref_losses
from trueup.config.schema import RunConfig, default
from trueup.objectives import OBJECTIVES, Objective
from trueup.objectives.pairwise import implicit_rewards, pair_metrics
from trueup.types import Loss, Metrics, PairLogps


@dataclass(frozen=True)
class Term:
    """An objective as a run uses it. `name` is what the user wrote."""

    name: str
    objective: Objective
    weight: float
    parameters: dict[str, Any]

    @property
    def is_anchor(self) -> bool:
        """A likelihood that is added to a preference, under a metric of its own."""
        return self.objective.name in ("chosen_nll", "desirable_nll")


def terms_of(cfg: RunConfig) -> list[Term]:
    """What is added up: the losses of `pref_loss`, BCO and likelihood if they are asked for; the first comes first.

    `pref_bco_weight` w makes a mean of it, (L + w BCO)/(1 + w), as LLaMA-Factory does.
    """
    names = pref_losses(cfg)
    if cfg.objective.custom_objective:
        return [_given_term(cfg, cfg.objective.custom_objective)]
    if cfg.objective.stage == "rm":
        return [_term(cfg.reward.reward_loss, cfg.reward.reward_loss, 1.0, cfg)]
    if not names:
        name = _sft_loss(cfg)
        return [_term(name, name, 1.0, cfg)]
    bco = cfg.objective.pref_bco_weight
    weights = cfg.objective.loss_weights or [1.0] * len(names)
    anchor = "desirable_nll" if cfg.objective.stage == "kto" else "chosen_nll"
    terms = [
        _term(name, anchor if name == "sft" else name, weight / (1 + bco), cfg)
        for name, weight in zip(names, weights, strict=True)
    ]
    if bco:
        terms.append(_term("bco_pair", "bco_pair", bco / (1 + bco), cfg))
    if cfg.objective.pref_ftx:
        terms.append(_term("pref_ftx", anchor, cfg.objective.pref_ftx, cfg))
    return terms


def _sft_loss(cfg: RunConfig) -> str:
    """The registered name of a stage's loss on tokens."""
    if cfg.objective.stage != "sft":
        return "sft"
    return "dft" if cfg.objective.use_dft_loss else "eaft" if cfg.objective.use_eaft_loss else "sft"


def _term(name: str, registered: str, weight: float, cfg: RunConfig) -> Term:
    objective = OBJECTIVES[registered]
    return Term(name, objective, weight, objective_parameters(cfg, objective))


def _given_term(cfg: RunConfig, name: str) -> Term:
    """A program's own loss, in the place of the stage's: it sees what that one sees, and its sum is divided alike."""
    function = memory.held(name, "custom_objective")
    own = OBJECTIVES[_REPLACED.get(cfg.objective.stage) or pref_losses(cfg)[0]]

    def loss(logps: Any) -> Loss:
        result = function(logps)
        if isinstance(result, Loss):
            return result
        if not isinstance(result, Tensor):
            raise TypeError(f"{name} returned {type(result).__name__}; expected a tensor of losses, or a trueup.Loss")
        return Loss(result.sum(), _usual_metrics(logps, cfg.objective.pref_beta))

    label = name.removeprefix(memory.PREFIX)
    return Term(label, Objective(label, own.takes, own.needs_reference, own.denominator, {}, loss), 1.0, {})


#: stages without `pref_loss` → their own objective.
_REPLACED = {"pt": "sft", "sft": "sft", "rm": "bradley_terry"}


def _usual_metrics(logps: Any, beta: float) -> Metrics:
    """What every loss on pairs reports: rewards are β times the log-ratio, or the log-probability."""
    if not isinstance(logps, PairLogps):
        return {}
    if logps.ref_chosen is None:
        return pair_metrics(logps, beta * logps.chosen, beta * logps.rejected)
    return pair_metrics(logps, *implicit_rewards(logps, beta))


def objective_of(cfg: RunConfig) -> Objective:
    """The (first) registered objective of a run."""
    return terms_of(cfg)[0].objective


def objective_parameters(cfg: RunConfig, objective: Objective) -> dict[str, Any]:
    """Keyword arguments of the objective's function, from the keys it declares."""
    return {name: cfg[key] for name, key in objective.parameters.items()}


def describe_objective(cfg: RunConfig) -> str:
    """The objective and its parameters, as the header shows them; those at rest are left out."""
    terms = terms_of(cfg)
    settings: dict[str, Any] = {}
    for term in terms:
        for name, key in term.objective.parameters.items():
            if name == "beta" or cfg[key] != default(key) or key in _OWN_KEYS:
                settings[name] = cfg[key]
    for key in _ADDED_KEYS:
        if cfg[key] != default(key):
            settings[key] = cfg[key]
    losses = [term for term in terms if term.name in pref_losses(cfg)] or terms
    named = [f"{term.weight:g} {term.name}" if len(losses) > 1 else term.name for term in losses]
    shown = ", ".join(f"{name} {_shown(value)}" for name, value in settings.items())
    return f"{cfg.objective.stage}: {' + '.join(named)}" + (f" ({shown})" if shown else "")


#: keys that make a loss what it is, shown even at their defaults.
_OWN_KEYS = ("simpo_gamma", "discopop_tau", "dpop_lambda", "rdpo_alpha", "tdpo_alpha", "alphapo_alpha")
#: keys that add something to whatever loss there is.
_ADDED_KEYS = (
    "pref_ftx", "pref_bco_weight", "ld_alpha", "use_weighting", "knowledge_weight", "sync_ref_model",
)  # fmt: skip


def _shown(value: Any) -> str:
    return "on" if value is True else str(value)


def add_up(terms: Sequence[Term], results: Sequence[Loss], totals: Mapping[str, float]) -> Tensor:
    """The batch's share of the step's loss: Σ weight · sum / the step's count."""
    return sum(
        (t.weight / totals[t.objective.denominator]) * r.sum
        for t, r in zip(terms, results, strict=True)
        if totals[t.objective.denominator]
    )  # type: ignore[return-value]


def merged_metrics(terms: Sequence[Term], results: Sequence[Loss], count: float) -> Metrics:
    """The first term's metrics, what others add to them, and each loss by itself where there are several."""
    metrics: Metrics = {}
    for result in results:
        metrics = {**result.metrics, **metrics}
    preferences = [(t, r) for t, r in zip(terms, results, strict=True) if not t.is_anchor]
    if len(preferences) > 1:
        metrics |= {f"loss/{t.name}": (r.sum.detach(), count) for t, r in preferences}
    return metrics
