"""From the start of the process to the first forward pass, against what transformers needs to be imported and loaded.

    python -m benchmarks.startup

The 0.5B shape, the tokenised data on disk from an earlier run, files in the page cache. trueup is timed until its
training asks for the first loss; transformers until `from_pretrained` returns, with and without the tokenizer.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.measure import RESULTS, WORK, argv, environment, result_path, run, spread, table, write_result
from benchmarks.models import SHAPES, model_directory
from benchmarks.workloads import DATA, prepare

LIMIT = 1.2


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup")
    parser.add_argument("--shape", default="0.5b", choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.one:
        return ONE[options.one[0]](options.one[1])
    found = machine.describe(environment())
    print(machine.in_words(found))
    targets = write_targets(options.shape, options.data)
    times: dict[str, list[float]] = {name: [] for name in targets}
    for number in range(-1, options.rounds):  # the first round warms every cache
        for name, target in targets.items():
            seconds = one(name, target)
            if number >= 0:
                times[name].append(seconds)
        if number >= 0:
            print("  " + ", ".join(f"{name} {values[-1]:.2f} s" for name, values in times.items()), flush=True)
    record = {"argv": argv(words), "machine": found, "shape": options.shape, "seconds": times}
    print(f"\n{summary(record)}")
    path = result_path(f"startup-{options.shape}", options.results)
    write_result(path, "startup", record)
    print(f"\n{path}")


def summary(record: dict[str, Any]) -> str:
    times = record["seconds"]
    rows = [
        (name, spread(values), spread([a / b for a, b in zip(times["trueup"], values, strict=True)]))
        for name, values in times.items()
    ]
    return table(("from the process's start", "s", f"trueup's ratio (allowed {LIMIT})"), rows)


def write_targets(shape: str, data: Path) -> dict[str, Path]:
    """What each way is started on."""
    model = model_directory(shape)
    prepared = prepare("c", model, WORK / "data", None, data)
    config = {
        "model_name_or_path": str(model),
        "stage": "dpo",
        "precompute_ref_log_probs": False,
        "dataset": str(prepared.directory / "trl.jsonl"),
        "cutoff_len": 512,
        "tokenized_path": str(WORK / "tokenized"),
        "output_dir": str(WORK / "out"),
        "overwrite_output_dir": True,
    }
    WORK.mkdir(parents=True, exist_ok=True)
    path = WORK / "dpo.yaml"
    path.write_text(json.dumps(config, indent=1), encoding="utf-8")
    return {"trueup": path, "transformers": model, "transformers, tokenizer": model}


def one(name: str, target: Path) -> float:
    """Seconds from before the process exists to the moment it writes down."""
    shutil.rmtree(WORK / "out", ignore_errors=True)
    moment = WORK / "moment"
    begun = time.time()
    command = [sys.executable, "-m", "benchmarks.startup", "--one", name, target]
    run(command, WORK / "log.txt", environment({"TRUEUP_BENCH_MOMENT": str(moment)}))
    return float(moment.read_text(encoding="ascii")) - begun


def arrived() -> None:
    """Write down the time and leave without tidying up."""
    Path(os.environ["TRUEUP_BENCH_MOMENT"]).write_text(repr(time.time()), encoding="ascii")
    os._exit(0)


def until_first_loss(config: str) -> None:
    """`trueup train`, left at the first training batch. Nothing is imported for it that the verb would not import."""
    from trueup import cli

    importing = cli.importing

    @contextmanager
    def importing_and_marked() -> Iterator[None]:
        with importing():
            yield
        if program := sys.modules.get("trueup.recipes.program"):
            program.OfflineProgram.loss = lambda *_: arrived()

    cli.importing = importing_and_marked
    cli.main(["train", config])


def until_loaded(model: str, tokenizer: bool = False) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if tokenizer:
        AutoTokenizer.from_pretrained(model)
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    arrived()


ONE = {
    "trueup": until_first_loss,
    "transformers": until_loaded,
    "transformers, tokenizer": lambda model: until_loaded(model, tokenizer=True),
}

if __name__ == "__main__":
    main()
