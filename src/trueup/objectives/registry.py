"""The table of objectives: what each takes, what it needs, and over what its loss is averaged.

An objective is a pure function `(logps, **parameters) -> Loss`. The loop never learns its name: the recipe builds
the log-prob dataclass it `takes`, runs a reference if it `needs_reference`, and divides its sum by the step's global
count of `denominator`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from trueup.types import Loss


@dataclass(frozen=True)
class Objective:
    """One registered objective. `parameters` maps the function's keyword to the config key that sets it."""

    name: str
    takes: type
    needs_reference: bool
    denominator: Literal["pairs", "predictions"]
    parameters: dict[str, str]
    function: Callable[..., Loss]


OBJECTIVES: dict[str, Objective] = {}


def objective(
    name: str,
    *,
    takes: type,
    denominator: Literal["pairs", "predictions"],
    needs_reference: bool = False,
    parameters: dict[str, str] | None = None,
) -> Callable[[Callable[..., Loss]], Callable[..., Loss]]:
    """Register a loss function under the name users write (`pref_loss`, or the stage's own name)."""

    def register(function: Callable[..., Loss]) -> Callable[..., Loss]:
        assert name not in OBJECTIVES, f"objective {name} is registered twice"
        OBJECTIVES[name] = Objective(name, takes, needs_reference, denominator, parameters or {}, function)
        return function

    return register
