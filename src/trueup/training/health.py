"""Signs that a run goes wrong although its loss looks well, said in words while it happens.

A preference loss can reach accuracy 1 and a beautiful margin while the model forgets how to speak:
then the chosen answers have become less likely than the reference finds them, i.e. their reward is
below zero. Without a reference (SimPO, ORPO, CPO) a reward is a likelihood, below zero from the start, and says no such
thing; where several losses are added up, rewards are those of the first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trueup.config.losses import PREF_LOSSES, STAGE_LOSSES
from trueup.training.events import Evaluated, Event, Logged, Row


@dataclass(frozen=True)
class Thresholds:
    """When to speak. Means are over the last `window` logged rows."""

    window: int = 3
    compares: bool | None = None  # whether rewards are against a reference; None: a KL in the rows says so
    collapse_margin: float = 1.0  # a smaller margin is still noise of the first steps
    stuck_rows: int = 20  # logged rows with accuracy around one half …
    stuck_steps: int = 50  # … over at least so many steps
    stuck_width: float = 0.05
    kl: float = 10.0  # of chosen answers, or of the model's own
    overfit: float = 0.1  # held-out accuracy below its best, while the training accuracy rose
    gap: float = 0.25  # between training and held-out accuracy, beyond what it was at the first evaluation
    fallen: float = -0.3  # the chosen reward, when both rewards have fallen for three windows
    length_rows: int = 10  # logged rows over which longer answers win …
    length: float = 0.1  # … more often than chosen ones, by this much
    longer: float = 1.5  # the model's own answers, against those of the first rows
    same_rewards: float = 0.8  # share of groups whose answers all have one reward

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Thresholds:
        """For a run's flat config. Rewards are β times log-ratios: with a small β, small rewards mean as much."""
        stage = config.get("stage")
        if stage not in STAGE_LOSSES and stage != "online_dpo":
            return cls()
        named = config.get("pref_loss", "sigmoid") if stage in STAGE_LOSSES else "sigmoid"
        first = next((str(n) for n in (named if isinstance(named, list) else [named]) if n != "sft"), "sft")
        loss, beta = PREF_LOSSES[first], config.get("pref_beta", 0.1)
        margin, fallen = _NATS_A_TOKEN if loss.per_token else _NATS
        return cls(
            compares=loss.reference and first not in _FALL_BY_DESIGN,
            collapse_margin=min(cls.collapse_margin, margin * beta),
            fallen=-min(-cls.fallen, fallen * beta),
        )


#: log-ratios that are no noise any more: the margin of a pair, and the fall of its chosen answer.
_NATS = 10.0, 3.0
_NATS_A_TOKEN = 0.25, 0.075
_FALL_BY_DESIGN = ("apo_down",)


