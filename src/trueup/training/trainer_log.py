"""trainer_log.jsonl with LLaMA-Factory's keys, for dashboards that read it. (metrics.jsonl has
everything.)
"""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

from trueup.training.events import Evaluated, Event, Logged, Row, Started
from trueup.training.run_directory import TRAINER_LOG_FILE, RunDirectory

#: their key -> the first of ours that the row has
_KEYS = {
    "loss": ("loss",),
    "eval_loss": ("eval_loss",),
    "reward": ("reward",),
    "accuracy": ("rewards/accuracies", "accuracy"),
    "lr": ("learning_rate",),
    "epoch": ("epoch",),
}


class TrainerLog:
    """Appends a line per logged row and per evaluation."""

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self.total_steps = 0
        self.first_step = 0
        self.begun = time.monotonic()

    def observe(self, event: Event) -> None:
        match event:
            case Started():
                self.total_steps, self.first_step = event.total_steps, event.step
                self.begun = time.monotonic()
            case Logged() | Evaluated():
                self.run.append(TRAINER_LOG_FILE, self._line(event.step, event.row))
            case _:
                pass

    def _line(self, step: int, row: Row) -> dict[str, Any]:
        seconds = time.monotonic() - self.begun
        done, left = step - self.first_step, self.total_steps - step
        line: dict[str, Any] = {"current_steps": step, "total_steps": self.total_steps}
        for key, ours in _KEYS.items():
            present = [name for name in ours if name in row]
            if present:
                line[key] = row[present[0]]
        line["percentage"] = round(100.0 * step / max(self.total_steps, 1), 2)
        line["elapsed_time"] = _clock(seconds)
        line["remaining_time"] = _clock(seconds / done * left) if done else "?"
        if "num_tokens" in row:
            line["throughput"] = row["tokens_per_second"]
            line["total_tokens"] = row["num_tokens"]
        return line


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
