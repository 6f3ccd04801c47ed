"""What the files of a run directory say, for whoever looks at a run: resume, `trueup runs`, cards and curves.

    run.yaml            every key resolved             environment.json   versions, hardware, git
    status.json         state, pid, heartbeat, step    metrics.jsonl      a line per logging step
    trainer_log.jsonl   LLaMA-Factory's keys           data_report.json   kept, dropped, truncated
    checkpoint-N/       see checkpoint.py              booster.json       which layers were faster, if tried
    *_results.json, *.png, README.md at the end

Torch-free, so that listing runs is quick. Reads only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from trueup.config.names import is_secret
from trueup.training import checkpoint as checkpoints
from trueup.training import durable
from trueup.training.run_lock import STATUS_FILE, is_alive

RUN_FILE = "run.yaml"
METRICS_FILE = "metrics.jsonl"
TRAINER_LOG_FILE = "trainer_log.jsonl"

UNFINISHED = ("starting", "running", "stalled")  # states that only a living process can be in


def read_status(path: str | Path) -> dict[str, Any]:
    """status.json of any run, with the state corrected to "killed" when its process is gone."""
    try:
        status = durable.read_json(Path(path) / STATUS_FILE)
    except (OSError, ValueError):
        return {"state": "unknown"}
    if status.get("state") in UNFINISHED and not is_alive(status):
        status["state"] = "killed"
    return status


def read_config(path: str | Path) -> dict[str, Any]:
    """run.yaml of any run; empty if there is none."""
    try:
        return dict(yaml.safe_load((Path(path) / RUN_FILE).read_text(encoding="utf-8")) or {})
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def read_metrics(path: str | Path, name: str = METRICS_FILE) -> list[dict[str, Any]]:
    """Rows of a run's metrics.jsonl; a torn last line is left out."""
    return [json.loads(line) for line in whole_lines(Path(path) / name)]


def telling(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of metrics as a person is shown it: `kl/chosen` in place of a `kl` that counts answers pushed away too,
    which are meant to be far from the reference, thousands of nats in a run that goes well.
    """
    return {name: value for name, value in row.items() if not name.endswith("kl") or row.get(f"{name}/chosen") is None}


def whole_lines(path: Path) -> list[str]:
    """Complete, parseable lines of a log; whatever follows the last newline was torn by a crash."""
    if not path.exists():
        return []
    complete = path.read_bytes().rpartition(b"\n")[0]
    lines = complete.decode("utf-8", errors="replace").split("\n") if complete else []
    return [line for line in lines if _parses(line)]


def is_occupied(path: Path) -> bool:
    """Whether there is anything but hidden files and logs."""
    if not path.is_dir():
        return False
    return any(not entry.name.startswith(".") and entry.name != "logs" for entry in path.iterdir())


def holds_results(path: Path) -> bool:
    """Whether a fresh start here would overwrite a model or strand checkpoints."""
    return bool(list(path.glob("*.safetensors")) or checkpoints.checkpoints(path))


def is_failed_attempt(path: Path) -> bool:
    """Whether a run ended here before it saved anything, so that nothing is lost by running again."""
    ended = read_status(path)["state"] in ("failed", "stopped", "killed")
    return ended and not holds_results(path)


def describe(path: Path) -> str:
    """What is in an occupied directory, in a few words."""
    if not (path / RUN_FILE).exists() and not checkpoints.checkpoints(path):
        return f"files that are no run of trueup ({names_in(path)})"
    status = read_status(path)
    step = status.get("step", max([0, *map(checkpoints.step_of, checkpoints.checkpoints(path))]))
    return f"run {path.name} at step {step} ({status['state']})"


def names_in(path: Path) -> str:
    """The first few names in a directory."""
    names = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    return ", ".join(names[:8]) + (" …" if len(names) > 8 else "") if names else "none"


def public(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as JSON values, without tokens, keys and passwords."""
    kept = {key: value for key, value in config.items() if not is_secret(key)}
    return json.loads(json.dumps(kept, default=str))


def finite(value: Any) -> Any:
    """JSON has no NaN: numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and value - value != 0.0:
        return None
    return value


def _parses(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
