"""The table of objectives: what each takes, what it needs, and over what its loss is averaged.

An objective is a pure function `(logps, **parameters) -> Loss`. The loop never learns its name: the recipe builds
the log-prob dataclass it `takes`, runs a reference if it `needs_reference`, and divides its sum by the step's global
count of `denominator`.

Five needs go beyond a micro-batch's own log-probabilities, and the recipe meets them by keyword:

* `survey`: the objective couples examples. `survey(logps)` gives a [B] value per name; the recipe gathers them over
  the whole step, without gradient, and passes them as `step` (`StepValues`).
* `shift`: the running mean of the rewards of all steps before this one, as `shift`.
* `mismatched`: log-ratios of prompts with answers of other prompts, over the whole step, as `mismatched`.
* `entropy`: `entropy` of `TokenLogps`, one more product of the head.
* `divergence`: `kl_chosen` and `kl_rejected` of `PairLogps`, for which the reference runs beside the policy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from trueup.types import Loss

Denominator = Literal["pairs", "predictions", "answers", "desirable", "rankings"]
Survey = Callable[[Any], dict[str, Tensor]]


@dataclass(frozen=True)
class Objective:
    """One registered objective. `parameters` maps the function's keyword to the config key that sets it."""

    name: str
    takes: type
    needs_reference: bool
    denominator: Denominator
    parameters: dict[str, str]
    function: Callable[..., Loss]
    survey: Survey | None = None
    needs_shift: bool = False
    needs_divergence: bool = False
    needs_mismatched: bool = False
    needs_entropy: bool = False


OBJECTIVES: dict[str, Objective] = {}


def objective(
    name: str,
    *,
    takes: type,
    denominator: Denominator,
    needs_reference: bool = False,
    parameters: dict[str, str] | None = None,
    survey: Survey | None = None,
    needs_shift: bool = False,
    needs_divergence: bool = False,
    needs_mismatched: bool = False,
    needs_entropy: bool = False,
) -> Callable[[Callable[..., Loss]], Callable[..., Loss]]:
    """Register a loss function under the name users write (`pref_loss`, or the stage's own name)."""

    def register(function: Callable[..., Loss]) -> Callable[..., Loss]:
        assert name not in OBJECTIVES, f"objective {name} is registered twice"
        OBJECTIVES[name] = Objective(
            name, takes, needs_reference, denominator, parameters or {}, function,
            survey, needs_shift, needs_divergence, needs_mismatched, needs_entropy,
        )  # fmt: skip
        return function

    return register
