"""What `trueup check` says a run will take, against the peak of the run itself, each in a process of its own (CPU).

python -m benchmarks.planned                 # all twelve, in about ten minutes of one core
python -m benchmarks.planned --only "dpo lora bf16" "rm lora fp32"
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

from trueup.builtin import builtin_path
from trueup.config.load import load_config
from trueup.recipes.check import check

SHAPES = {
    "qwen": Qwen2Config(
        vocab_size=16384, hidden_size=512, intermediate_size=2048, num_hidden_layers=10, num_attention_heads=8,
        num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    ),
    "llama": LlamaConfig(
        vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=12,
        num_key_value_heads=12, tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    ),
}  # fmt: skip
FULL = {"finetuning_type": "full", "learning_rate": 1e-6}
#: name → shape, and the keys that matter for memory.
RUNS: dict[str, tuple[str, dict]] = {
    "dpo lora bf16": ("qwen", {"stage": "dpo", "bf16": True}),
    "dpo lora fp32": ("qwen", {"stage": "dpo", "bf16": False}),
    "dpo lora fp32, all recompute": ("qwen", {"stage": "dpo", "bf16": False, "gradient_checkpointing": "full"}),
    "dpo full fp32": ("qwen", {"stage": "dpo", "bf16": False, **FULL}),
    "dpo full bf16": ("llama", {"stage": "dpo", "bf16": True, **FULL}),
    "dpo lora bf16, dropout": ("llama", {"stage": "dpo", "bf16": True, "lora_dropout": 0.1}),
    "dpo full fp32, live reference": (
        "qwen", {"stage": "dpo", "bf16": False, "precompute_ref_log_probs": False, **FULL},
    ),
    "dpo freeze fp32": ("llama", {"stage": "dpo", "bf16": False, "finetuning_type": "freeze"}),
    "sft full fp32": ("llama", {"stage": "sft", "bf16": False, **FULL}),
    "sft lora fp32, eight rows": ("llama", {"stage": "sft", "bf16": False, "per_device_train_batch_size": 8}),
    "kto lora bf16": ("qwen", {"stage": "kto", "bf16": True}),
    "rm lora fp32": ("llama", {"stage": "rm", "bf16": False}),
}  # fmt: skip


def data(stage: str, directory: Path) -> str:
    """Rows of letters, which the built-in tokenizer takes one by one, in a file of the stage's kind."""
    draw = random.Random(0)

    def text(size: int) -> str:
        return "".join(draw.choice("qwxzjkvy") for _ in range(size))

    kinds = {
        "sft": lambda i: {"instruction": text(150), "output": text(350)},
        "kto": lambda i: {"instruction": text(150), "output": text(350), "label": bool(i % 2)},
    }
    of = kinds.get(stage, lambda i: {"instruction": text(150), "chosen": text(350), "rejected": text(350)})
    path = directory / f"{stage}.json"
    path.write_text(json.dumps([of(i) for i in range(16)]), encoding="utf-8")
    return str(path)


def model(shape: str, directory: Path) -> str:
    """Random weights of a shape, beside the built-in tokenizer."""
    path = directory / shape
    if not path.exists():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(SHAPES[shape]).save_pretrained(path)
        PreTrainedTokenizerFast.from_pretrained(builtin_path("builtin:sql-tiny")).save_pretrained(path)
    return str(path)


def keys_of(name: str, directory: Path) -> dict:
    """The whole config of a run."""
    shape, keys = RUNS[name]
    rows = 8 if keys["stage"] in ("sft", "kto") else 4
    base = {
        "model_name_or_path": model(shape, directory), "dataset": data(keys["stage"], directory), "device": "cpu",
        "max_steps": 2, "per_device_train_batch_size": rows, "cutoff_len": 1024, "output_dir": str(directory / "out"),
        "overwrite_output_dir": True, "save_strategy": "no", "regression_report": False, "logging_steps": 1,
    }  # fmt: skip
    if keys["stage"] not in ("dpo",):
        base.pop("regression_report")
        base |= {"regression_report": False} if keys["stage"] == "kto" else {}
    return base | keys


def measure(name: str, directory: Path) -> dict:
    """Bytes of the run's peak, and of what it was said to take."""
    keys = keys_of(name, directory)
    file = directory / "run.json"
    file.write_text(json.dumps(keys), encoding="utf-8")
    environment = {**os.environ, "TRUEUP_CACHE": str(directory / "cache")}
    for verb in ("--plan", "--train"):
        command = [sys.executable, "-m", "benchmarks.planned", verb, str(file)]
        out = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if out.returncode:
            raise SystemExit(out.stderr[-3000:])
        told = json.loads(out.stdout.splitlines()[-1])
        if verb == "--plan":
            planned = told
    return {"run": name, **planned, "planned": planned["peak"], **told}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--plan")
    parser.add_argument("--train")
    asked = parser.parse_args()
    if asked.plan:
        report = check(load_config(asked.plan))
        print(json.dumps(report.estimate.to_dict() | {"tokens": report.tokens.largest if report.tokens else 0}))
        return
    if asked.train:
        print(json.dumps(train(asked.train)))
        return
    with tempfile.TemporaryDirectory() as directory:
        for name in RUNS:
            if not asked.only or name in asked.only:
                print(line(measure(name, Path(directory))), flush=True)


def train(file: str) -> dict:
    """Run a config here; resident bytes before the model is loaded, and at the peak."""
    import psutil

    from trueup.recipes import offline

    before = []
    whole = offline.load_policy

    def load(*given, **named):
        before.append(psutil.Process().memory_info().rss)
        return whole(*given, **named)

    offline.load_policy = load
    offline.run(load_config(file))
    return {"before": before[0], "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def line(found: dict) -> str:
    """One row of the table in docs/log.md, in MiB."""
    mib = {k: v / 2**20 for k, v in found.items() if isinstance(v, int) and k != "tokens"}
    parts = " + ".join(f"{k} {mib[k]:,.0f}" for k in ("program", "weights", "optimizer", "activations", "head",
                                                    "reference") if mib.get(k))  # fmt: skip
    return (
        f"| {found['run']} | {found['tokens']:,} | {mib['peak']:,.0f} | {mib['planned']:,.0f} | "
        f"{mib['planned'] / mib['peak']:.2f} | before {mib['before']:,.0f}; {parts} |"
    )


if __name__ == "__main__":
    main()
