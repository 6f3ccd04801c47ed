"""The observers every run has, in the order in which they are told."""

from __future__ import annotations

from typing import Any

from trueup import memory
from trueup.training.events import Observer
from trueup.training.health import Health, Thresholds
from trueup.training.model_card import ModelCard
from trueup.training.plots import Plots
from trueup.training.profile import ProfileReport
from trueup.training.progress import make_display
from trueup.training.run_directory import RunDirectory
from trueup.training.trackers import make_trackers
from trueup.training.trainer_log import TrainerLog

OBSERVERS = "observers"  # under which a program that starts a run holds its own


def standard_observers(settings: Any, run: RunDirectory, *, quiet: bool = False) -> list[Observer]:
    """Display, health, trainer_log.jsonl, trackers, pictures, model card and what the program that
    started the run adds, for rank 0.

    settings  the train section (`report_to`, `project`, `disable_tqdm`, `plot_loss`, `profile`)
    quiet     leave out what writes to standard output
    """
    if not run.writer:
        return []
    return [
        *make_display(quiet, plain=bool(settings.disable_tqdm)),
        Health(lambda text, step: run.warn(text, step), Thresholds.of(run.config)),
        TrainerLog(run),
        *make_trackers(settings.report_to, settings.project),
        *([Plots(run)] if settings.plot_loss else []),
        ModelCard(run),
        *([ProfileReport(run, quiet)] if settings.profile else []),
        *(memory.find(OBSERVERS) or ()),
    ]
