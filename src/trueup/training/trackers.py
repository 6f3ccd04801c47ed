"""Experiment trackers behind one small adapter each. None can delay, fail or end a training.

Each tracker lives on a thread of its own and takes what it can from a queue: a service that is down
or hangs costs one warning. A package that is not installed costs one line that names it.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import queue
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from trueup.training.events import Ended, Evaluated, Event, Logged, Started

_log = logging.getLogger("trueup")
_FAREWELL_SECONDS = 20.0  # for what is still in the queue at the end
_NOT_METRICS = ("step", "time")


class Adapter(Protocol):
    """One tracker's library. All calls come from one thread."""

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...
    def finish(self) -> None: ...


class TensorBoard:
    """Event files under `<run>/runs`."""

    def __init__(self, name: str, project: str, config: Mapping[str, Any], directory: Path) -> None:
        module = importlib.import_module("torch.utils.tensorboard")
        self.writer = module.SummaryWriter(log_dir=str(directory / "runs"))
        lines = "\n".join(f"| {key} | {value} |" for key, value in config.items())
        self.writer.add_text("config", f"| key | value |\n|---|---|\n{lines}")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(_train_or_eval(name), value, step)
        self.writer.flush()

    def finish(self) -> None:
        self.writer.close()


class Wandb:
    def __init__(self, name: str, project: str, config: Mapping[str, Any], directory: Path) -> None:
        wandb = importlib.import_module("wandb")
        self.run = wandb.init(project=project, name=name, config=dict(config), dir=str(directory), resume="allow")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        named = {_train_or_eval(name): value for name, value in metrics.items()}
        self.run.log({**named, "train/global_step": step}, step=step)

    def finish(self) -> None:
        self.run.finish()


class Trackio:
    def __init__(self, name: str, project: str, config: Mapping[str, Any], directory: Path) -> None:
        self.trackio = importlib.import_module("trackio")
        self.trackio.init(project=project, name=name, config=dict(config), resume="allow")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        named = {_train_or_eval(name): value for name, value in metrics.items()}
        self.trackio.log(named, step=step)

    def finish(self) -> None:
        self.trackio.finish()


class MLflow:
    def __init__(self, name: str, project: str, config: Mapping[str, Any], directory: Path) -> None:
        self.mlflow = importlib.import_module("mlflow")
        self.mlflow.set_experiment(project)
        self.mlflow.start_run(run_name=name)
        params = {key: str(value)[:500] for key, value in config.items()}
        self.mlflow.log_params(params)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.mlflow.log_metrics(dict(metrics), step=step)

    def finish(self) -> None:
        self.mlflow.end_run()


class SwanLab:
    def __init__(self, name: str, project: str, config: Mapping[str, Any], directory: Path) -> None:
        self.swanlab = importlib.import_module("swanlab")
        self.swanlab.init(
            project=project,
            experiment_name=name,
            config=dict(config),
            logdir=str(directory / "swanlog"),
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        named = {_train_or_eval(name): value for name, value in metrics.items()}
        self.swanlab.log(named, step=step)

    def finish(self) -> None:
        self.swanlab.finish()


_ADAPTERS: dict[str, tuple[str, Callable[[str, str, Mapping[str, Any], Path], Adapter]]] = {
    "tensorboard": ("tensorboard", TensorBoard),
    "wandb": ("wandb", Wandb),
    "trackio": ("trackio", Trackio),
    "mlflow": ("mlflow", MLflow),
    "swanlab": ("swanlab", SwanLab),
}


class Tracker:
    """Feeds one adapter from a thread of its own. The training only ever puts rows into a queue."""

    def __init__(
        self,
        name: str,
        make: Callable[[str, str, Mapping[str, Any], Path], Adapter],
        project: str = "trueup",
    ) -> None:
        self.name, self.make, self.project = name, make, project
        self.queue: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self.broken = False

    def observe(self, event: Event) -> None:
        if isinstance(event, Started):
            self.thread.start()
        if self.broken or not isinstance(event, Started | Logged | Evaluated | Ended):
            return
        self.queue.put(event)
        if isinstance(event, Ended) and event.state != "aborted" and self.thread.is_alive():
            self.thread.join(_FAREWELL_SECONDS)
            if self.thread.is_alive():
                _log.warning("report_to: %s did not answer in time; its last rows may be missing", self.name)

    def _work(self) -> None:
        adapter: Adapter | None = None
        try:
            while True:
                event = self.queue.get()
                if isinstance(event, Started):
                    adapter = self.make(event.run_name, self.project, event.config, event.directory)
                elif isinstance(event, Logged | Evaluated) and adapter:
                    adapter.log(_metrics(event.row), event.step)
                elif isinstance(event, Ended):
                    if adapter:
                        adapter.finish()
                    return
        except Exception as error:  # a tracker never hurts training
            self.broken = True
            _log.warning(
                "report_to: %s failed (%s: %s); training goes on without it",
                self.name,
                type(error).__name__,
                error,
            )


def make_trackers(report_to: str | Iterable[str] | None, project: str = "trueup") -> list[Tracker]:
    """Trackers for the names in `report_to` ("none", "all" or names). An absent package is said
    once.
    """
    names = [report_to] if isinstance(report_to, str) else list(report_to or [])
    if "all" in names:
        names = [name for name, (package, _) in _ADAPTERS.items() if _installed(package)]
    trackers = []
    for name in dict.fromkeys(names):
        if name == "none":
            continue
        if name not in _ADAPTERS:
            _log.warning(
                "report_to: %s is not known (known: %s); training goes on without it",
                name,
                ", ".join(_ADAPTERS),
            )
        elif not _installed(_ADAPTERS[name][0]):
            _log.warning(
                "report_to: %s is not installed (pip install 'trueup[track]'); training goes on without it",
                name,
            )
        else:
            trackers.append(Tracker(name, _ADAPTERS[name][1], project))
    return trackers


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _metrics(row: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value) for name, value in row.items() if name not in _NOT_METRICS and isinstance(value, int | float)
    }


def _train_or_eval(name: str) -> str:
    """transformers' names in trackers: train/loss, eval/loss."""
    return f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
