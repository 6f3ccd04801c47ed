"""Which metrics a run's evaluations will report, known before the run: the objective is asked."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import fields

import torch

from trueup.config.losses import pref_losses
from trueup.config.methods import ONLINE, needs_reference
from trueup.config.schema import RunConfig
from trueup.errors import ConfigError
from trueup.objectives import Objective
from trueup.recipes.objective import merged_metrics, terms_of
from trueup.recipes.online_words import online_metric_names
from trueup.rollout.similarity import NAMES as SIMILARITY
from trueup.training.evaluation import metric_name
from trueup.types import FeedbackLogps, PairLogps, Rankings, TokenLogps


def check_metric(cfg: RunConfig, sets: Iterable[str]) -> None:
    """Whether the evaluations of `sets` will report `metric_for_best_model`; ConfigError if not."""
    wanted, sets = cfg.train.metric_for_best_model, list(sets)
    if not wanted or not sets or cfg.train.eval_strategy == "no":
        return
    names = metric_names(cfg)
    row = [f"{name if name.startswith('eval') else f'eval_{name}'}_{metric}" for name in sets for metric in names]
    try:
        metric_name(wanted, dict.fromkeys(row, 0.0))
    except ConfigError:
        near = difflib.get_close_matches(wanted.removeprefix("eval_"), names, n=1)
        raise ConfigError(
            f"no evaluation of this run reports `metric_for_best_model: {wanted}`",
            where="metric_for_best_model",
            expected="one of " + ", ".join(names),
            fix=f"did you mean {near[0]}?" if near else None,
        ) from None


def metric_names(cfg: RunConfig) -> list[str]:
    """Names of an evaluation's metrics, without the name of the set in front."""
    if cfg.objective.stage in ONLINE:
        return online_metric_names(cfg)
    terms = terms_of(cfg)
    results = [term.objective.function(_one_example(term.objective), **term.parameters) for term in terms]
    names = ["loss", *merged_metrics(terms, results, 1.0)]
    names += SIMILARITY * cfg.train.predict_with_generate
    names += ["kl", "kl/chosen"] * needs_reference(cfg)
    names += ["entropy"] * (cfg.train.log_entropy and cfg.objective.stage != "rm")
    names += ["accuracy"] * cfg.train.compute_accuracy
    if pref_losses(cfg):
        names += ["weights"] * cfg.objective.use_weighting + ["knowledge_loss"] * bool(cfg.objective.knowledge_weight)
    return names


def _one_example(objective: Objective) -> PairLogps | FeedbackLogps | TokenLogps | Rankings:
    one = torch.ones(1)
    if objective.takes is TokenLogps:
        return TokenLogps(one, torch.zeros(1, dtype=torch.int64), 1, one)
    if objective.takes is Rankings:
        order = torch.tensor([[1.0, 0.0]])
        return Rankings(order, order, torch.ones(1, 2, dtype=torch.bool), one)
    if objective.takes is FeedbackLogps:
        return FeedbackLogps(one, one, one > 0, one)
    return PairLogps(*(one for _ in fields(PairLogps)))
