"""trueup's DPO step against its peers': the same weights, rows, lengths, LoRA and precision, in turn.

    python -m benchmarks.dpo --peers trl,llamafactory,ms-swift --workload a,b,c,d --shape 0.5b --rounds 3

Every run is a process of its own. `s` is the span of transformers' `train_runtime`, which all peers report: from before
the first step until the last one is done and logged; trueup's is taken from its log in the same way. `in all` is the
whole process with its imports, loading and tokenising. Rounds alternate the order, and ratios are taken within a round,
so that a machine that gets slower slows everyone. The logged log-probabilities of every step are compared: who did
other work than trueup is marked. `of peak` is the time that the matrix products of the batch's distinct tokens would
take at the machine's measured bf16 rate, as a share of the time taken; attention and LoRA's own products are left out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import machine
from benchmarks.environments import RECIPES, versions_of
from benchmarks.measure import RESULTS, WORK, Failed, argv, environment, result_path, spread, table, write_result
from benchmarks.models import SHAPES, Shape, model_directory
from benchmarks.tools import Job, Outcome, Variant, perform, variant
from benchmarks.workloads import DATA, WORKLOADS, Prepared, as_record, in_words, prepare

OURS = "trueup", "trueup-cached"
#: What `seconds` are, on every side.
SPAN = "the trainer's loop: from before the first step until the last is done and logged"
#: What a bare name stands for, unless `--as-installed`.
SETS = {"trl": ("trl", "trl-nockpt", "trl-nockpt-malloc"), "ms-swift": ("ms-swift", "ms-swift-nockpt")}
#: One token more or less in an answer changes the sum by more than this wherever answers have under 200 tokens.
TOLERANCE = 0.005
_KEPT = ("loss", "grad_norm", "logps/chosen", "logps/rejected")


def main(words: Sequence[str] | None = None) -> None:
    options = parse(words)
    env = environment(threads=options.threads)
    found = machine.describe(env)
    print(machine.in_words(found))
    variants = [variant(name) for name in (*OURS, *options.peers)]
    versions = {tool: versions_of(tool) for tool in {who.tool for who in variants} & set(RECIPES)}
    model, failed = model_directory(options.shape), False
    for key in options.workload:
        data = WORK / f"data-{key}"
        prepared = prepare(key, model, data, options.rows, options.data)
        print(f"\n({key}) {in_words(as_record(prepared))}")
        record = {
            "argv": argv(words),
            "span": SPAN,
            "machine": found,
            "versions": versions,
            "shape": options.shape,
            "threads": options.threads,
            "workload": {"key": key, **as_record(prepared)},
            "runs": [],
        }
        path = result_path(f"dpo-{options.shape}-{key}", options.results)
        for number in range(options.rounds):
            record["runs"] += one_round(variants, model, prepared, number, options.threads)
            write_result(path, f"dpo-{options.shape}-{key}", record)  # what is there already survives an interruption
        print(f"\n{summary(record)}\n\n{path}")
        failed |= any("failed" in run for run in record["runs"] if run["variant"] in OURS)
    if failed:
        sys.exit("trueup itself failed")


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dpo", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--peers", default="trl,llamafactory,ms-swift", help="tools or variants, or none")
    parser.add_argument("--as-installed", action="store_true", help="only what is named, no further variants")
    parser.add_argument("--workload", default="a,b,c,d")
    parser.add_argument("--shape", default="0.5b", choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, help="rows of each workload, instead of its own number")
    parser.add_argument("--threads", type=int, help="threads of each process; its own choice when unset")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the texts")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON goes")
    options = parser.parse_args(words)
    options.workload = options.workload.split(",")
    names = [] if options.peers == "none" else options.peers.split(",")
    options.peers = names if options.as_installed else [v for name in names for v in SETS.get(name, (name,))]
    try:
        for name in options.peers:
            variant(name)
    except ValueError as error:
        parser.error(str(error))
    if unknown := set(options.workload) - set(WORKLOADS):
        parser.error(f"--workload: {', '.join(sorted(unknown))}: expected some of {', '.join(WORKLOADS)}")
    return options


def one_round(
    variants: Sequence[Variant], model: Path, prepared: Prepared, number: int, threads: int | None
) -> list[dict[str, Any]]:
    """Every variant once, in turn; in odd rounds backwards."""
    workload = prepared.workload
    job = Job(model, prepared.directory, workload.batch, workload.max_length)
    runs = []
    for who in variants[:: -1 if number % 2 else 1]:
        print(f"  round {number + 1}: {who.name} … ", end="", flush=True)
        try:
            outcome = perform(who, job, threads)
        except Failed as error:
            print("failed")
            print(error, file=sys.stderr)
            runs.append({"round": number, "variant": who.name, "failed": True})
            continue
        print(f"{outcome.seconds:.1f} s, {outcome.usage.peak_gb:.1f} GiB")
        runs.append({"round": number, "variant": who.name, **as_run(outcome)})
    return runs


def as_run(outcome: Outcome) -> dict[str, Any]:
    steps = [{name: row[name] for name in _KEPT if name in row} for row in outcome.steps]
    return {"seconds": outcome.seconds, **asdict(outcome.usage), "steps": steps}


# --- what it says -----------------------------------------------------------------------------


def summary(record: dict[str, Any]) -> str:
    """The tables of one workload, from what was stored."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for run in record["runs"]:
        runs.setdefault(run["variant"], []).append(run)
    done = {name: rows for name, all_rows in runs.items() if (rows := [r for r in all_rows if "failed" not in r])}
    parts = [figures(record, done)]
    for name in OURS:
        if name in done and len(done) > 1:
            parts.append(ratios(name, done))
    parts.append(same_work(done))
    parts += [f"{name} failed {len(rows) - len(done.get(name, []))} times of {len(rows)}" for name, rows in runs.items()
              if len(rows) > len(done.get(name, []))]  # fmt: skip
    return "\n\n".join(part for part in parts if part)


