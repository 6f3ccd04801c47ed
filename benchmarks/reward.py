"""Seconds of training a reward model beside TRL's RewardTrainer: the same weights, pairs, lengths and LoRA, in turn.

    python -m benchmarks.reward --workload a --shape 0.5b --rounds 3

`trl-nockpt` recomputes no activations, which is what trueup does on a CPU. The heads start at random, each tool's own,
so losses are near each other and not the same; that it is the same work is in the tokens, which are those of
`benchmarks.dpo`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import machine
from benchmarks.environments import python_of, versions_of
from benchmarks.measure import (
    HOME,
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
from benchmarks.models import SHAPES, model_directory
from benchmarks.tools import COMMON, LORA, whole_loop
from benchmarks.workloads import DATA, WORKLOADS, Prepared, as_record, in_words, prepare

PEERS = ("trl", "trl-nockpt")


def main(words: Sequence[str] | None = None) -> None:
    options = parse(words)
    env = environment(threads=options.threads)
    model = model_directory(options.shape)
    prepared = prepare(
        options.workload, model, HOME / "data" / f"{options.shape}-{options.workload}", options.rows, options.data
    )
    record: dict[str, Any] = {
        "argv": argv(words), "machine": machine.describe(env),
        "versions": {"trl": versions_of("trl")} if options.peers else {},
        "shape": options.shape, "threads": options.threads,
        "workload": {"key": options.workload, **as_record(prepared)}, "runs": [],
    }  # fmt: skip
    print(machine.in_words(record["machine"]), in_words(record["workload"]), sep="\n")
    name = f"reward-{options.shape}-{options.workload}"
    path = result_path(name, options.results)
    for number in range(options.rounds):
        for tool in ("trueup", *options.peers)[:: -1 if number % 2 else 1]:
            print(f"  round {number + 1}: {tool} … ", end="", flush=True)
            try:
                found = (ours if tool == "trueup" else trl)(tool, model, prepared, env)
            except Failed as error:
                print("failed")
                print(error, file=sys.stderr)
                continue
            print(f"{found['seconds']:.1f} s, {found['peak_gb']:.1f} GiB")
            record["runs"].append({"round": number, "tool": tool, **found})
            write_result(path, name, record)  # what is there already survives an interruption
    print(f"\n{summary(record)}\n\n{path}")


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reward", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--peers", default=",".join(PEERS), help="some of them, or none")
    parser.add_argument("--workload", default="a", choices=WORKLOADS)
    parser.add_argument("--shape", default="0.5b", choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, help="rows of the workload, instead of its own number")
    parser.add_argument("--threads", type=int, help="threads of each process; its own choice when unset")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the texts")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON goes")
    options = parser.parse_args(words)
    options.peers = [] if options.peers == "none" else options.peers.split(",")
    if unknown := set(options.peers) - set(PEERS):
        parser.error(f"--peers: {', '.join(sorted(unknown))}: expected some of {', '.join(PEERS)}, or none")
    return options


def ours(name: str, model: Path, prepared: Prepared, env: dict[str, str]) -> dict[str, Any]:
    """One `trueup train`."""
    directory = fresh(name)
    config = COMMON | {
        "model_name_or_path": str(model), "stage": "rm", "finetuning_type": "lora", "lora_rank": LORA["r"],
        "lora_alpha": LORA["lora_alpha"], "lora_target": "all", "dataset": str(prepared.directory / "trl.jsonl"),
        "cutoff_len": prepared.workload.max_length, "per_device_train_batch_size": prepared.workload.batch,
        "bf16": True, "disable_shuffling": True, "save_strategy": "no", "plot_loss": False,
        "output_dir": str(directory / "out"),
    }  # fmt: skip
    (directory / "rm.json").write_text(json.dumps(config), encoding="utf-8")
    usage = run([sys.executable, "-m", "trueup", "train", directory / "rm.json"], directory / "log.txt", env)
    rows = [row for row in read_json_lines(directory / "out" / "metrics.jsonl") if "loss" in row]
    return measured(whole_loop(rows), rows, usage.peak_gb)


def trl(name: str, model: Path, prepared: Prepared, env: dict[str, str]) -> dict[str, Any]:
    """One RewardTrainer."""
    directory = fresh(name)
    settings = {
        "model": str(model), "data": str(prepared.directory / "trl.jsonl"), "dtype": "bfloat16", "lora": LORA,
        "arguments": COMMON | {
            "per_device_train_batch_size": prepared.workload.batch, "max_length": prepared.workload.max_length,
            "bf16": True, "gradient_checkpointing": "nockpt" not in name, "output_dir": str(directory),
        },
    }  # fmt: skip
    (directory / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    script = Path(__file__).parent / "peers" / "trl_reward.py"
    usage = run([python_of("trl"), script, directory / "settings.json"], directory / "log.txt", env)
    log = read_json(directory / "result.json")["log"]
    seconds = next(row["train_runtime"] for row in reversed(log) if "train_runtime" in row)
    return measured(float(seconds), [row for row in log if "loss" in row], usage.peak_gb)


def fresh(name: str) -> Path:
    """An empty directory for one run."""
    directory = WORK / "reward" / name
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory


def measured(seconds: float, rows: Sequence[dict[str, Any]], peak_gb: float) -> dict[str, Any]:
    losses = [float(row["loss"]) for row in rows]
    return {"seconds": seconds, "steps": len(rows), "losses": losses, "peak_gb": peak_gb}


def summary(record: dict[str, Any]) -> str:
    """A line for every tool: medians over rounds, and its time as a multiple of ours within a round."""
    runs = record["runs"]
    base = {r["round"]: r["seconds"] for r in runs if r["tool"] == "trueup"}
    lines = []
    for tool in dict.fromkeys(r["tool"] for r in runs):
        mine = [r for r in runs if r["tool"] == tool]
        ratios = [r["seconds"] / base[r["round"]] for r in mine if tool != "trueup" and r["round"] in base]
        lines.append(
            (
                tool,
                f"{median(run['seconds'] for run in mine):.1f}",
                f"{median(run['peak_gb'] for run in mine):.1f}",
                f"{mine[0]['steps']}",
                f"{mine[0]['losses'][0]:.3f}",
                spread(ratios) if ratios else "",
            )
        )
    return as_table(("medians", "s", "GiB", "steps", "first loss", "multiple of trueup"), lines)


if __name__ == "__main__":
    main()
