"""Tasks of lm-evaluation-harness, asked of a model that is loaded already."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
from pathlib import Path
from typing import Any

from trueup.config.schema import RunConfig
from trueup.errors import ConfigError
from trueup.models.load import load_tokenizer
from trueup.models.policy import Policy
from trueup.recipes.evaluation.intervals import Estimate

log = logging.getLogger("trueup")

#: LLaMA-Factory's names of tasks → the harness's.
_SAME = {"mmlu_test": "mmlu", "cmmlu_test": "cmmlu", "ceval_validation": "ceval-valid"}
_Z = 1.959964


def check_tasks() -> None:
    """Whether the harness is installed; ConfigError if not."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("`task` asks lm-evaluation-harness, which is not installed", where="task",
                          fix="pip install 'trueup[eval]'")  # fmt: skip


def run_tasks(cfg: RunConfig, policy: Policy, name: str) -> dict[str, Estimate]:
    """task/metric → its value; intervals are the harness's standard errors times 1.96.

    Raises:
        ConfigError: the harness is not installed, or a task is not to be had.
    """
    check_tasks()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    section = cfg.evaluate
    folder = section.task_dir if Path(section.task_dir).is_dir() else None
    manager = TaskManager(include_path=folder)
    tasks = [_SAME.get(task, task) for task in section.task]
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise ConfigError(
            f"lm-evaluation-harness has no task {', '.join(unknown)}", where="task",
            expected=f"a name of `lm_eval ls tasks`, or of a YAML file in task_dir ({section.task_dir})",
        )  # fmt: skip
    log.info("asking %s: %s", name, ", ".join(tasks))
    with policy.generating() as model, contextlib.redirect_stdout(io.StringIO()):
        harness: Any = HFLM(
            pretrained=model, tokenizer=load_tokenizer(cfg.model), batch_size=section.batch_size,
            device=str(policy.device),
        )  # fmt: skip
        try:
            found = simple_evaluate(
                model=harness, tasks=tasks, num_fewshot=section.n_shot, limit=section.task_limit,
                task_manager=manager, apply_chat_template=section.task_chat, bootstrap_iters=200, log_samples=False,
                random_seed=cfg.train.seed, numpy_random_seed=cfg.train.seed, torch_random_seed=cfg.train.seed,
                fewshot_random_seed=cfg.train.seed,
            )  # fmt: skip
        except (OSError, ConnectionError, ValueError, KeyError) as error:
            raise ConfigError(
                f"{', '.join(tasks)}: {type(error).__name__}: {error}", where="task",
                expected="a task whose data is here, or a hub that can be reached",
                fix="name a task of your own in task_dir, with its data as a local file",
            ) from error  # fmt: skip
    return _figures(found)


def _figures(found: dict[str, Any]) -> dict[str, Estimate]:
    figures: dict[str, Estimate] = {}
    for task, values in found["results"].items():
        count = int(found.get("n-samples", {}).get(task, {}).get("effective", 0))
        for key, value in values.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{filtered}")
            ends = (value - _Z * error, value + _Z * error) if isinstance(error, int | float) else (None, None)
            name = f"{task}/{metric}" if filtered == "none" else f"{task}/{metric} ({filtered})"
            figures[name] = Estimate(float(value), *ends, count)
    return figures
