"""Which optimizers there are, by transformers' names: what each is, where it comes from and what `optim_args` it takes;
and LLaMA-Factory's switches (`use_galore` …), which mean one of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trueup.config.schema import RunConfig
from trueup.config.values import words

ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")


@dataclass(frozen=True)
class Optimizer:
    """One value of `optim`."""

    help: str
    package: str | None = None  # to be imported; None: torch or transformers, which are always there
    install: str = ""  # what pip installs for it
    reads: tuple[str, ...] = ADAM
    arguments: dict[str, type] = field(default_factory=dict)  # of optim_args
    whole_weights: bool = False  # for matrices of the model, not for adapters
    projects: bool = False  # works on optim_target_modules


_QUANT = 'pip install "trueup[quant]"'
_EXTRA = 'pip install "trueup[optim]"'
_BETAS = ADAM[:2]
_PROJECTION = {"rank": int, "update_proj_gap": int, "scale": float, "proj_type": str}
_AVERAGED = {"r": float, "weight_lr_power": float}


def _of_bitsandbytes() -> dict[str, Optimizer]:
    eight, paged = "with moments in 8 bits", "which move to the host when a GPU is full"
    rows = {
        "adamw_bnb_8bit": f"AdamW {eight}",
        "adamw_8bit": f"AdamW {eight} (the same as adamw_bnb_8bit)",
        "paged_adamw_8bit": f"AdamW {eight}, {paged}",
        "paged_adamw_32bit": f"AdamW with moments {paged}",
        "lion_32bit": "Lion: the sign of one moment",
        "lion_8bit": f"Lion {eight}",
        "paged_lion_32bit": f"Lion with moments {paged}",
        "paged_lion_8bit": f"Lion {eight}, {paged}",
        "ademamix": "AdEMAMix: Adam with a second, slow moment",
        "ademamix_8bit": f"AdEMAMix {eight}",
        "paged_ademamix_32bit": f"AdEMAMix with moments {paged}",
        "paged_ademamix_8bit": f"AdEMAMix {eight}, {paged}",
        "rmsprop_bnb": "RMSprop",
        "rmsprop_bnb_8bit": f"RMSprop {eight}",
        "rmsprop_bnb_32bit": "RMSprop (the same as rmsprop_bnb)",
    }

    def made(name: str) -> Optimizer:
        arguments: dict[str, type] = {} if "rmsprop" in name else {"min_8bit_size": int}
        reads = _BETAS if "lion" in name else ("adam_epsilon",) if "rmsprop" in name else ADAM
        if "ademamix" in name:
            arguments |= {"beta3": float, "alpha": float}
        if "rmsprop" in name:
            arguments |= {"alpha": float, "min_8bit_size": int}
        return Optimizer(rows[name], "bitsandbytes", _QUANT, reads, arguments)

    return {name: made(name) for name in rows}


OPTIMIZERS: dict[str, Optimizer] = {
    "adamw_torch": Optimizer("AdamW, fused"),
    "adamw_torch_fused": Optimizer("AdamW, fused (the same as adamw_torch)"),
    "sgd": Optimizer("gradient descent", reads=(), arguments={"momentum": float, "dampening": float, "nesterov": bool}),
    "adagrad": Optimizer("Adagrad", reads=("adam_epsilon",), arguments={"lr_decay": float}),
    "rmsprop": Optimizer(
        "RMSprop", reads=("adam_epsilon",), arguments={"momentum": float, "alpha": float, "centered": bool}
    ),
    "adafactor": Optimizer(
        "Adafactor: one moment a row and a column", reads=(), arguments={"decay_rate": float, "clip_threshold": float}
    ),
    "muon": Optimizer(
        "Muon: orthogonal steps for the layers' matrices, AdamW for all else",
        arguments={"momentum": float, "nesterov": bool, "ns_steps": int},
    ),
    **_of_bitsandbytes(),
    "galore_adamw": Optimizer(
        "GaLore: AdamW's moments of gradients projected to a low rank", "galore_torch", _EXTRA,
        arguments=_PROJECTION, whole_weights=True, projects=True,
    ),
    "galore_adafactor": Optimizer(
        "GaLore with Adafactor", "galore_torch", _EXTRA, (), _PROJECTION, whole_weights=True, projects=True
    ),
    "apollo_adamw": Optimizer(
        "APOLLO: gradients scaled by moments of a random projection", "apollo_torch", _EXTRA,
        arguments={**_PROJECTION, "proj": str, "scale_type": str, "scale_front": bool},
        whole_weights=True, projects=True,
    ),
    "adam_mini": Optimizer(
        "Adam-mini: one second moment a head or a neuron", "adam_mini", _EXTRA, whole_weights=True
    ),
    "schedule_free_adamw": Optimizer(
        "AdamW that averages its weights instead of lowering the rate", "schedulefree", _EXTRA, arguments=_AVERAGED
    ),
    "schedule_free_radam": Optimizer(
        "the same, which warms up by itself", "schedulefree", _EXTRA, arguments=_AVERAGED
    ),
    "schedule_free_sgd": Optimizer(
        "gradient descent that averages its weights", "schedulefree", _EXTRA, (), {"momentum": float, **_AVERAGED}
    ),
}  # fmt: skip

_LAYERWISE = "the same name without _layerwise: gradients are clipped and checked as a whole before a step"
_UNKEPT = "its package is not kept up; adamw_torch"
#: names of transformers' that are not taken → why, and what to use.
REFUSED_OPTIMIZERS: dict[str, str] = {
    **dict.fromkeys(
        words("galore_adamw_layerwise galore_adamw_8bit_layerwise galore_adafactor_layerwise apollo_adamw_layerwise"),
        _LAYERWISE,
    ),
    "galore_adamw_8bit": "galore_adamw, or adamw_8bit: galore-torch's 8-bit class no longer fits bitsandbytes",
    **dict.fromkeys(
        words("adamw_torch_8bit adamw_torch_4bit"), "adamw_8bit: torchao's moments cannot be kept as plain tensors"
    ),
    **dict.fromkeys(words("lomo adalomo"), "adafactor: LOMO steps inside the backward, before gradients are checked"),
    **dict.fromkeys(words("adamw_anyprecision grokadamw"), _UNKEPT),
    "stable_adamw": "adamw_torch with max_grad_norm",
    "adamw_torch_xla": "adamw_torch: trueup does not run on TPUs",
    "adamw_torch_npu_fused": "adamw_torch",
}

#: where LoRA+'s rate of adapted embeddings acts; few adapters have such.
LORA_PLUS_EMBEDDINGS = r"\.lora_embedding_B\."

_PLAIN = ("adamw_torch", "adamw_torch_fused")
#: LLaMA-Factory's switch → what it makes of `optim`.
SWITCHED: dict[str, dict[str, str]] = {
    "use_galore": {**dict.fromkeys(_PLAIN, "galore_adamw"), "adafactor": "galore_adafactor"},
    "use_apollo": dict.fromkeys(_PLAIN, "apollo_adamw"),
    "use_muon": dict.fromkeys(_PLAIN, "muon"),
    "use_adam_mini": dict.fromkeys(_PLAIN, "adam_mini"),
}
_KEYS_OF_SWITCH = {
    "use_galore": {
        "rank": "galore_rank",
        "update_proj_gap": "galore_update_interval",
        "scale": "galore_scale",
        "proj_type": "galore_proj_type",
    },
    "use_apollo": {
        "rank": "apollo_rank",
        "update_proj_gap": "apollo_update_interval",
        "scale": "apollo_scale",
        "proj": "apollo_proj",
        "proj_type": "apollo_proj_type",
        "scale_type": "apollo_scale_type",
        "scale_front": "apollo_scale_front",
    },
}
_TARGETS = {"use_galore": "galore_target", "use_apollo": "apollo_target"}


def switched(cfg: RunConfig) -> dict[str, Any]:
    """`optim`, `optim_args`, `optim_target_modules` and `lr_multipliers` as switches of other names mean them.

    What contradicts itself stays as it is: a rule names it.
    """
    changes: dict[str, Any] = {}
    on = [name for name in SWITCHED if cfg[name]]
    if len(on) == 1 and (optim := _meant(on[0], cfg.train.optim)):
        changes["optim"] = optim
        if args := ",".join(f"{name}={_written(cfg[key])}" for name, key in _KEYS_OF_SWITCH.get(on[0], {}).items()):
            changes["optim_args"] = cfg.train.optim_args or args
        if on[0] in _TARGETS:
            changes["optim_target_modules"] = cfg.train.optim_target_modules or cfg[_TARGETS[on[0]]]
    name = changes.get("optim", cfg.train.optim)
    if name.startswith("schedule_free") and "lr_scheduler_type" not in cfg.explicit:
        changes["lr_scheduler_type"] = "constant"
    if cfg.tuning.finetuning_type == "lora" and (ratio := cfg.tuning.loraplus_lr_ratio):
        embedding = cfg.tuning.loraplus_lr_embedding / cfg.train.learning_rate
        changes["lr_multipliers"] = {
            r"\.lora_B\.": ratio, LORA_PLUS_EMBEDDINGS: embedding, **cfg.train.lr_multipliers
        }  # fmt: skip
    return changes


def _meant(switch: str, optim: str) -> str | None:
    """The optimizer a switch makes of `optim`; None where the two contradict each other."""
    made = SWITCHED[switch]
    return optim if optim in made.values() else made.get(optim)


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def contradicts(c: Any) -> bool:
    """Whether more than one optimizer is asked for. `c` has all keys as attributes."""
    on = [name for name in SWITCHED if getattr(c, name)]
    return len(on) > 1 or (len(on) == 1 and c.optim not in SWITCHED[on[0]].values())


def given_twice(c: Any) -> bool:
    """Whether `optim_args` says something else than the switch's own keys."""
    on = [name for name in _KEYS_OF_SWITCH if getattr(c, name)]
    if len(on) != 1 or contradicts(c):
        return False
    expected = {name: _written(getattr(c, key)) for name, key in _KEYS_OF_SWITCH[on[0]].items()}
    try:
        return {k: v.lower() for k, v in split_arguments(c.optim_args or "").items()} != expected
    except ValueError:
        return True


