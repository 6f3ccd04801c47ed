"""README.md of a trained model: what it is, from what, how, and how well, with the front matter
hubs read. What other cards have in common with it is here too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from trueup.training.events import Ended, Event
from trueup.training.run_directory import RunDirectory, read_metrics
from trueup.training.run_files import telling

METHODS = {
    "pt": "pre-training",
    "sft": "supervised fine-tuning",
    "rm": "reward modelling",
    "dpo": "preference optimisation",
    "kto": "Kahneman-Tversky optimisation",
    "ppo": "proximal policy optimisation",
}
HYPERPARAMETERS = (
    "learning_rate lr_scheduler_type warmup_ratio warmup_steps num_train_epochs max_steps "
    "per_device_train_batch_size gradient_accumulation_steps optim weight_decay max_grad_norm seed "
    "cutoff_len rope_scaling neftune_noise_alpha lora_rank lora_alpha lora_target pref_beta pref_loss pref_ftx"
)


def model_card(directory: Path, config: Mapping[str, Any], results: Mapping[str, Any], pictures: list[str]) -> str:
    """The card's text. Numbers only where the run measured them."""
    base = config.get("model_name_or_path") or "unknown"
    adapter = (directory / "adapter_config.json").exists()
    datasets = config.get("dataset") or []
    datasets = [datasets] if isinstance(datasets, str) else list(datasets)
    stage = str(config.get("stage") or "")
    front = {
        "base_model": base,
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-classification" if stage == "rm" else "text-generation",
        "tags": [tag for tag in ("trueup", stage, config.get("finetuning_type")) if tag],
    }
    method = METHODS.get(stage, stage or "training")
    kind = "An adapter for" if adapter else "Trained from"
    parts = [
        "---\n" + yaml.safe_dump(front, sort_keys=False, allow_unicode=True) + "---",
        f"# {directory.name}",
        f"{kind} `{base}`, made with trueup by {method} "
        f"on {', '.join(f'`{name}`' for name in datasets) or 'data that the run does not name'}.",
        *_stretch(directory, base),
        "## Results\n" + table(results, "metric"),
        "## Hyper-parameters\n" + table({k: config[k] for k in HYPERPARAMETERS.split() if config.get(k)}, "key"),
        "Everything else is in `run.yaml`, `environment.json` and `metrics.jsonl`.",
    ]
    parts += [f"![{name}]({name})" for name in pictures]
    return "\n\n".join(parts) + "\n"


def _stretch(directory: Path, base: str) -> list[str]:
    """How peft alone loads an adapter whose base was stretched (`models/rope.py` writes the file); else nothing."""
    path = directory / "rope.json"
    if not path.is_file():
        return []
    after = json.loads(path.read_text(encoding="utf-8"))["after"]
    return [
        "Its base reads positions as `rope.json` says. trueup sees to that; elsewhere, load the base so:\n\n"
        "```python\n"
        f"config = AutoConfig.from_pretrained({base!r}, rope_parameters={after['parameters']}, "
        f"max_position_embeddings={after['positions']})\n"
        f"model = AutoModelForCausalLM.from_pretrained({base!r}, config=config)\n"
        "```"
    ]


def last_metrics(directory: Path) -> dict[str, Any]:
    """What the last logged step of a run says of its preferences."""
    rows = [row for row in read_metrics(directory) if "loss" in row]
    names = ("rewards/accuracies", "rewards/margins", "rewards/chosen", "kl", "kl/chosen")
    last = telling(rows[-1]) if rows else {}
    return {name: last[name] for name in names if last.get(name) is not None}


class ModelCard:
    """Writes README.md when a run has finished."""

    def __init__(self, run: RunDirectory) -> None:
        self.run = run

    def observe(self, event: Event) -> None:
        if not isinstance(event, Ended) or event.state != "finished":
            return
        pictures = ["training_loss.png", "training_rewards_accuracies.png"]
        text = model_card(
            self.run.path,
            self.run.config,
            telling({**event.results, **last_metrics(self.run.path)}),
            [name for name in pictures if (self.run.path / name).exists()],
        )
        self.run.write_text("README.md", text)


def table(values: Mapping[str, Any], heading: str) -> str:
    """Two columns of Markdown: names under `heading`, and their values."""
    rows = [f"| {key} | {_short(value)} |" for key, value in values.items()]
    return "\n".join([f"| {heading} | value |", "|---|---|", *rows])


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
