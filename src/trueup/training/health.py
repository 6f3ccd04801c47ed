"""Signs that a run goes wrong although its loss looks well, said in words while it happens.

A preference loss can reach accuracy 1 and a beautiful margin while the model forgets how to speak:
then the chosen answers have become less likely than the reference finds them, i.e. their reward is
below zero.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from trueup.training.events import Evaluated, Event, Logged, Row


@dataclass(frozen=True)
class Thresholds:
    """When to speak. Means are over the last `window` logged rows."""

    window: int = 3
    collapse_margin: float = 1.0  # a smaller margin is still noise of the first steps
    stuck_rows: int = 20  # logged rows with accuracy around one half …
    stuck_steps: int = 50  # … over at least so many steps
    stuck_width: float = 0.05
    kl: float = 10.0
    overfit: float = 0.1  # held-out accuracy below its best, while the training accuracy rose


class Health:
    """Watches the rows and warns once of each sign. `say(text, step)` receives the words."""

    def __init__(self, say: Callable[[str, int], None], thresholds: Thresholds | None = None) -> None:
        self.say = say
        self.limits = thresholds or Thresholds()
        # Only the newest rows are looked at; a run may log a hundred thousand.
        self.rows: deque[Row] = deque(maxlen=max(self.limits.stuck_rows, 2 * self.limits.window))
        self.best_eval: tuple[float, float] | None = None  # held-out and training accuracy then
        self.said: set[str] = set()

    def observe(self, event: Event) -> None:
        match event:
            case Logged():
                self.rows.append(event.row)
                self._collapse(event.step)
                self._stuck(event.step)
                self._far(event.step)
            case Evaluated():
                self._overfit(event.step, event.row)
            case _:
                pass

    def _mean(self, name: str, last: int | None = None, skip: int = 0) -> float | None:
        """Mean over the last rows that have the metric, the newest `skip` left out."""
        values = [row[name] for row in self.rows if row.get(name) is not None]
        values = values[: len(values) - skip][-(last or self.limits.window) :]
        return sum(values) / len(values) if values else None

    def _collapse(self, step: int) -> None:
        chosen, margin = self._mean("rewards/chosen"), self._mean("rewards/margins")
        if chosen is None or margin is None:
            return
        before = self._mean("rewards/margins", skip=self.limits.window) or 0.0
        if chosen < 0 and margin >= self.limits.collapse_margin and margin > before:
            self._once(
                "collapse",
                step,
                f"the margin grows ({margin:.2f}) while the chosen reward falls below zero "
                f"({chosen:.2f}): the model unlearns the good answers together with the bad ones. "
                "Lower learning_rate, raise pref_beta, add pref_ftx, or stop earlier",
            )

    def _stuck(self, step: int) -> None:
        rows = [row for row in self.rows if row.get("rewards/accuracies") is not None]
        rows = rows[-self.limits.stuck_rows :]
        if len(rows) < self.limits.stuck_rows:
            return
        if rows[-1]["step"] - rows[0]["step"] < self.limits.stuck_steps:
            return
        mean = sum(row["rewards/accuracies"] for row in rows) / len(rows)
        if abs(mean - 0.5) < self.limits.stuck_width:
            self._once(
                "stuck",
                step,
                f"the accuracy stays at {mean:.2f}, which is guessing: the pairs may be noisy or "
                "reversed, or learning_rate is too low",
            )

    def _far(self, step: int) -> None:
        kl = self._mean("kl")
        if kl is not None and kl > self.limits.kl:
            self._once(
                "kl",
                step,
                f"the KL to the reference is {kl:.1f} (healthy: below {self.limits.kl:g}): the "
                "model drifts away from where it started. Raise pref_beta or lower learning_rate",
            )

    def _overfit(self, step: int, row: Row) -> None:
        held_out = row.get("eval_rewards/accuracies")
        trained = self._mean("rewards/accuracies")
        if held_out is None or trained is None:
            return
        if self.best_eval is None or held_out >= self.best_eval[0]:
            self.best_eval = (held_out, trained)
        elif held_out < self.best_eval[0] - self.limits.overfit and trained > self.best_eval[1]:
            self._once(
                "overfit",
                step,
                f"the held-out accuracy fell from {self.best_eval[0]:.2f} to {held_out:.2f} while "
                "the training accuracy rises: the model learns the pairs by heart. Train fewer "
                "epochs, or set load_best_model_at_end",
            )

    def _once(self, sign: str, step: int, text: str) -> None:
        if sign not in self.said:
            self.said.add(sign)
            self.say(f"step {step}: {text}", step)
