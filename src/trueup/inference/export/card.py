"""README.md of an exported model: what it is made of, on what data and how, how well, and how exactly it was written.

It is what others see of a run, so it has no path of this machine, and of a run's config only keys that are named here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from trueup.training.model_card import HYPERPARAMETERS, METHODS, last_metrics, table
from trueup.training.run_files import public, read_config

_METRICS = ("eval_results.json", "train_results.json")
_UNTOLD = ("runtime", "per_second", "memory", "seconds", "flos")


@dataclass(frozen=True)
class Stage:
    """A run that an export builds on: its config, its results, and how many rows it had."""

    config: Mapping[str, Any]
    results: Mapping[str, Any]
    rows: Mapping[str, Any]


def read_stage(directory: Path) -> Stage | None:
    """The run that wrote a model or an adapter, from its directory or a checkpoint of it."""
    for place in (directory, directory.parent):
        if config := public(read_config(place)):
            results = {key: value for name in _METRICS for key, value in _json(place / name).items()}
            told = {k: v for k, v in results.items() if isinstance(v, float) and not any(word in k for word in _UNTOLD)}
            return Stage(config, {**told, **last_metrics(place)}, _json(place / "data_report.json").get("datasets", {}))
    return None


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def public_name(name: str) -> str:
    """What others may see of a name: the last part of a path, a URL without who asks and for what, a hub's id."""
    if "://" in name:
        parts = urlsplit(name)
        return f"{parts.scheme}://{parts.hostname or ''}{parts.path}"
    path = Path(name).expanduser()
    is_path = path.exists() or path.is_absolute() or name.startswith((".", "~")) or "\\" in name
    return path.name or path.resolve().name if is_path else name


def card(title: str, base: str, stages: Sequence[Stage], facts: Mapping[str, Any], reward: bool, files: str) -> str:
    """The card's text.

    Args:
        stages: the runs behind it, first to last; none is known of what others made.
        facts: how it was written.
        files: what else is in the directory, and how to use it.
    """
    last = stages[-1].config if stages else {}
    names = list(dict.fromkeys(public_name(name) for stage in stages for name in _datasets(stage.config)))
    front = {
        "base_model": base,
        "library_name": "transformers",
        "pipeline_tag": "text-classification" if reward else "text-generation",
        "tags": [tag for tag in ("trueup", last.get("stage")) if tag],
    }
    parts = [
        "---\n" + yaml.safe_dump(front, sort_keys=False, allow_unicode=True) + "---",
        f"# {title}",
        f"From `{base}`" + (f", by {_methods(stages)}" if stages else "") + ". Exported with trueup.",
    ]
    if names:
        parts.append("## Data\n" + "\n".join(f"- `{name}`{_counted(name, stages)}" for name in names))
    for stage in stages:
        method = METHODS.get(str(stage.config.get("stage")), str(stage.config.get("stage")))
        settings = {key: stage.config[key] for key in HYPERPARAMETERS.split() if stage.config.get(key)}
        parts.append(f"## {method.capitalize()}\n" + table(settings, "key"))
        if stage.results:
            parts.append(table(stage.results, "metric"))
    parts += ["## As written\n" + table(facts, ""), "## Use\n" + files]
    return "\n\n".join(parts) + "\n"


def _datasets(config: Mapping[str, Any]) -> list[str]:
    found = config.get("dataset") or []
    return [found] if isinstance(found, str) else list(map(str, found))


def _methods(stages: Sequence[Stage]) -> str:
    return ", then ".join(METHODS.get(str(s.config.get("stage")), str(s.config.get("stage"))) for s in stages)


def _counted(name: str, stages: Sequence[Stage]) -> str:
    for stage in stages:
        for key, entry in stage.rows.items():
            if public_name(str(key)) == name and isinstance(entry, dict) and "kept" in entry:
                return f": {entry['kept']} of {entry.get('read', '?')} rows"
    return ""