class Health:
    """Watches the rows and warns once of each sign. `say(text, step)` receives the words."""

    def __init__(self, say: Callable[[str, int], None], thresholds: Thresholds | None = None) -> None:
        self.say = say
        self.limits = thresholds or Thresholds()
        # Only the newest rows are looked at; a run may log a hundred thousand.
        limits = self.limits
        self.rows: deque[Row] = deque(maxlen=max(limits.stuck_rows, limits.length_rows, 3 * limits.window))
        self.best_eval: tuple[float, float] | None = None  # held-out and training accuracy then
        self.first_gap: float | None = None  # training minus held-out accuracy at the first evaluation
        self.first_lengths: list[float] = []  # of the model's own answers
        self.said: set[str] = set()

    def observe(self, event: Event) -> None:
        match event:
            case Logged():
                self.rows.append(event.row)
                self._collapse(event.step)
                self._stuck(event.step)
                self._far(event.step)
                self._falling(event.step)
                self._length(event.step)
                self._own_length(event.step, event.row)
                self._same_rewards(event.step)
            case Evaluated():
                self._overfit(event.step, event.row)
            case _:
                pass

    def _mean(self, name: str, last: int | None = None, skip: int = 0) -> float | None:
        """Mean over the last rows that have the metric, the newest `skip` left out."""
        values = [row[name] for row in self.rows if row.get(name) is not None]
        values = values[: len(values) - skip][-(last or self.limits.window) :]
        return sum(values) / len(values) if values else None

    def _has_reference(self) -> bool:
        """As the config says; else a KL is logged, or the rewards are of the model's own answers (online DPO)."""
        if self.limits.compares is not None:
            return self.limits.compares
        signs = ("kl", "completions/mean_length")
        return any(row.get(sign) is not None for row in self.rows for sign in signs)

    def _collapse(self, step: int) -> None:
        if not self._has_reference():
            return
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
        pairs = any(row.get("kl/chosen") is not None for row in self.rows)
        name = "kl/chosen" if pairs else "kl"  # what a preference pushes away is to be far
        values = [row[name] for row in self.rows if row.get(name) is not None][-self.limits.window :]
        kl = min(values, default=0.0)  # a single odd token is e^d, and gone in the next row; a drift stays
        if kl > self.limits.kl:
            where = " on chosen answers" if pairs else ""
            self._once(
                "kl",
                step,
                f"the KL to the reference is {kl:.1f}{where} (healthy: below {self.limits.kl:g}): the model drifts "
                "away from where it started. Raise pref_beta or lower learning_rate",
            )

    def _falling(self, step: int) -> None:
        """Both answers become less likely, window after window, before the margin tells of a collapse."""
        if "collapse" in self.said or not self._has_reference():
            return
        window = self.limits.window
        if sum(row.get("rewards/rejected") is not None for row in self.rows) < 3 * window:
            return
        sides = {}
        for side in ("chosen", "rejected"):
            newest, before, oldest = (self._mean(f"rewards/{side}", skip=skip * window) for skip in range(3))
            if newest is None or before is None or oldest is None or not newest < before < oldest:
                return
            sides[side] = newest
        if sides["chosen"] <= self.limits.fallen:
            self._once(
                "falling",
                step,
                f"chosen and rejected answers both become less likely (rewards {sides['chosen']:.2f} and "
                f"{sides['rejected']:.2f}, and falling): the step is too large. Lower learning_rate, lengthen the "
                "warm-up, or add pref_ftx",
            )

    def _length(self, step: int) -> None:
        """Longer answers win more often than chosen ones."""
        rows = [row for row in self.rows if row.get("rewards/longer_wins") is not None]
        if len(rows) < self.limits.length_rows:
            return
        rows = rows[-self.limits.length_rows :]
        longer, accuracy = (
            sum(row[f"rewards/{name}"] for row in rows) / len(rows) for name in ("longer_wins", "accuracies")
        )
        if longer > accuracy + self.limits.length:
            self._once(
                "length",
                step,
                f"the longer answer has the higher reward in {longer:.0%} of the pairs, the chosen one in "
                f"{accuracy:.0%}: the model learns length in place of quality. Balance the pairs, or use sigmoid_norm, "
                "simpo, rdpo or ld_alpha",
            )

    def _own_length(self, step: int, row: Row) -> None:
        """The model's own answers grow."""
        if row.get("completions/mean_length") is None:
            return
        window = self.limits.window
        if len(self.first_lengths) < window:
            self.first_lengths.append(row["completions/mean_length"])
            return
        first, now = sum(self.first_lengths) / window, self._mean("completions/mean_length")
        if now is not None and now > self.limits.longer * first:
            self._once(
                "own length",
                step,
                f"answers have grown from {first:.0f} to {now:.0f} tokens: the reward may pay for length. Look at the "
                "completions, or set missing_eos_penalty",
            )

    def _same_rewards(self, step: int) -> None:
        """Groups whose answers all have one reward teach nothing."""
        share = self._mean("frac_reward_zero_std")
        if share is not None and len(self.rows) >= self.limits.window and share >= self.limits.same_rewards:
            self._once(
                "same rewards",
                step,
                f"in {share:.0%} of the groups all answers have the same reward, which teaches nothing: the prompts "
                "are too easy or too hard, or the reward is too coarse",
            )

    def _overfit(self, step: int, row: Row) -> None:
        held_out = row.get("eval_rewards/accuracies")
        trained = self._mean("rewards/accuracies")
        if held_out is None or trained is None:
            return
        gap = trained - held_out
        first_gap = self.first_gap = gap if self.first_gap is None else self.first_gap
        if self.best_eval is None or held_out >= self.best_eval[0]:
            self.best_eval = (held_out, trained)
        what = None
        if held_out < self.best_eval[0] - self.limits.overfit and trained > self.best_eval[1]:
            best = self.best_eval[0]
            what = f"the held-out accuracy fell from {best:.2f} to {held_out:.2f} while the training accuracy rises"
        elif gap > max(first_gap, 0.0) + self.limits.gap:
            what = f"the training accuracy is {trained:.2f} and the held-out one {held_out:.2f}, and the gap opens"
        if what:
            self._once(
                "overfit",
                step,
                f"{what}: the model learns the pairs by heart. Train fewer epochs, or set load_best_model_at_end",
            )

    def _once(self, sign: str, step: int, text: str) -> None:
        if sign not in self.said:
            self.said.add(sign)
            self.say(f"step {step}: {text}", step)
