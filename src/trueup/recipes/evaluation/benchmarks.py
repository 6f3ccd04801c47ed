"""Tasks of lm-evaluation-harness, asked of a model that is loaded already."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import logging
import os
from collections.abc import Iterator, Sequence
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


def check_tasks(cfg: RunConfig) -> None:
    """Whether the harness is installed, knows the tasks, and has their data; what is missing is fetched.

    Raises:
        ConfigError: something of it is not to be had.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("`task` asks lm-evaluation-harness, which is not installed", where="task",
                          fix="pip install 'trueup[eval]'")  # fmt: skip
    section, names = cfg.evaluate, _names(cfg)
    with _quiet():
        from lm_eval.tasks import get_task_dict

        manager = _manager(section.task_dir)
        if unknown := [name for name in names if not manager.match_tasks([name])]:
            raise ConfigError(
                f"lm-evaluation-harness has no task {', '.join(unknown)}", where="task",
                expected=f"a name of `lm_eval ls tasks`, or of a YAML file in task_dir ({section.task_dir})",
            )  # fmt: skip
        with _told(names):
            get_task_dict(names, manager)


def run_tasks(cfg: RunConfig, policy: Policy, name: str) -> dict[str, Estimate]:
    """task/metric → its value; intervals are the harness's standard errors times 1.96.

    Raises:
        ConfigError: a task cannot be asked as it is meant to be.
    """
    section, names = cfg.evaluate, _names(cfg)
    log.info("asking %s: %s", name, ", ".join(names))
    with _quiet(), policy.generating() as model, _told(names):
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        harness: Any = HFLM(
            pretrained=model, tokenizer=load_tokenizer(cfg.model), batch_size=section.batch_size,
            device=str(policy.device),
        )  # fmt: skip
        seed = cfg.train.seed
        found = simple_evaluate(
            model=harness, tasks=names, num_fewshot=section.n_shot, limit=section.task_limit,
            task_manager=_manager(section.task_dir), apply_chat_template=section.task_chat, bootstrap_iters=200,
            log_samples=False, random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed,
            fewshot_random_seed=seed,
        )  # fmt: skip
    return _figures(found)


def _names(cfg: RunConfig) -> list[str]:
    """The tasks under the harness's names."""
    return [_SAME.get(task, task) for task in cfg.evaluate.task]


@functools.cache
def _manager(folder: str) -> Any:
    """The harness's index of tasks, with those of a folder of one's own."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder if Path(folder).is_dir() else None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what the harness tells developers."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    theirs = logging.getLogger("lm_eval")
    before = theirs.level
    theirs.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        theirs.setLevel(before)


@contextlib.contextmanager
def _told(names: Sequence[str]) -> Iterator[None]:
    """What goes wrong in the harness, as a ConfigError."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{', '.join(names)}: {type(error).__name__}: {error}", where="task",
            expected="a task whose data is here, or a hub that can be reached",
            fix="name a task of your own in task_dir, with its data as a local file",
        ) from error  # fmt: skip


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
