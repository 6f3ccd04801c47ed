"""How each tool is told to do the same DPO run, and where it writes what it did.

A variant is a tool's name and what differs from it as installed: `-nockpt` gradient checkpointing off, `-malloc`
with our allocator settings, `-cached` reference log-probabilities computed beforehand and the second epoch measured.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.environments import RECIPES, python_of
from benchmarks.measure import ALLOCATOR, WORK, Usage, environment, read_json, read_json_lines, run

PEERS = Path(__file__).parent / "peers"
SUFFIXES = ("nockpt", "malloc", "cached", "4bit", "8bit")

#: Everything that decides the numbers, in transformers' names.
COMMON = {
    "num_train_epochs": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 5e-6,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "logging_steps": 1,
    "seed": 42,
}
LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0}
BETA = 0.1


@dataclass(frozen=True)
class Job:
    """One DPO run, whoever does it."""

    model: Path
    data: Path  # the directory that `workloads.prepare` wrote
    batch: int
    max_length: int
    epochs: float = 1
    bf16: bool = True
    shuffle: bool = False
    seed: int = 42
    max_steps: int = -1
    learning_rate: float = COMMON["learning_rate"]
    adapter: Path | None = None  # start from these LoRA weights instead of random ones

    @property
    def arguments(self) -> dict[str, Any]:
        """transformers' TrainingArguments, but for paths and devices."""
        return COMMON | {
            "per_device_train_batch_size": self.batch,
            "num_train_epochs": self.epochs,
            "max_steps": self.max_steps,
            "bf16": self.bf16,
            "seed": self.seed,
            "learning_rate": self.learning_rate,
        }


@dataclass(frozen=True)
class Outcome:
    """What a run measured and logged."""

    seconds: float  # of one epoch of training: before its first step to after its last, logging included
    usage: Usage  # of the whole process
    steps: list[dict[str, float]]  # the log of that epoch, one row a step: loss, grad_norm, logps/chosen …


@dataclass(frozen=True)
class Variant:
    name: str
    tool: str
    traits: frozenset[str]


def variant(name: str) -> Variant:
    """Read a variant's name. Raises ValueError if nobody is called so."""
    words = name.split("-")
    tool = "-".join(word for word in words if word not in SUFFIXES)
    if tool not in TOOLS:
        raise ValueError(f"{name}: expected one of {', '.join(TOOLS)}, with {', '.join('-' + s for s in SUFFIXES)}")
    return Variant(name, tool, frozenset(words) & set(SUFFIXES))


def perform(who: Variant, job: Job, threads: int | None = None, directory: Path | None = None) -> Outcome:
    """Do the job in a process of its own, from an empty directory, which is kept if it fails.

    Raises:
        Failed: the tool did not get through.
    """
    directory = directory or WORK / who.name
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    if cached := "cached" in who.traits:
        job = replace(job, epochs=2)
    command, read = TOOLS[who.tool](who, job, directory)
    extra = dict(RECIPES[who.tool].variables) if who.tool in RECIPES else {}
    extra |= ALLOCATOR if "malloc" in who.traits else {}
    usage = run(command, directory / "log.txt", environment(extra, threads=threads), cwd=directory)
    seconds, steps = read(directory)
    shutil.rmtree(directory)
    if cached:
        half = len(steps) // 2
        seconds, steps = steps[-1]["time"] - steps[half - 1]["time"], steps[half:]
    return Outcome(seconds, usage, steps)


Read = Callable[[Path], tuple[float, list[dict[str, float]]]]


def trueup(who: Variant, job: Job, directory: Path) -> tuple[list, Read]:
    config = job.arguments | {
        "model_name_or_path": str(job.model),
        "stage": "dpo",
        "finetuning_type": "lora",
        "lora_rank": LORA["r"],
        "lora_alpha": LORA["lora_alpha"],
        "lora_target": "all",
        "pref_beta": BETA,
        "precompute_ref_log_probs": "cached" in who.traits,
        "dataset": str(job.data / "trl.jsonl"),
        "cutoff_len": job.max_length,
        "disable_shuffling": not job.shuffle,
        "save_strategy": "no",
        "plot_loss": False,
        "output_dir": str(directory / "out"),
    }
    if job.adapter:
        config["adapter_name_or_path"] = str(job.adapter)
    if "nockpt" in who.traits:
        config["gradient_checkpointing"] = False
    if bits := who.traits & {"4bit", "8bit"}:
        config["quantization_bit"] = int(min(bits)[0])
    return [sys.executable, "-m", "trueup", "train", _write(config, directory / "dpo.yaml")], _read_trueup


def _read_trueup(directory: Path) -> tuple[float, list[dict[str, float]]]:
    steps = [row for row in read_json_lines(directory / "out" / "metrics.jsonl") if "loss" in row]
    return whole_loop(steps), steps


