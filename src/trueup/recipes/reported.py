"""Which metrics a run's evaluations will report, known before the run: the objective is asked."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import fields

import torch

from trueup.config.schema import RunConfig
from trueup.errors import ConfigError
from trueup.objectives import Objective
from trueup.recipes.program import objective_of, objective_parameters
from trueup.training.evaluation import metric_name
from trueup.types import PairLogps, TokenLogps


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
    objective = objective_of(cfg)
    told = objective.function(_one_example(objective), **objective_parameters(cfg, objective)).metrics
    names = ["loss", *told]
    if objective.takes is PairLogps:
        names += ["kl"] * objective.needs_reference + ["sft_loss"] * bool(cfg.objective.pref_ftx)
    return names


def _one_example(objective: Objective) -> PairLogps | TokenLogps:
    one = torch.ones(1)
    if objective.takes is TokenLogps:
        return TokenLogps(one, torch.zeros(1, dtype=torch.int64), 1)
    return PairLogps(*(one for _ in fields(PairLogps)))
