"""A run, by the recipe of its stage. Recipes are imported when they are needed: each brings other things along."""

from __future__ import annotations

from rich.console import Console

from trueup.config.methods import ONLINE
from trueup.config.schema import RunConfig
from trueup.recipes.offline import RunResult


def run(cfg: RunConfig, console: Console | None = None) -> RunResult:
    """Train, evaluate or predict, as a config says. Raises what the recipes raise."""
    if cfg.objective.stage in ONLINE and (cfg.train.do_train or cfg.train.do_eval):
        from trueup.recipes import online

        return online.run(cfg, console)
    from trueup.recipes import offline

    return offline.run(cfg, console)
