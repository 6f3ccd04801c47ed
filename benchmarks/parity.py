"""The same numbers as TRL, step by step in fp32; and bf16 curves among those of TRL's seeds.

    python -m benchmarks.parity

fp32: the built-in model, both tools from the same LoRA weights, rows in the order of the file, no dropout, 20 steps
with a learning rate at which the model moves. Batches of one row make the logged log-probabilities those of single
sequences; batches of four share a padded batch there and a forest here.

bf16: five seeds of each tool. A seed decides LoRA's first weights and the order of the rows, in each tool in its own
way, so single steps cannot be compared; curves are averaged over windows of ten steps. One curve of six alike lies
outside the other five at one step in three, so it is the mean of trueup's five that has to lie between the lowest and
the highest of TRL's five.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks import machine
from benchmarks.environments import versions_of
from benchmarks.measure import RESULTS, WORK, argv, ask, environment, result_path, table, write_result
from benchmarks.models import model_directory
from benchmarks.tools import LORA, Job, perform, variant
from benchmarks.workloads import DATA, prepare

LIMITS = {"log-probs": 1e-4, "loss": 1e-6, "grad norm (relative)": 1e-4}
CASES = (("sql", 1), ("sql", 4))  # workload, rows of a batch
WINDOW = 10


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parity")
    parser.add_argument("--steps", type=int, default=20, help="of the comparison in fp32")
    parser.add_argument("--seeds", type=int, default=5, help="of the curves in bf16; 0 leaves them out")
    parser.add_argument("--curve-steps", type=int, default=100)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(words)
    found = machine.describe(environment(threads=options.threads))
    print(machine.in_words(found))
    record: dict[str, Any] = {"argv": argv(words), "machine": found, "versions": {"trl": versions_of("trl")}}
    path = result_path("parity", options.results)
    record["fp32"] = [fp32(*case, options.steps, options.threads) for case in CASES]
    write_result(path, "parity", record)
    if options.seeds:
        record["bf16"] = curves(options.seeds, options.curve_steps, options.threads)
        write_result(path, "parity", record)
    print(f"\n{summary(record)}\n\n{path}")


def summary(record: dict[str, Any]) -> str:
    tables = [fp32_table(record["fp32"])]
    return "\n\n".join([*tables, curve_table(record["bf16"])] if "bf16" in record else tables)


# --- fp32, step by step -----------------------------------------------------------------------


def fp32(key: str, batch: int, steps: int, threads: int | None) -> dict[str, Any]:
    """The largest deviations of a workload over `steps` steps."""
    model = model_directory("tiny")
    data = prepare(key, model, WORK / f"data-{key}-{batch}", steps * batch, DATA)
    adapter = Path(ask("benchmarks.parity_adapter", str(model), str(WORK / "adapter"), str(LORA["r"])))
    job = Job(
        model, data.directory, batch, data.workload.max_length,
        bf16=False, max_steps=steps, learning_rate=2e-4, adapter=adapter,
    )  # fmt: skip
    ours, theirs = (perform(variant(name), job, threads).steps for name in ("trueup", "trl-nockpt"))
    assert len(ours) == len(theirs) == steps, (len(ours), len(theirs))
    pairs = list(zip(ours, theirs, strict=True))
    sides = "logps/chosen", "logps/rejected"
    return {
        "workload": key,
        "batch": batch,
        "steps": steps,
        "log-probs": max(abs(a[side] - b[side]) for a, b in pairs for side in sides),
        "largest log-prob": max(abs(b[side]) for b in theirs for side in sides),
        "loss": max(abs(a["loss"] - b["loss"]) for a, b in pairs),
        "grad norm (relative)": max(abs(a["grad_norm"] / b["grad_norm"] - 1) for a, b in pairs),
        "losses": [[a["loss"], b["loss"]] for a, b in pairs],
    }


def fp32_table(cases: Sequence[dict[str, Any]]) -> str:
    rows = [
        (
            f"{case['workload']}, {case['batch']} a batch, {case['steps']} steps",
            *(f"{case[name]:.1e} {'ok' if case[name] <= limit else 'OVER'}" for name, limit in LIMITS.items()),
            f"{case['losses'][0][0]:.3f}–{case['losses'][-1][0]:.3f}",
        )
        for case in cases
    ]
    limits = ("allowed", *(f"{limit:.0e}   " for limit in LIMITS.values()), "")
    head = ("fp32, largest deviation", "log-probs", "loss", "grad norm", "first–last")
    return table(head, [limits, *rows])


# --- bf16, among seeds ------------------------------------------------------------------------


def curves(seeds: int, steps: int, threads: int | None) -> dict[str, Any]:
    """The smoothed loss of each tool and seed."""
    model = model_directory("tiny")
    data = prepare("sql", model, WORK / "data-curves", steps * 4)
    found: dict[str, list[list[float]]] = {"trueup": [], "trl-nockpt": []}
    for seed in range(seeds):
        for name, smoothed in found.items():
            job = Job(
                model, data.directory, 4, data.workload.max_length,
                shuffle=True, seed=seed, max_steps=steps, learning_rate=2e-4,
            )  # fmt: skip
            smoothed.append(smooth([row["loss"] for row in perform(variant(name), job, threads).steps]))
    return {"steps": steps, "window": WINDOW, "seeds": seeds, "curves": found}


def smooth(losses: Sequence[float]) -> list[float]:
    """Means over windows of `WINDOW` steps, side by side."""
    assert all(map(math.isfinite, losses)), "a loss is not finite"
    return [fmean(losses[i : i + WINDOW]) for i in range(0, len(losses) - WINDOW + 1, WINDOW)]


def curve_table(found: dict[str, Any]) -> str:
    ours, theirs = found["curves"]["trueup"], found["curves"]["trl-nockpt"]
    rows, inside = [], 0
    for i, (mine, others) in enumerate(zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True)):
        within = min(others) <= fmean(mine) <= max(others)
        inside += within
        window = f"{i * found['window'] + 1}–{(i + 1) * found['window']}"
        rows.append((window, *(f"{f(v):.4f}" for v in (mine, others) for f in (fmean, min, max)), "in" * within))
    head = ("bf16, steps", "trueup", "least", "most", "TRL", "least", "most", "")
    verdict = f"the mean of trueup's seeds lies among TRL's in {inside} of {len(rows)} windows"
    return f"{table(head, rows)}\n{verdict}"


if __name__ == "__main__":
    main()
