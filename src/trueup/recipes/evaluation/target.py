"""What `trueup eval` is asked to measure: words of a command line → a config. Loads no torch."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trueup.config.evaluating import START, overruled
from trueup.config.load import given, load_config
from trueup.config.schema import RunConfig
from trueup.config.values import listed
from trueup.data.layout import kind_of
from trueup.data.registry import resolve_datasets
from trueup.data.sources import read_rows
from trueup.errors import ConfigError
from trueup.training.run_files import RUN_FILE

log = logging.getLogger("trueup")


def evaluation_config(directories: Sequence[str], source: str | None, words: Sequence[str]) -> RunConfig:
    """The config that a command line asks for.

    Run directories stand for their results beside the start, by the first one's own config; the config of a run that is
    finished stands for its directory. Without a `stage` the rows of the first dataset say what they are.

    Raises:
        ConfigError, DataError: what keeps such an evaluation from being begun.
    """
    extra: list[str] = []
    if directories and source is None and (Path(directories[0]) / RUN_FILE).is_file():
        source = str(Path(directories[0]) / RUN_FILE)
    known, said = given(source, words), given(None, words)
    models = list(directories)
    result = known.get("output_dir") if source and "output_dir" not in said else None
    if not models and "eval_models" not in known and "adapter_name_or_path" not in said and _is_result(result):
        log.info("measuring the result of this run, %s, beside its start; eval_models names others", result)
        models = [str(result)]
    if models and listed(known.get("eval_models")):
        raise ConfigError("models are named twice, as words and in `eval_models`", where="eval_models", fix="drop one")
    if models:
        extra.append("eval_models=" + ",".join([START] * ("model_name_or_path" in known) + models))
    if "output_dir" not in said and (models or result):
        extra.append(f"output_dir={Path(models[-1] if models else str(result)) / 'eval'}")
    extra += overruled(said, known)
    if "stage" not in known and (stage := _stage(known, models)):
        extra.append(f"stage={stage}")
    return load_config(source, [*words, *extra], verb="eval")


#: kind of the rows → the stage whose data they are; a stage of prompts stands for prompts alone.
_STAGES = {"text": "pt", "chat": "sft", "pair": "dpo", "ranking": "dpo", "feedback": "kto", "prompt": "grpo"}


def _stage(known: dict[str, Any], models: Sequence[str]) -> str | None:
    """What the rows of the first dataset, or the kind of the model, say that is to be measured."""
    names = [*models, *listed(known.get("eval_models")), *listed(known.get("adapter_name_or_path"))]
    if any(map(_scores, [*names, str(known.get("model_name_or_path") or "")])):
        return "rm"
    datasets = listed(known.get("eval_dataset")) or listed(known.get("dataset"))
    if not datasets:
        return None
    (spec,) = resolve_datasets([datasets[0]], known.get("dataset_dir") or "data", known.get("hub") or "huggingface")
    return _STAGES[kind_of(spec, read_rows(spec).values)]


def _scores(name: str) -> bool:
    """Whether a directory holds a reward model, whole or as an adapter."""
    for file, key, wanted in (
        ("adapter_config.json", "task_type", "SEQ_CLS"),
        ("config.json", "architectures", "ForSequenceClassification"),
    ):
        path = Path(name) / file
        if name and path.is_file():
            return wanted in str(json.loads(path.read_text(encoding="utf-8")).get(key))
    return False


def _is_result(directory: Any) -> bool:
    return bool(directory) and (
        any((Path(str(directory)) / name).is_file() for name in ("adapter_config.json", "config.json"))
    )
