"""Runs beside each other: where their configs differ, and which one did best. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from trueup.training.run_files import RUN_FILE

#: What runs are judged by, the first of them that any run reports: metric, whether more is better.
JUDGED_BY = (
    ("eval_rewards/accuracies", True),
    ("eval_reward", True),
    ("eval_loss", False),
    ("reward", True),
    ("rewards/accuracies", True),
    ("loss", False),
)
#: Differs between any two runs, and says nothing of what they did.
_NAMES_OF_RUNS = {"output_dir", "run_name", "overwrite_output_dir", "resume_from_checkpoint"}


def read_config(run: Path) -> dict[str, Any]:
    """A run's resolved keys; empty where it has not written them."""
    try:
        found = yaml.safe_load((run / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def differences(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Key → each config's value, for the keys in which not all are the same."""
    keys = dict.fromkeys(key for config in configs for key in config if key not in _NAMES_OF_RUNS)
    values = {key: [config.get(key) for config in configs] for key in keys}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found)}


def best(metrics: Mapping[str, Mapping[str, float]]) -> tuple[str, str] | None:
    """(run, metric) of the best run by the first metric that at least two of them report; None if there is none."""
    for metric, more_is_better in JUDGED_BY:
        found = {run: row[metric] for run, row in metrics.items() if math.isfinite(row.get(metric, math.nan))}
        if len(found) > 1:
            choose = max if more_is_better else min
            return choose(found, key=lambda run: found[run]), metric
    return None
