"""transformers' callbacks as observers of a run."""

from __future__ import annotations

import logging
import signal
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState

from trueup.errors import ConfigError
from trueup.training.events import Ended, Evaluated, Event, Logged, Saved, Started, Stepped

log = logging.getLogger("trueup")

#: methods of a callback for which a run has no event.
_NEVER = (
    "on_step_begin",
    "on_substep_end",
    "on_pre_optimizer_step",
    "on_optimizer_step",
    "on_prediction_step",
    "on_predict",
)
_STOP = ("should_training_stop", "should_epoch_stop")


class Watcher:
    """Tells a callback what happens. Of the control it hands back, a wish to stop is honoured: after a checkpoint."""

    def __init__(self, callback: TrainerCallback, args: Any, trainer: Any) -> None:
        _check(callback)
        self.callback, self.args, self.trainer = callback, args, trainer
        self.state, self.control = TrainerState(log_history=[]), TrainerControl()
        self.asked_to_stop = False
        self._steps_per_epoch = 1

    def observe(self, event: Event) -> None:
        match event:
            case Started():
                self._steps_per_epoch = max(event.steps_per_epoch, 1)
                self.state.global_step, self.state.max_steps = event.step, event.total_steps
                self._tell("on_train_begin")
                self._tell("on_epoch_begin")
            case Stepped():
                self._stepped(event.step)
            case Logged():
                self.state.log_history.append(dict(event.row))
                self._tell("on_log", logs=dict(event.row))
            case Evaluated():
                self.state.log_history.append(dict(event.row))
                self._tell("on_evaluate", metrics=dict(event.row))
            case Saved():
                self._tell("on_save")
            case Ended():
                self._tell("on_train_end")

    def _stepped(self, step: int) -> None:
        self.state.global_step, self.state.epoch = step, step / self._steps_per_epoch
        self._tell("on_step_end")
        if step % self._steps_per_epoch == 0:
            self._tell("on_epoch_end")
            if step < self.state.max_steps:
                self._tell("on_epoch_begin")

    def _tell(self, name: str, **more: Any) -> None:
        given = {"processing_class": self.trainer.processing_class, **more}
        getattr(self.callback, name)(self.args, self.state, self.control, **given)
        if not self.asked_to_stop and any(getattr(self.control, wish) for wish in _STOP):
            self.asked_to_stop = True
            signal.raise_signal(signal.SIGINT)  # what Ctrl-C does: the step is ended and saved


def split(callbacks: list[Any]) -> tuple[list[Any], dict[str, Any]]:
    """(callbacks to tell, keys that stand for the others). Raises ConfigError."""
    told, keys = [], {}
    for callback in callbacks:
        callback = callback() if isinstance(callback, type) else callback
        if not isinstance(callback, EarlyStoppingCallback):
            told.append(callback)
            continue
        if callback.early_stopping_threshold:
            raise ConfigError(
                "an early stop here has no threshold: any improvement counts", where="EarlyStoppingCallback",
                fix="drop early_stopping_threshold",
            )  # fmt: skip
        keys["early_stopping_steps"] = callback.early_stopping_patience
    return told, keys


def _check(callback: Any) -> None:
    if not isinstance(callback, TrainerCallback):
        raise ConfigError(f"a callback is {type(callback).__name__}", where="callbacks", expected="a TrainerCallback")
    if deaf := [n for n in _NEVER if getattr(type(callback), n, None) is not getattr(TrainerCallback, n, None)]:
        raise ConfigError(
            f"{type(callback).__name__} waits for {', '.join(deaf)}, which a run here does not tell of",
            where="callbacks", expected="on_train_begin, on_step_end, on_log, on_evaluate, on_save, on_train_end …",
        )  # fmt: skip
