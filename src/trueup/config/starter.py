"""A commented config to start from: the keys people change, with the schema's help beside them."""

from __future__ import annotations

from typing import Any

import yaml

from trueup.config.checks import default_output_dir
from trueup.config.explain import alternative
from trueup.config.methods import STAGES
from trueup.config.names import VALUE_SYNONYMS
from trueup.config.schema import FIELDS
from trueup.errors import ConfigError

DEFAULT_MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
_COLUMN = 32

_METHOD: dict[str, dict[str, Any]] = {
    "pt": {},
    "sft": {},
    "dpo": {"pref_loss": "sigmoid", "pref_beta": 0.1, "pref_ftx": 0.0},
    "kto": {"pref_beta": 0.1, "kto_chosen_weight": 1.0, "kto_rejected_weight": 1.0},
    "orpo": {"pref_beta": 0.1},
    "simpo": {"pref_beta": 2.0, "simpo_gamma": 1.0},
    "cpo": {"pref_beta": 0.1, "pref_ftx": 1.0},
    "rm": {"reward_loss": "bradley_terry", "center_rewards_coefficient": 0.01},
    "ppo": {"reward_model": "saves/rm", "ppo_kl_coeff": 0.05, "max_new_tokens": 256},
    "grpo": {"reward_funcs": ["rewards.py:score"], "num_generations": 8, "max_new_tokens": 256},
    "rloo": {"reward_funcs": ["rewards.py:score"], "num_generations": 4, "max_new_tokens": 256},
    "online_dpo": {"reward_model": "saves/rm", "pref_beta": 0.1, "max_new_tokens": 256},
}
_DATASET = {
    "pt": "pretrain_demo",
    "kto": "kto_en_demo",
    **dict.fromkeys(("dpo", "orpo", "simpo", "cpo", "rm"), "dpo_en_demo"),
}  # others: alpaca_en_demo
_RATE = {"pt": 1e-4, "sft": 1e-4}  # others: 1e-5


def starter(stage: str = "dpo", model: str = DEFAULT_MODEL) -> str:
    """The text of a YAML file that trains `model` at `stage`, and loads without a problem.

    Raises:
        ConfigError: the stage is unknown or not supported yet.
    """
    name = stage.strip().lower()
    stage = VALUE_SYNONYMS["stage"].get(name, name)
    if stage not in STAGES:
        raise ConfigError(f"no stage is called '{stage}'", expected="one of " + ", ".join(STAGES))
    if STAGES[stage].instead:
        fix = alternative(STAGES[stage].instead or "")
        raise ConfigError(f"`stage: {stage}` is not supported yet", fix=fix)
    blocks = "\n".join(_block(title, keys) for title, keys in _sections(stage, model).items())
    return f"# {STAGES[stage].help}\n# trueup check FILE, then trueup train FILE\n\n{blocks}"


def _sections(stage: str, model: str) -> dict[str, dict[str, Any]]:
    return {
        "model": {"model_name_or_path": model, "adapter_name_or_path": []},
        "method": {
            "stage": stage,
            "finetuning_type": "lora",
            "lora_rank": 8,
            "lora_target": "all",
            **_METHOD[stage],
        },
        "data": {"dataset": _DATASET.get(stage, "alpaca_en_demo"), "cutoff_len": 2048, "val_size": 0.1},
        "training": {
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 8,
            "learning_rate": _RATE.get(stage, 1e-5),
            "num_train_epochs": 3.0,
            "lr_scheduler_type": "cosine",
            "warmup_ratio": 0.1,
        },
        "watching": {
            "logging_steps": 5,
            "eval_strategy": "steps",
            "eval_steps": 50,
            "save_steps": 100,
            "plot_loss": True,
        },
        "output": {"output_dir": default_output_dir(model, "lora", stage)},
    }


def _block(title: str, keys: dict[str, Any]) -> str:
    return f"### {title}\n" + "".join(_line(key, value) for key, value in keys.items())


def _line(key: str, value: Any) -> str:
    text = yaml.safe_dump({key: value}, allow_unicode=True).strip()
    comment = str(FIELDS[key].description).split(";")[0].rstrip(".")
    return f"{text:<{_COLUMN}}  # {comment}\n"
