"""`booster: auto` of a training: fused layers or the model's own, by trial on this device; part of the run.

The choice stands in run.yaml in place of `auto`, and a resume takes it from there, as it was: the two round
differently. The times are kept on the machine too, by what decides them, so that runs of a seed do not differ by
chance; whether the two give the same numbers is found out at every load (models/booster.py).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import transformers
from torch import nn

from trueup import __version__
from trueup.config.schema import RunConfig
from trueup.models.booster import leave_own_layers
from trueup.models.fused import own_class
from trueup.models.load import Loaded
from trueup.models.memory import recompute
from trueup.models.trial import Trial, time_layer, timed_layer, trial_tokens
from trueup.recipes.budget import begun_with
from trueup.recipes.references import kernels
from trueup.training import durable
from trueup.training.backend import Backend
from trueup.training.environment import cpu_name
from trueup.training.run_directory import RunDirectory

log = logging.getLogger("trueup")

#: Of how layers are tried, and of what is in fused ones: times by another are not taken.
RULE = 2


@dataclass(frozen=True)
class Choice:
    """What was chosen, for booster.json."""

    booster: str  # fused or attention
    agrees: bool = True
    gap: float | None = None  # of fused layers to the model's own; None where it is infinite or was not compared
    tokens: int | None = None  # of a timed pass
    ratio: float | None = None  # seconds with fused layers over seconds without, in the middle; None without a verdict
    ratios: Sequence[float] = ()
    seconds: Sequence[tuple[float, float]] = ()  # with fused layers and without, pair by pair
    earlier: str | None = None  # the file that an earlier run on this machine left them in
    failed: str | None = None

    def words(self) -> str:
        """For the header."""
        if self.failed:
            return f"the trial of its layers failed ({self.failed})"
        when = "an earlier trial" if self.earlier else "a trial"
        if self.ratio is None:
            return f"no time was compared: {when} of one layer took too long"
        return f"fused layers take {self.ratio:.2f} of the time of the model's own by {when} on {self.tokens} tokens"


def as_begun(cfg: RunConfig) -> RunConfig:
    """The config with what a run that is gone on with chose for `auto`; others as they are."""
    kept = begun_with(cfg, "booster")
    return cfg.replace(booster=kept) if cfg.model.booster == "auto" and kept in ("fused", "attention") else cfg


def tried(cfg: RunConfig, loaded: Loaded, backend: Backend) -> tuple[RunConfig, Choice | None]:
    """The config with a choice in place of `auto`, the same on all processes, and the policy as it says.

    A small model and a run that is gone on with keep what they have.
    """
    policy, asked = loaded.policy, cfg.model.booster
    if asked not in ("auto", "fused"):
        return cfg, None
    gap = policy.gap if policy.gap is not None and math.isfinite(policy.gap) else None
    if not all(backend.gather(policy.boosted)):
        if policy.boosted:  # another process's device may round otherwise
            leave_own_layers(policy)
            loaded.boosted = f"{asked}: transformers' own layers; fused ones give other numbers in another process"
        return cfg.replace(booster="attention"), Choice("attention", False, gap)
    layer = None if asked == "fused" or begun_with(cfg, "model_name_or_path") else timed_layer(policy)
    if layer is None:
        return cfg, None
    recompute(policy.base, 0)  # which layers do is decided afterwards
    chosen = backend.gather(_choose(loaded, layer, gap) if backend.rank == 0 else None)[0]
    loaded.boosted = f"{loaded.boosted}; {chosen.words()}"
    if chosen.failed:
        log.warning("booster: auto: %s; it trains with fused layers", chosen.words())
    if chosen.booster == "attention":
        leave_own_layers(policy)
        loaded.boosted = f"auto: transformers' own layers; {chosen.words()}"
    return cfg.replace(booster=chosen.booster), chosen


def write_choice(directory: RunDirectory, choice: Choice | None) -> None:
    """booster.json, where there was a choice."""
    if choice is not None:
        directory.write_json("booster.json", asdict(choice))


def _choose(loaded: Loaded, layer: nn.Module, gap: float | None) -> Choice:
    """By the times of an earlier run, or of a trial; whatever is wrong with that, the run would have trained."""
    try:
        path = _place(loaded, layer)
        seconds = _kept(path)
        trial = Trial(trial_tokens(layer, loaded.device), seconds) if seconds else time_layer(loaded.policy, layer)
        if not seconds:
            with suppress(OSError):  # then the next run tries again
                path.parent.mkdir(parents=True, exist_ok=True)
                durable.write_json(path, {"seconds": trial.seconds})
        booster, earlier = "fused" if trial.fused else "attention", str(path) if seconds else None
        return Choice(booster, True, gap, trial.tokens, trial.ratio, trial.ratios, trial.seconds, earlier)
    except Exception as error:
        return Choice("fused", True, gap, failed=f"{type(error).__name__}: {error}")


def _kept(path: Path) -> tuple[tuple[float, float], ...]:
    """Times that an earlier run left; none where the file is not there, or is not such a file."""
    try:
        pairs = json.loads(path.read_text(encoding="utf-8"))["seconds"]
        seconds = tuple((float(fused), float(own)) for fused, own in pairs)
    except (OSError, ValueError, TypeError, KeyError):
        return ()
    return seconds if all(0 < each < math.inf for pair in seconds for each in pair) else ()


def _place(loaded: Loaded, layer: nn.Module) -> Path:
    """Where times lie, by what decides them: the layer, the kernels and the machine."""
    kinds = [(name, own_class(module)) for name, module in layer.named_modules()]
    classes = [(name, kind.__module__, kind.__qualname__) for name, kind in kinds]
    dropout = [module.p for module in layer.modules() if isinstance(module, nn.Dropout)]
    weights = [(name, tuple(p.shape), str(p.dtype), p.requires_grad) for name, p in layer.named_parameters()]
    versions = [RULE, __version__, transformers.__version__, kernels(loaded.device), cpu_name()]
    facts = [*versions, classes, weights, dropout, loaded.policy.shared]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    root = os.environ.get("TRUEUP_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "trueup")
    return Path(root) / "booster" / f"{key}.json"
