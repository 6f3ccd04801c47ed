"""What happens during a run, as records; and who is told: observers, none of which can hurt the
training.

metrics.jsonl and status.json are not observers: the loop writes them itself, because they must not
fail unseen.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

_log = logging.getLogger("trueup")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Started:
    """Training begins, or goes on from `step`."""

    directory: Path
    run_name: str
    config: Mapping[str, Any]
    step: int
    total_steps: int
    steps_per_epoch: int


@dataclass(frozen=True)
class Stepped:
    """An optimizer step is done; nothing was read from the device for this."""

    step: int


@dataclass(frozen=True)
class Logged:
    """A row of metrics.jsonl with the means since the last one."""

    step: int
    row: Row


@dataclass(frozen=True)
class EvaluationProgress:
    """An evaluation goes on (`done` of `total` sets)."""

    step: int
    done: int
    total: int


@dataclass(frozen=True)
class Evaluated:
    """A row of metrics.jsonl with `eval_…` metrics. `improved`: the best so far by
    metric_for_best_model.
    """

    step: int
    row: Row
    improved: bool = False


@dataclass(frozen=True)
class Saved:
    """A checkpoint was committed and verified."""

    step: int
    path: Path


@dataclass(frozen=True)
class Ended:
    """Training is over. `state`: "finished", "stopped", "failed", or "aborted": be quick then."""

    state: str
    step: int
    total_steps: int
    results: Row = field(default_factory=dict)


Event = Started | Stepped | Logged | EvaluationProgress | Evaluated | Saved | Ended


class Observer(Protocol):
    """Anything that watches a run."""

    def observe(self, event: Event) -> None: ...


class Observers:
    """Tells every observer; one that raises is named once and told no more."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = list(observers)

    def tell(self, event: Event) -> None:
        for observer in list(self._observers):
            try:
                observer.observe(event)
            except Exception as error:  # an observer never hurts training
                self._observers.remove(observer)
                _log.warning(
                    "%s failed (%s: %s) and is switched off; training goes on",
                    type(observer).__name__,
                    type(error).__name__,
                    error,
                )