def split_arguments(text: str) -> dict[str, str]:
    """`name=value,name=value` as a mapping. Raises ValueError where a part is not of that form."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    return {name.strip(): value.strip() for name, value in (part.split("=") for part in parts)}


def read_arguments(optim: str, text: str | None) -> dict[str, Any]:
    """`optim_args` with the types its optimizer wants.

    Raises:
        ValueError: a name it does not take, or a value of another type; the message says which it takes.
    """
    known = OPTIMIZERS[optim].arguments
    values: dict[str, Any] = {}
    for name, value in split_arguments(text or "").items():
        if name not in known:
            takes = ", ".join(known) or "nothing"
            raise ValueError(f"{name}: {optim} takes {takes}")
        if known[name] is bool:
            if value.lower() not in ("true", "false"):
                raise ValueError(f"{name}={value}: true or false")
            values[name] = value.lower() == "true"
        else:
            values[name] = known[name](value)
    return values


def bad_arguments(c: Any) -> bool:
    """Whether `optim_args` cannot be read for its optimizer."""
    if c.optim not in OPTIMIZERS:
        return False  # said elsewhere
    try:
        read_arguments(c.optim, c.optim_args)
    except ValueError:
        return True
    return False


def reading(key: str) -> tuple[str, ...]:
    """The optimizers that read a key."""
    return tuple(name for name, row in OPTIMIZERS.items() if key in row.reads)
