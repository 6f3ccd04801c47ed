"""From a file of 10,000 pairs to token ids: trueup's data half against TRL's dataset preparation.

    python -m benchmarks.tokenize

Dialogues of HH-RLHF, each text made unique, with Qwen's tokenizer. Both start from the file, without a cache. TRL
is given one process and two (`dataset_num_proc`), and what it does is timed inside: reading the file and the
trainer's own preparation, without the trainer's other work. trueup, given one process and as many as it chooses, also
writes its data report and fills its cache; a second pass finds them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path

from benchmarks import machine
from benchmarks.environments import python_of, versions_of
from benchmarks.measure import (
    RESULTS,
    WORK,
    argv,
    environment,
    read_json,
    result_path,
    run,
    spread,
    table,
    write_result,
)
from benchmarks.models import model_directory
from benchmarks.workloads import DATA, Pair, dialogues, write

OURS = [sys.executable, "-m", "benchmarks.tokenize", "--ours"]
CACHE = WORK / "cache"
PEER = Path(__file__).parent / "peers" / "trl_tokenize.py"


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tokenize")
    parser.add_argument("--pairs", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--ours", type=Path, help=argparse.SUPPRESS)  # the measured process writes its result here
    parser.add_argument("--workers", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.ours:
        options.ours.write_text(json.dumps(ours(options.ours.parent, options.workers)), encoding="utf-8")
        return
    found = machine.describe(environment())
    print(machine.in_words(found))
    model = model_directory("0.5b")
    write(unique(options.data, options.pairs), WORK)
    seconds = compare(model, options.rounds)
    record = {
        "argv": argv(words),
        "machine": found,
        "versions": {"trl": versions_of("trl")},
        "pairs": options.pairs,
        "seconds": seconds,
    }
    path = result_path("tokenize", options.results)
    write_result(path, "tokenize", record)
    print(f"\n{summary(record)}\n\n{path}")


def unique(data: Path, pairs: int) -> list[Pair]:
    """As many dialogues as asked for, repeated with a number in every text so that none comes twice."""
    sources = cycle(list(dialogues(data, None)))  # type: ignore[arg-type]
    return [
        Pair(
            [{**turn, "content": f"{turn['content']} ({i})"} for turn in pair.prompt],
            f"{pair.chosen} ({i})",
            f"{pair.rejected} ({i})",
        )
        for i, pair in enumerate(islice(sources, pairs))
    ]


def compare(model: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of each way, in turn."""
    seconds: dict[str, list[float]] = {}
    result = WORK / "result.json"
    commands = {
        "trueup": [*OURS, result],
        "trueup, 1 process": [*OURS, result, "--workers", "1"],
        "trl": [python_of("trl"), PEER, model, WORK / "trl.jsonl", result, "1"],
        "trl, 2 processes": [python_of("trl"), PEER, model, WORK / "trl.jsonl", result, "2"],
    }
    for _ in range(rounds):
        for name, command in commands.items():
            shutil.rmtree(CACHE, ignore_errors=True)
            run(command, WORK / "log.txt", environment({"TRUEUP_CACHE": str(CACHE)}))
            for what, value in read_json(result).items():
                seconds.setdefault(f"{name}{what}", []).append(value)
                print(f"  {name}{what}: {value:.2f} s", flush=True)
    return seconds


def ours(folder: Path, workers: int | None) -> dict[str, float]:
    """Seconds of preparing the pairs, and of doing so again with their tokens in the cache."""
    from trueup.config.load import load_config
    from trueup.data.encode import prepare
    from trueup.models.load import load_tokenizer

    settings = {
        "model_name_or_path": str(model_directory("0.5b")),
        "stage": "dpo",
        "dataset": str(folder / "trl.jsonl"),
        "cutoff_len": 1024,
        "preprocessing_num_workers": workers,
    }
    cfg = load_config({key: value for key, value in settings.items() if value is not None})
    seconds, fingerprints = {}, set()
    for what in ("", ", cached") if workers is None else ("",):
        tokenizer = load_tokenizer(cfg.model)
        begun = time.perf_counter()
        prepared = prepare(cfg, tokenizer)
        prepared.report.to_dict()
        seconds[what] = time.perf_counter() - begun
        fingerprints.add(prepared.train.fingerprint)
    assert len(fingerprints) == 1
    return seconds


def summary(record: dict) -> str:
    seconds, pairs = record["seconds"], record["pairs"]
    ours = seconds["trueup"]
    rows = [
        (
            name,
            spread(values),
            f"{pairs / min(values):,.0f}",
            spread([value / mine for value, mine in zip(values, ours, strict=True)], 2 if "cached" in name else 1),
        )
        for name, values in seconds.items()
    ]
    return table((f"{pairs:,} pairs", "s", "pairs/s, best", "multiple of trueup's"), rows)


if __name__ == "__main__":
    main()
