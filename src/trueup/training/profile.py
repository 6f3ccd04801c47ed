"""Where a run's time goes (`profile: true`): seconds by phase, into profile.json and a table at the end.

`with phase("forward"):` marks a stretch wherever it is, as torch's `record_function` does, and costs a look at one
variable unless `profiling` is on. Then a GPU is waited for at every border, so that its work counts where it was asked
for; this alone makes a run a little slower.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from trueup.training.events import Ended, Event, Stepped
from trueup.training.run_directory import RunDirectory

PROFILE_FILE = "profile.json"

#: What is marked, in the order in which it is shown; "other" is all between the marks. A rollout is sampled, its
#: answers get rewards; a look-ahead is a pass over a step (or a rollout) as a whole before its first loss.
PHASES: tuple[str, ...] = (
    "loading", "reference table", "data", "rollout", "rewards", "look-ahead", "reference", "forward", "backward",
    "optimizer", "evaluation", "save", "other",
)  # fmt: skip

_IN_STEPS = ("data", "rollout", "rewards", "look-ahead", "reference", "forward", "backward", "optimizer")
_UNMARKED = nullcontext()
_active: Profile | None = None


def phase(name: str) -> AbstractContextManager[None]:
    """Counts what happens inside as one of PHASES."""
    return _UNMARKED if _active is None else _active.phase(name)


@contextmanager
def profiling(on: bool, device: torch.device) -> Iterator[None]:
    """Listens to the marks of this process, if it is on and nobody listens yet."""
    global _active
    before = _active
    if on and before is None:
        _active = Profile(device)
    try:
        yield
    finally:
        _active = before


class Profile:
    """Seconds by phase, from its making on. A phase inside another is not counted twice.

    device  what is waited for at the borders, unless it is a CPU
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._device = device if device.type != "cpu" else None
        self._phase = "other"
        self._since = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        outer = self._phase
        self._enter(name)
        try:
            yield
        finally:
            self._enter(outer)

    def _enter(self, name: str) -> None:
        if self._device is not None:
            torch.accelerator.synchronize(self._device)
        now = time.perf_counter()
        self.seconds[self._phase] += now - self._since
        self._phase, self._since = name, now

    def summary(self, steps: int) -> dict:
        """Steps, seconds in all, and by phase `seconds`, `share` and, inside of steps, `seconds_per_step`."""
        self._enter(self._phase)
        total = sum(self.seconds.values())
        phases = {}
        for name, seconds in self.seconds.items():
            phases[name] = {"seconds": round(seconds, 4), "share": round(seconds / total, 4)}
            if steps and name in _IN_STEPS:
                phases[name]["seconds_per_step"] = round(seconds / steps, 6)
        return {"steps": steps, "seconds": round(total, 4), "phases": phases}


class ProfileReport:
    """Counts this process's steps; at the end writes profile.json and shows the same as a table, unless quiet."""

    def __init__(self, run: RunDirectory, quiet: bool) -> None:
        self.run, self.quiet = run, quiet
        self.steps = 0

    def observe(self, event: Event) -> None:
        match event:
            case Stepped():
                self.steps += 1
            case Ended() if event.state != "aborted" and _active is not None:
                summary = _active.summary(self.steps)
                self.run.write_json(PROFILE_FILE, summary)
                if not self.quiet:
                    print(table(summary), flush=True)
            case _:
                pass


def table(summary: dict) -> str:
    """The summary for a terminal of 80 columns; phases that took nothing are left out."""
    lines = [f"{'where the time went':<22}{'seconds':>10}{'share':>9}{'ms a step':>12}"]
    for name, of in summary["phases"].items():
        if of["seconds"]:
            step = f"{1000 * of['seconds_per_step']:,.1f}" if "seconds_per_step" in of else "-"
            lines.append(f"{name:<22}{of['seconds']:>10,.2f}{of['share']:>9.1%}{step:>12}")
    return "\n".join([*lines, f"{'in all':<22}{summary['seconds']:>10,.2f}{summary['steps']:>10,} steps"])
