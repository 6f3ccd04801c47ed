"""DPO with LoRA over quantised bases beside the same over a bf16 base: weights, peak memory, seconds, and losses.

    python -m benchmarks.quantised --rows 4

Weights are the bytes of the base as it stays in memory, with the constants that quantised ones need; peaks are of whole
processes, imports and loading included. The first line of the result's goals: weights of 4 bits take at most half, and
of the bytes so saved at least 90 % are missing from the peak.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.measure import HOME, RESULTS, argv, ask, environment, result_path, spread, table, write_result
from benchmarks.models import SHAPES, model_directory
from benchmarks.tools import Job, perform, variant
from benchmarks.workloads import DATA, as_record, in_words, prepare

BASES = {"trueup": 0, "trueup-8bit": 8, "trueup-4bit": 4}


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantised")
    parser.add_argument("--shape", default="0.5b", choices=SHAPES)
    parser.add_argument("--workload", default="a")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--weights", type=int, help=argparse.SUPPRESS)  # what a measured process is asked for
    options = parser.parse_args(words)
    if options.weights is not None:
        return print(json.dumps(weights(model_directory(options.shape), options.weights)))
    env = environment(threads=options.threads)
    model = model_directory(options.shape)
    where = HOME / "data" / f"{options.shape}-{options.workload}-{options.rows}"
    prepared = prepare(options.workload, model, where, options.rows, options.data)
    record: dict[str, Any] = {
        "argv": argv(words), "machine": machine.describe(env), "shape": options.shape,
        "workload": {"key": options.workload, **as_record(prepared)}, "weights_mb": {}, "runs": [],
    }  # fmt: skip
    print(machine.in_words(record["machine"]), in_words(record["workload"]), sep="\n")
    job = Job(model, prepared.directory, prepared.workload.batch, prepared.workload.max_length)
    for name, bits in BASES.items():
        record["weights_mb"][name] = ask(
            "benchmarks.quantised", "--shape", options.shape, "--weights", str(bits), env=env
        )
    for number in range(options.rounds):
        for name in BASES:
            done = perform(variant(name), job, options.threads)
            print(f"  round {number + 1}: {name} … {done.seconds:.1f} s, {done.usage.peak_gb:.2f} GiB")
            losses = [step["loss"] for step in done.steps]
            record["runs"].append(
                {"round": number, "variant": name, "seconds": done.seconds, "peak_mb": done.usage.peak_gb * 1024,
                 "process_seconds": done.usage.process_seconds, "losses": losses}
            )  # fmt: skip
    print(f"\n{summary(record)}")
    path = result_path(f"quantised-{options.shape}", options.results)
    write_result(path, f"quantised-{options.shape}", record)
    print(f"\n{path}")


def weights(model: Path, bits: int) -> float:
    """MiB of a loaded base."""
    import torch

    from trueup.config.schema import ModelSection
    from trueup.models.load import load_base
    from trueup.models.quantise import resident_bytes

    section = ModelSection(model_name_or_path=str(model), quantization_bit=bits or None)
    return resident_bytes(load_base(str(model), section, torch.device("cpu"), torch.bfloat16)) / 2**20


def summary(record: dict[str, Any]) -> str:
    plain = "trueup"
    whole = record["weights_mb"][plain]
    runs = {name: [run for run in record["runs"] if run["variant"] == name] for name in record["weights_mb"]}
    peak = {name: min(run["peak_mb"] for run in found) for name, found in runs.items()}
    rows = []
    for name, kept in record["weights_mb"].items():
        saved = whole - kept
        share = f"{100 * (peak[plain] - peak[name]) / saved:.0f} %" if saved else ""
        seconds = spread([run["seconds"] for run in runs[name]], 1)
        rows.append((
            {"trueup": "bf16", "trueup-8bit": "8 bits (bitsandbytes)"}.get(name, "4 bits (bitsandbytes nf4)"),
            f"{kept:,.0f}", f"{100 * kept / whole:.1f} %", f"{peak[name]:,.0f}", share, seconds,
            f"{runs[name][0]['losses'][-1]:.4f}",
        ))  # fmt: skip
    head = ("base", "weights, MiB", "of bf16's", "peak, MiB", "of the saved", "seconds", "last loss")
    return table(head, rows)


if __name__ == "__main__":
    sys.exit(main())
