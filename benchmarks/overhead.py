"""What the loop costs: `trueup train` on the tiny built-in model against a bare loop over the same passes.

    python -m benchmarks.overhead

The bare loop is what one would write by hand: batches, forward, DPO loss, backward, clip, AdamW; no logs, no
metrics, no files, no signals. Both look the reference's log-probabilities up.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.measure import (
    RESULTS,
    WORK,
    argv,
    ask,
    environment,
    read_json,
    result_path,
    run,
    spread,
    table,
    write_result,
)
from benchmarks.models import model_directory
from benchmarks.workloads import prepare

LIMIT = 1.15


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.bare:
        return print(json.dumps(bare(options.bare)))
    env = environment(threads=options.threads)
    found = machine.describe(env)
    print(machine.in_words(found))
    config = write_config(options.steps)
    times: dict[str, list[float]] = {"bare loop": [], "trueup train": []}
    for _ in range(options.rounds):
        times["bare loop"].append(ask("benchmarks.overhead", "--bare", str(config), env=env))
        times["trueup train"].append(whole(config, env))
        print("  " + ", ".join(f"{name} {values[-1]:.2f} s" for name, values in times.items()), flush=True)
    record = {"argv": argv(words), "machine": found, "steps": options.steps, "seconds": times}
    print(f"\n{summary(record)}")
    path = result_path("overhead", options.results)
    write_result(path, "overhead", record)
    print(f"\n{path}")


def summary(record: dict[str, Any]) -> str:
    by_hand, ours = record["seconds"]["bare loop"], record["seconds"]["trueup train"]
    ratios = [mine / hand for mine, hand in zip(ours, by_hand, strict=True)]
    rows = [
        (name, *(spread([1000 * s / record["steps"] for s in values], 1), spread(ratio)))
        for name, values, ratio in (("bare loop", by_hand, [1.0]), ("trueup train", ours, ratios))
    ]
    return table((f"{record['steps']} steps", "ms a step", f"ratio (allowed {LIMIT})"), rows)


def write_config(steps: int) -> Path:
    """A run of the built-in model; one epoch of more rows than it needs."""
    model = model_directory("tiny")
    prepared = prepare("sql", model, WORK / "data", 320)
    config = {
        "model_name_or_path": str(model),
        "stage": "dpo",
        "lora_rank": 8,
        "dataset": str(prepared.directory / "trl.jsonl"),
        "cutoff_len": 256,
        "disable_shuffling": True,
        "per_device_train_batch_size": 4,
        "max_steps": steps,
        "learning_rate": 1e-5,
        "logging_steps": 10,
        "save_strategy": "no",
        "plot_loss": False,
        "output_dir": str(WORK / "out"),
    }
    WORK.mkdir(parents=True, exist_ok=True)
    path = WORK / "dpo.yaml"
    path.write_text(json.dumps(config, indent=1), encoding="utf-8")
    return path


def whole(config: Path, env: dict[str, str]) -> float:
    """Seconds of the whole loop, as the run itself reports them."""
    shutil.rmtree(WORK / "out", ignore_errors=True)
    run([sys.executable, "-m", "trueup", "train", config], WORK / "log.txt", env)
    return read_json(WORK / "out" / "train_results.json")["train_runtime"]


def bare(path: Path) -> float:
    """Seconds of a loop without anything around it."""
    import torch
    import torch.nn.functional as F

    from trueup.config.load import load_config
    from trueup.data.encode import prepare as encode
    from trueup.data.forest import build_forest
    from trueup.models.load import load_policy, load_tokenizer
    from trueup.recipes.batches import plan_batches

    cfg = load_config(path)
    tokenizer = load_tokenizer(cfg.model)
    rows = encode(cfg, tokenizer).train
    plan, arithmetic = plan_batches(cfg, rows.lengths)
    policy = load_policy(cfg.model, cfg.tuning, cfg.train, tokenizer).policy
    policy.model.train()
    weights = list(policy.trainable().values())
    optimizer = torch.optim.AdamW(weights, lr=cfg.train.learning_rate, weight_decay=0.0, fused=True)

    def batch(step: int):
        epoch, position = divmod(step, arithmetic.steps_per_epoch)
        (indices,) = plan.micro_batches(plan.steps(epoch)[position])
        return position, build_forest([rows[i] for i in indices])

    def sums(forest) -> torch.Tensor:
        return torch.zeros(forest.num_sequences).index_add(0, forest.owner, policy.token_logps(forest))

    with torch.no_grad():  # LoRA starts at nothing: the policy is its own reference
        reference = [sums(batch(step)[1]) for step in range(min(arithmetic.total_steps, arithmetic.steps_per_epoch))]
    begun = time.perf_counter()
    for step in range(arithmetic.total_steps):
        position, forest = batch(step)
        rewards = cfg.objective.pref_beta * (sums(forest) - reference[position])
        (-F.logsigmoid(rewards[0::2] - rewards[1::2]).mean()).backward()
        torch.nn.utils.clip_grad_norm_(weights, cfg.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