def figures(record: dict[str, Any], done: dict[str, list[dict[str, Any]]]) -> str:
    """Medians over the rounds."""
    workload, rate = record["workload"], record["machine"]["peak_tflops"]
    rows = []
    for name, runs in done.items():
        seconds = median(run["seconds"] for run in runs)
        cached = "cached" in name  # its process did more than the epoch that was measured
        needed = needed_tflop(SHAPES[record["shape"]], workload, passes=2 if cached else 3) / rate
        memory = [run["gpu_gb"] if run["gpu_gb"] is not None else run["peak_gb"] for run in runs]
        rows.append(
            (
                name,
                f"{seconds:.1f}",
                "" if cached else f"{median(run['process_seconds'] for run in runs):.1f}",
                f"{workload['pairs'] / seconds:.3f}",
                f"{workload['answers'] / seconds:.0f}",
                f"{median(memory):.1f}",
                "" if cached else f"{median(run['user'] for run in runs):.0f}",
                "" if cached else f"{median(run['system'] for run in runs):.0f}",
                "" if SHAPES[record["shape"]].hybrid else f"{100 * needed / seconds:.1f} %",
            )
        )
    return table(("medians", "s", "in all", "pairs/s", "tokens/s", "GiB", "user", "sys", "of peak"), rows)


def needed_tflop(shape: Shape, workload: dict[str, Any], passes: int) -> float:
    """TFLOP of the matrix products that one epoch cannot do without: `passes` over the linear layers for every
    distinct token and over the head for every answer token. Reference, policy and its backward pass are three."""
    head = shape.hidden * shape.vocabulary
    return 2e-12 * passes * (shape.linear_parameters * workload["distinct"] + head * workload["answers"])


def ratios(ours: str, done: dict[str, list[dict[str, Any]]]) -> str:
    """Every other tool's time and memory as a multiple of `ours`, within each round."""
    base = {run["round"]: run for run in done[ours]}
    rows = []
    for name, runs in done.items():
        both = [(run, base[run["round"]]) for run in runs if run["round"] in base]
        if name in OURS or not both:
            continue
        memory = "gpu_gb" if both[0][0]["gpu_gb"] is not None else "peak_gb"
        rows.append((name, *(spread([a[key] / b[key] for a, b in both]) for key in ("seconds", memory))))
    return table((f"multiples of {ours}", "time", "memory"), rows) if rows else ""


def same_work(done: dict[str, list[dict[str, Any]]]) -> str:
    """The largest deviation of a step's summed log-probabilities from trueup's of the same round, over all rounds."""
    base = {run["round"]: run["steps"] for run in done.get(OURS[0], ())}
    lines = []
    for name, runs in done.items():
        if name == OURS[0] or "cached" in name:  # a second epoch's differ because training goes on
            continue
        found = [deviation(run["steps"], base[run["round"]]) for run in runs if run["round"] in base]
        if not found:
            continue
        others = [words for words in found if isinstance(words, str)]
        worst = max((value for value in found if not isinstance(value, str)), default=0.0)
        verdict = f": NOT THE SAME WORK in {len(others)} of {len(found)} rounds: {others[0]}" if others else ""
        verdict = verdict or ("" if worst <= TOLERANCE else ": NOT THE SAME WORK")
        lines.append(f"{name} {100 * worst:.3f} %{verdict}")
    rounds = f" in {len(base)} rounds" if len(base) > 1 else ""
    title = f"largest deviation of a step's log-probabilities from trueup's{rounds}:\n  "
    return title + "\n  ".join(lines) if lines else ""


def deviation(steps: list[dict[str, float]], ours: list[dict[str, float]]) -> float | str:
    """The largest one of two logs of the same steps, or why they cannot be compared."""
    if len(steps) != len(ours):
        return f"{len(steps)} steps for {len(ours)}"
    sides = [side for side in _KEPT if "logps" in side]
    return max(abs(a[side] / b[side] - 1) for a, b in zip(steps, ours, strict=True) for side in sides)


if __name__ == "__main__":
    main()
