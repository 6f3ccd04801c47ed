"""Evaluation: the training loss and its metrics over held-out sets; a run of nothing else."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from trueup.errors import ConfigError
from trueup.training.backend import Backend
from trueup.training.events import Ended, Evaluated, Observer, Observers
from trueup.training.metrics import MetricSums, means
from trueup.training.run_directory import RunDirectory
from trueup.training.signals import StopRequest
from trueup.training.step import B, LooksAhead, Program, step_totals
from trueup.training.watchdog import Watchdog


@torch.no_grad()
def evaluate(
    program: Program[B],
    batches: Sequence[B],
    backend: Backend,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Mean loss and metrics over one evaluation set, through the training loss; None if `stop()`
    cut it short.

    Neither dropout nor the random state of training is touched.
    """
    sums = MetricSums(backend.device)
    totals = step_totals(program, batches, backend)
    rounds = int(max(backend.gather(len(batches))))
    program.train(False)
    with torch.random.fork_rng([backend.device] if backend.device.type == "cuda" else []):
        if isinstance(program, LooksAhead):
            program.look_ahead(batches, backend, None)
        for index in range(rounds):
            if backend.any(stop()):
                program.train(True)
                return None
            if index < len(batches):
                loss, metrics = program.loss(batches[index], totals)
                sums.update(metrics)
                sums.add("loss", loss, 0.0)
    program.train(True)
    host = backend.sum_metrics(sums.read())
    loss, _ = host.pop("loss", (math.nan, 0.0))
    return {"loss": loss, **means(host)}


def evaluate_sets(
    program: Program[B],
    backend: Backend,
    stop: Callable[[], bool] = lambda: False,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float] | None:
    """`eval_…` metrics of all the program's sets (`<set>_loss` …) and the speed; None if stopped.

    `tell(done, total)` hears how many sets are done.
    """
    sets, row = program.eval_sets, {}
    examples, begun = 0, time.monotonic()
    for done, (name, batches) in enumerate(sets.items()):
        tell(done, len(sets))
        metrics = evaluate(program, batches, backend, stop)
        if metrics is None:
            return None
        prefix = name if name.startswith("eval") else f"eval_{name}"
        row |= {f"{prefix}_{key}": value for key, value in metrics.items()}
        examples += sum(len(program.describe(batch)) for batch in batches)
    seconds = max(time.monotonic() - begun, 1e-9)
    total = backend.sum_counts({"examples": examples})["examples"]
    row["eval_runtime"] = round(seconds, 4)
    row["eval_samples_per_second"] = round(total / seconds, 3)
    return row


def evaluate_run(
    program: Program[B],
    run: RunDirectory,
    backend: Backend,
    observers: Sequence[Observer] = (),
) -> dict[str, float]:
    """A run that only evaluates: writes eval_results.json and all_results.json, trains nothing. Raises Stopped after
    a signal.
    """
    run.status(state="running", step=0, total_steps=0)
    with StopRequest() as stop, Watchdog(run) as watchdog:

        def asked_to_stop() -> bool:
            watchdog.beat()
            run.heartbeat()
            return stop()

        row = evaluate_sets(program, backend, asked_to_stop)
        if row is None:
            raise stop.stopped(backend, "the evaluation was stopped; it wrote nothing", str(run.path))
    run.write_results("eval", row)
    told = Observers(observers if backend.rank == 0 else ())
    told.tell(Evaluated(0, row))
    told.tell(Ended("evaluated", 0, 0, row))
    run.status(state="finished", exit_code=0)
    return row


def metric_name(wanted: str | None, row: Mapping[str, float]) -> str:
    """The evaluation's name of `metric_for_best_model`, given with or without `eval_`; default the
    loss.

    With several evaluation sets a bare name means the first set's. Raises ConfigError if there is
    none.
    """
    wanted = wanted or "loss"
    if wanted in row:
        return wanted
    for name in row:
        if name.startswith("eval_") and name.endswith(f"_{wanted}"):
            return name
    raise ConfigError(
        f"the evaluation has no metric {wanted!r}",
        where="metric_for_best_model",
        expected="one of " + ", ".join(name.removeprefix("eval_") for name in row),
    )
