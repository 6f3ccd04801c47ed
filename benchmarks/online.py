"""Seconds of a GRPO or RLOO step, sampling included, beside TRL's: the built-in model, the same requests and settings.

    python -m benchmarks.online --methods grpo,rloo --steps 6 --rounds 2

A step draws 16 × 8 answers of at most 128 tokens at temperature 1, rewards them and trains LoRA on them in bf16. The
learning rate is next to nothing, so that both go on answering as the model does: the mean length of the answers says
whether it was the same work. The first step of a process is left out. `trueup-ppo` is our PPO on as many answers, with
its value head and two passes; TRL 1.16 has none to compare it with.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import machine
from benchmarks.environments import python_of, versions_of
from benchmarks.measure import (
    RESULTS,
    WORK,
    Failed,
    argv,
    environment,
    read_json,
    read_json_lines,
    result_path,
    run,
    spread,
    write_result,
)
from benchmarks.measure import table as as_table
from trueup.builtin import BUILTIN_DATA, builtin_path

PROMPTS, ANSWERS, LONGEST = 16, 8, 128
LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0}
SEED, RATE = 42, 1e-9
REWARD = "def capitals(completions): return [float(sum(c.isupper() for c in text)) for text in completions]\n"


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.online", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--methods", default="grpo,rloo")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, help="threads of each process; its own choice when unset")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON goes")
    options = parser.parse_args(words)
    env = environment(threads=options.threads)
    record: dict[str, Any] = {
        "argv": argv(words), "machine": machine.describe(env), "versions": {"trl": versions_of("trl")},
        "threads": options.threads,
        "work": {"prompts": PROMPTS, "answers": ANSWERS, "longest": LONGEST}, "runs": [],
    }  # fmt: skip
    print(machine.in_words(record["machine"]))
    path = result_path("online", options.results)
    tools = [(tool, method) for method in options.methods.split(",") for tool in ("trueup", "trl")]
    for number in range(options.rounds):
        for tool, method in [*tools, ("trueup", "ppo")][:: -1 if number % 2 else 1]:
            print(f"  round {number + 1}: {tool} {method} … ", end="", flush=True)
            try:
                found = (ours if tool == "trueup" else trl)(method, options.steps, env)
            except Failed as error:
                print("failed")
                print(error, file=sys.stderr)
                continue
            print(f"{found['seconds']:.2f} s a step, {found['length']:.1f} tokens an answer")
            record["runs"].append({"round": number, "tool": tool, "method": method, **found})
            write_result(path, "online", record)
    print(f"\n{summary(record)}\n\n{path}")


def ours(method: str, steps: int, env: dict[str, str]) -> dict[str, Any]:
    """One `trueup train`. PPO makes two optimizer steps of a round of answers."""
    directory = fresh(f"trueup-{method}")
    (directory / "rewards.py").write_text(REWARD, encoding="utf-8")
    passes = 2 if method == "ppo" else 1
    config = {
        "model_name_or_path": "builtin:sql-tiny", "stage": method, "dataset": "sql_pairs_demo", "cutoff_len": 512,
        "reward_funcs": f"{directory}/rewards.py:capitals", "num_generations": ANSWERS, "max_new_tokens": LONGEST,
        "generation_batch_size": PROMPTS * ANSWERS, "finetuning_type": "lora", "lora_rank": LORA["r"],
        "lora_alpha": LORA["lora_alpha"], "per_device_train_batch_size": PROMPTS, "learning_rate": RATE,
        "lr_scheduler_type": "constant", "max_steps": steps * passes, "logging_steps": passes, "bf16": True,
        "save_strategy": "no", "disable_shuffling": True, "seed": SEED, "output_dir": str(directory / "out"),
        "ppo_epochs": passes,
    }  # fmt: skip
    (directory / "run.json").write_text(json.dumps(config), encoding="utf-8")
    usage = run([sys.executable, "-m", "trueup", "train", directory / "run.json"], directory / "log.txt", env)
    return measured(read_json_lines(directory / "out" / "metrics.jsonl"), usage.peak_gb)


def trl(method: str, steps: int, env: dict[str, str]) -> dict[str, Any]:
    """One of TRL's trainers, which counts answers where we count prompts."""
    directory = fresh(f"trl-{method}")
    with open(BUILTIN_DATA / "sql_pairs.jsonl", encoding="utf-8") as lines:
        rows = [{"prompt": [{"role": "user", "content": json.loads(line)["instruction"]}]} for line in lines]
    data = directory / "prompts.jsonl"
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    settings = {
        "method": method, "model": str(builtin_path("builtin:sql-tiny")), "data": str(data), "lora": LORA,
        "arguments": {
            "output_dir": str(directory / "out"), "per_device_train_batch_size": PROMPTS * ANSWERS,
            "num_generations": ANSWERS, "max_completion_length": LONGEST, "learning_rate": RATE, "max_steps": steps,
            "lr_scheduler_type": "constant", "logging_steps": 1, "seed": SEED, "shuffle_dataset": False,
            **({"beta": 0.0} if method == "grpo" else {}),
        },
    }  # fmt: skip
    (directory / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    script = Path(__file__).parent / "peers" / "trl_online.py"
    usage = run([python_of("trl"), script, directory / "settings.json"], directory / "log.txt", env)
    rows = [row for row in read_json(directory / "out" / "result.json")["log"] if "reward" in row]
    return measured(rows, usage.peak_gb)


def fresh(name: str) -> Path:
    """An empty directory for one run."""
    directory = WORK / "online" / name
    shutil.rmtree(directory, ignore_errors=True)
    (directory / "out").parent.mkdir(parents=True, exist_ok=True)
    return directory


def measured(rows: Sequence[dict[str, Any]], peak_gb: float) -> dict[str, Any]:
    """The median step from a log with times, and how long its answers were."""
    rows = [row for row in rows if "completions/mean_length" in row and "loss" in row]
    gaps = [after["time"] - before["time"] for before, after in pairwise(rows)]
    length = sum(row["completions/mean_length"] for row in rows[1:]) / len(rows[1:])
    return {"seconds": median(gaps), "steps": gaps, "length": length, "peak_gb": peak_gb}


def summary(record: dict[str, Any]) -> str:
    """A line for every method and tool: medians over rounds, and TRL's time as a multiple of ours."""
    runs, lines = record["runs"], []
    for tool, method in dict.fromkeys((r["tool"], r["method"]) for r in runs):
        mine = [r for r in runs if (r["tool"], r["method"]) == (tool, method)]
        other = {r["round"]: r for r in runs if r["tool"] == "trueup" and r["method"] == method}
        ratios = [r["seconds"] / other[r["round"]]["seconds"] for r in mine if tool != "trueup" and r["round"] in other]
        lines.append(
            (
                f"{tool} {method}",
                spread([r["seconds"] for r in mine]),
                f"{median(r['length'] for r in mine):.1f}",
                f"{median(r['peak_gb'] for r in mine):.2f}",
                spread(ratios) if ratios else "",
            )
        )
    return as_table(("", "s a step", "tokens an answer", "GiB", "× trueup"), lines)


if __name__ == "__main__":
    main()