def whole_loop(steps: list[dict[str, float]]) -> float:
    """Seconds of trueup's loop as transformers counts its own (`train_runtime`), from a log of every step.

    trueup's `train_runtime` leaves out evaluating and saving, and the writing of the last row.
    """
    return steps[-1]["time"] - (steps[0]["time"] - steps[0]["seconds"])


def trl(who: Variant, job: Job, directory: Path) -> tuple[list, Read]:
    settings = {
        "model": str(job.model),
        "data": str(job.data / "trl.jsonl"),
        "dtype": "bfloat16" if job.bf16 else "float32",
        "shuffle": job.shuffle,
        "lora": LORA,
        "adapter": job.adapter and str(job.adapter),
        "arguments": job.arguments
        | {
            "beta": BETA,
            "max_length": job.max_length,
            "gradient_checkpointing": "nockpt" not in who.traits,
            "precompute_ref_log_probs": "cached" in who.traits,
            "output_dir": str(directory),
        },
    }
    return [python_of("trl"), PEERS / "trl_dpo.py", _write(settings, directory / "settings.json")], _read_trl


def _read_trl(directory: Path) -> tuple[float, list[dict[str, float]]]:
    return _split(read_json(directory / "result.json")["log"])


def llamafactory(who: Variant, job: Job, directory: Path) -> tuple[list, Read]:
    config = job.arguments | {
        "model_name_or_path": str(job.model),
        "stage": "dpo",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": LORA["r"],
        "lora_alpha": LORA["lora_alpha"],
        "lora_target": "all",
        "pref_beta": BETA,
        "dataset": "bench",
        "dataset_dir": str(job.data),
        "cutoff_len": job.max_length,
        "disable_shuffling": not job.shuffle,
        "disable_gradient_checkpointing": "nockpt" in who.traits,
        "use_cpu": not shutil.which("nvidia-smi"),
        "save_strategy": "no",
        "report_to": "none",
        "overwrite_cache": True,
        "output_dir": str(directory / "out"),
    }
    command = [python_of("llamafactory"), "-m", "llamafactory.cli", "train", _write(config, directory / "dpo.yaml")]
    return command, _read_llamafactory


def _read_llamafactory(directory: Path) -> tuple[float, list[dict[str, float]]]:
    return _split(read_json(directory / "out" / "trainer_state.json")["log_history"])


def ms_swift(who: Variant, job: Job, directory: Path) -> tuple[list, Read]:
    options = job.arguments | {
        "rlhf_type": "dpo",
        "model": job.model,
        "model_type": "qwen2",
        "template": "bench",
        "external_plugins": PEERS / "swift_template.py",
        "tuner_type": "lora",
        "lora_rank": LORA["r"],
        "lora_alpha": LORA["lora_alpha"],
        "lora_dropout": LORA["lora_dropout"],
        "target_modules": "all-linear",
        "torch_dtype": "bfloat16" if job.bf16 else "float32",
        "beta": BETA,
        "dataset": job.data / "swift.jsonl",
        "max_length": job.max_length,
        "dataset_shuffle": job.shuffle,
        "train_dataloader_shuffle": job.shuffle,
        "gradient_checkpointing": "nockpt" not in who.traits,
        "use_cpu": not shutil.which("nvidia-smi"),
        "save_strategy": "no",
        "report_to": "none",
        "check_model": False,  # or it asks a hub whether the directory is up to date
        "add_version": False,
        "output_dir": directory / "out",
    }
    words = [word for name, value in options.items() for word in (f"--{name}", _word(value))]
    return [python_of("ms-swift").parent / "swift", "rlhf", *words], _read_ms_swift


def _read_ms_swift(directory: Path) -> tuple[float, list[dict[str, float]]]:
    return _split(read_json_lines(directory / "out" / "logging.jsonl"))


TOOLS: Mapping[str, Callable[[Variant, Job, Path], tuple[list, Read]]] = {
    "trueup": trueup,
    "trl": trl,
    "llamafactory": llamafactory,
    "ms-swift": ms_swift,
}


def _split(log: list[dict[str, Any]]) -> tuple[float, list[dict[str, float]]]:
    """transformers' log → its own run time, and the rows of single steps as numbers."""
    seconds = next(row["train_runtime"] for row in reversed(log) if "train_runtime" in row)
    steps = [row for row in log if "loss" in row]
    return _number(seconds), [{name: _number(value) for name, value in row.items()} for row in steps]


def _number(value: Any) -> Any:
    """Some transformers log numbers as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _write(settings: Mapping[str, Any], path: Path) -> Path:
    """As JSON, which YAML readers read too."""
    path.write_text(json.dumps(settings, indent=1), encoding="utf-8")
    return path
