"""What moves the weights."""

from __future__ import annotations

from trueup.config import optimizers
from trueup.config.rules.rule import Rule

RULES = [
    Rule(
        (*optimizers.SWITCHED, "optim"),
        optimizers.contradicts,
        "one run has one optimizer",
        f"keep one of {', '.join(optimizers.SWITCHED)}, or set optim alone",
    ),
    Rule(
        ("optim_args", "use_galore", "use_apollo"),
        optimizers.given_twice,
        "`optim_args` and the optimizer's own keys (galore_…, apollo_…) say different things",
        "drop optim_args",
    ),
    Rule(
        ("optim_args", "optim"),
        optimizers.bad_arguments,
        "`optim_args` holds a name or a value that this `optim` does not take",
        "write name=value,name=value; "
        + "; ".join(
            f"{name}: {', '.join(row.arguments)}"
            for name, row in optimizers.OPTIMIZERS.items()
            if row.arguments and name in ("sgd", "adafactor", "adamw_8bit", "galore_adamw", "apollo_adamw", "muon")
        ),
    ),
    Rule(
        ("optim", *optimizers.SWITCHED, "finetuning_type"),
        lambda c: (
            c.finetuning_type not in ("full", "freeze")
            and c.optim in optimizers.OPTIMIZERS
            and optimizers.OPTIMIZERS[c.optim].whole_weights
        ),
        "GaLore, APOLLO and Adam-mini save moments of the model's own matrices, and adapters are small as they are",
        "set finetuning_type: full or freeze, or optim: adamw_torch",
    ),
    Rule(
        ("optim", "lr_scheduler_type"),
        lambda c: c.optim.startswith("schedule_free") and c.lr_scheduler_type != "constant",
        "a schedule-free optimizer takes no schedule: it averages weights instead",
        "drop lr_scheduler_type; warmup_steps still acts",
    ),
    Rule(
        ("optim", "warmup_steps", "warmup_ratio"),
        lambda c: c.optim == "schedule_free_radam" and (c.warmup_steps or c.warmup_ratio),
        "schedule_free_radam warms up by itself",
        "drop warmup_steps and warmup_ratio, or set optim: schedule_free_adamw",
    ),
    Rule(
        ("optim", "load_best_model_at_end", "save_only_model"),
        lambda c: c.optim.startswith("schedule_free") and c.load_best_model_at_end and c.save_only_model,
        "the best weights of a schedule-free run are made with its optimizer's state, and `save_only_model` drops that",
        "drop save_only_model",
    ),
    Rule(
        ("layer_lr_decay",),
        lambda c: c.layer_lr_decay is not None and c.layer_lr_decay > 1,
        "`layer_lr_decay` above 1 would train the lowest layers fastest",
        "set it between 0 and 1, such as 0.9",
    ),
    Rule(
        ("lr_multipliers",),
        lambda c: any(
            isinstance(v, bool) or not isinstance(v, int | float) or v < 0 for v in c.lr_multipliers.values()
        ),
        "`lr_multipliers` maps parts of parameters' names to numbers",
        "write lr_multipliers: {embed_tokens: 0.1}",
    ),
]
