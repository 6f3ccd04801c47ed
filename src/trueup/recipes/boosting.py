"""`booster: auto` of a training: fused layers or the model's own, by trial on this device; part of the run.

The choice stands in run.yaml in place of `auto`, and a resume takes it from there, as it was: the two round
differently. It is kept on the machine too, by what was timed, so that runs of a seed do not differ by chance.
"""

from __future__ import annotations

import hashlib
import json
import logging
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
from trueup.models.load import Loaded
from trueup.models.memory import recompute
from trueup.models.trial import Trial, first_layer, trial_tokens, try_layer
from trueup.recipes.batches import Tokens
from trueup.recipes.budget import begun_with
from trueup.recipes.references import kernels
from trueup.training import durable
from trueup.training.backend import Backend
from trueup.training.run_directory import RunDirectory

log = logging.getLogger("trueup")


@dataclass(frozen=True)
class Choice:
    """What was chosen, for booster.json."""

    booster: str  # fused or attention
    ratio: float | None  # seconds with fused layers over seconds without, in the middle; None where that takes too long
    ratios: Sequence[float]
    tokens: int
    gap: float
    agrees: bool
    earlier: bool = False  # on this machine, by another run

    @classmethod
    def of(cls, trial: Trial) -> Choice:
        booster = "fused" if trial.fused else "attention"
        return cls(booster, trial.ratio, trial.ratios, trial.tokens, trial.gap, trial.agrees)

    def words(self) -> str:
        """For the header."""
        if not self.agrees:
            return f"fused layers give other numbers than this model's ({self.gap:.2g} of their size)"
        when = "an earlier trial" if self.earlier else "a trial"
        if self.ratio is None:
            return f"no time was compared: {when} of one layer took too long"
        return f"fused layers take {self.ratio:.2f} of the time of the model's own by {when} on {self.tokens} tokens"


def as_begun(cfg: RunConfig) -> RunConfig:
    """The config with what a run that is gone on with chose for `auto`; others as they are."""
    kept = begun_with(cfg, "booster")
    return cfg.replace(booster=kept) if cfg.model.booster == "auto" and kept in ("fused", "attention") else cfg


def tried(cfg: RunConfig, loaded: Loaded, tokens: Tokens, backend: Backend) -> tuple[RunConfig, Choice | None]:
    """The config with a choice in place of `auto`, the same on all processes, and the policy as it says.

    A small model and a run that is gone on with keep what they have.
    """
    if cfg.model.booster != "auto" or begun_with(cfg, "model_name_or_path"):
        return cfg, None
    layer = first_layer(loaded.policy)
    if layer is None:
        return cfg, None
    recompute(loaded.policy.base, 0)  # which layers do is decided afterwards
    chosen = backend.gather(_choose(loaded, layer, tokens.largest) if backend.rank == 0 else None)[0]
    loaded.boosted = f"{loaded.boosted}; {chosen.words()}"
    if chosen.booster == "attention":
        if not chosen.agrees:
            log.warning("booster: auto: %s; it trains with its own", chosen.words())
        leave_own_layers(loaded.policy)
        loaded.boosted = f"auto: transformers' own layers; {chosen.words()}"
    return cfg.replace(booster=chosen.booster), chosen


def write_choice(directory: RunDirectory, choice: Choice | None) -> None:
    """booster.json, where there was a choice."""
    if choice is not None:
        directory.write_json("booster.json", asdict(choice))


def _choose(loaded: Loaded, layer: nn.Module, largest: int) -> Choice:
    tokens = trial_tokens(layer, largest, loaded.device)
    path = _place(loaded, layer, tokens)
    with suppress(OSError, ValueError, TypeError):
        return Choice(**{**json.loads(path.read_text(encoding="utf-8")), "earlier": True})
    choice = Choice.of(try_layer(loaded.policy, layer, tokens))
    with suppress(OSError):  # then the next run tries again
        path.parent.mkdir(parents=True, exist_ok=True)
        durable.write_json(path, asdict(choice))
    return choice


def _place(loaded: Loaded, layer: nn.Module, tokens: int) -> Path:
    """Where a choice lies, by what decides it: the layer, the kernels and the number of tokens."""
    dropout = [module.p for module in layer.modules() if isinstance(module, nn.Dropout)]
    weights = [(name, tuple(p.shape), str(p.dtype), p.requires_grad) for name, p in layer.named_parameters()]
    facts = [__version__, transformers.__version__, kernels(loaded.device), type(layer).__name__, weights, dropout]
    key = hashlib.sha256(json.dumps([*facts, tokens, loaded.policy.shared]).encode()).hexdigest()
    root = os.environ.get("TRUEUP_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "trueup")
    return Path(root) / "booster" / f"{key}.json"
