"""What is about to run, in a few lines a person reads before it starts."""

from __future__ import annotations

from trueup.config.schema import RunConfig
from trueup.data.encode import Prepared
from trueup.models.load import Loaded
from trueup.recipes.batches import Arithmetic
from trueup.recipes.program import objective_of, objective_parameters


def header(cfg: RunConfig, loaded: Loaded, prepared: Prepared, arithmetic: Arithmetic) -> str:
    """What is about to run, in a few lines."""
    a = arithmetic
    start = {True: "continuing its adapter", False: "a new adapter on top of"}
    begun = ""
    if loaded.starts:
        how = start[loaded.adapters.continued] if loaded.adapters else "merged with"
        begun = f", {how} {', '.join(loaded.starts)}"
    lines = {
        "model": f"{loaded.base_name}{begun}",
        "training": f"{cfg.tuning.finetuning_type}, {loaded.num_trainable:,} of {loaded.num_parameters:,} parameters",
        "objective": describe_objective(cfg),
        "batch": f"{a.rows_per_micro_batch} × {a.accumulation} accumulation × {a.world_size} processes = "
        f"{a.rows_per_step} rows a step; {a.total_steps:,} steps, {a.epochs} epochs of {a.examples:,} rows",
        "device": _device(loaded),
        "template": prepared.template.name,
        "output": str(cfg.train.output_dir),
    }
    return _aligned(lines)


def evaluation_header(cfg: RunConfig, loaded: Loaded, prepared: Prepared) -> str:
    """The same for a run that only evaluates."""
    sets = ", ".join(f"{name} ({len(dataset):,} rows)" for name, dataset in prepared.eval.items())
    lines = {
        "model": " + ".join([loaded.base_name, *loaded.starts]),
        "objective": describe_objective(cfg),
        "data": sets,
        "device": _device(loaded),
        "template": prepared.template.name,
        "output": str(cfg.train.output_dir),
    }
    return _aligned(lines)


def _device(loaded: Loaded) -> str:
    sharing = f"not shared: {loaded.layout_note}" if loaded.layout_note else "shared"
    return f"{loaded.device}, {str(loaded.dtype).removeprefix('torch.')}, prompts {sharing}"


def _aligned(lines: dict[str, str]) -> str:
    return "\n".join(f"{name:<10}{text}" for name, text in lines.items())


def describe_objective(cfg: RunConfig) -> str:
    """The objective and its parameters, as the header shows them."""
    objective = objective_of(cfg)
    settings = objective_parameters(cfg, objective) | (
        {"pref_ftx": cfg.objective.pref_ftx} if cfg.objective.pref_ftx else {}
    )
    shown = ", ".join(f"{name} {value}" for name, value in settings.items())
    return f"{cfg.objective.stage}: {objective.name}" + (f" ({shown})" if shown else "")
