"""docs/benchmarks.md from the stored results: `python -m benchmarks.report`.

Of every benchmark the newest result on every machine is shown, by the same functions that print it.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import (
    data_report,
    dpo,
    machine,
    memory,
    online,
    overhead,
    parity,
    quantised,
    reward,
    serving,
    startup,
    tokenize,
)
from benchmarks.measure import REPOSITORY, RESULTS, read_json

PAGE = REPOSITORY / "docs" / "benchmarks.md"

HEAD = """\
# Benchmarks

This page is made by `python -m benchmarks.report` from the JSON files in `benchmarks/results/`, which also hold what
every single run measured. Do not edit it.

Each script prints what it measures; `--help` tells its options, and its first lines say how it is done. Peers are
installed with pip into environments of their own under `~/.cache/trueup/bench` (`TRUEUP_BENCH_HOME` puts them
elsewhere), which takes some 10 GB. All tools get the same random bf16 weights, the same token sequences (answers are
cut beforehand, so no tool cuts them its own way), the same LoRA and the same order of rows; the log-probabilities that
every step logs are compared. Variants: `-nockpt` is without gradient checkpointing, `-malloc` with glibc told not to
give freed memory back, `-cached` with the reference computed beforehand, its second epoch measured.
Ratios are taken within a round; medians, with the least and the most in brackets.

Seconds of a DPO or reward run are those of the trainer's loop on every side, from before the first step until the last
one is done and logged: transformers' `train_runtime` for the peers, the same span of trueup's log. `in all` is the
whole process with its imports, loading and tokenising. Results without `span` in them have trueup's own count of its
steps, which is less by the writing of one row of the log.
"""


Show = Callable[[dict[str, Any]], str]


def sections() -> list[tuple[str, str, str, Show]]:
    """Benchmark's name as stored, title, module, and what shows it."""
    shapes = [(shape, key, work.title) for shape in dpo.SHAPES for key, work in dpo.WORKLOADS.items()]
    with_peers = ("dpo", "DPO", of_work(dpo.summary)), ("reward", "Reward model", of_work(reward.summary))
    return [
        *((f"{module}-{shape}-{key}", f"{title}, {shape.upper()} shape, workload ({key}): {work}", module, show)
          for module, title, show in with_peers for shape, key, work in shapes),
        ("online", "GRPO, RLOO and PPO", "online", online.summary),
        ("serving", "Serving", "serving", serving.summary),
        ("parity", "Parity with TRL", "parity", parity.summary),
        ("memory", "Peak memory of one step", "memory", memory.summary),
        ("quantised-0.5b", "LoRA over quantised weights, 0.5B shape", "quantised", quantised.summary),
        ("tokenize", "Tokenising", "tokenize", tokenize.summary),
        ("data-report", "Data report of 100,000 pairs", "data_report", data_report.summary),
        ("overhead", "Loop overhead", "overhead", overhead.summary),
        ("startup", "Startup", "startup", startup.summary),
    ]  # fmt: skip


def of_work(show: Show) -> Show:
    """With the workload in words before it."""
    return lambda record: f"{dpo.in_words(record['workload'])}\n\n{show(record)}"


def command(module: str, record: Mapping[str, Any]) -> str:
    """How a result was asked for; of those from before this was stored, what they tell of it."""
    if "argv" in record:
        return f"`{shlex.join(['python', '-m', f'benchmarks.{module}', *record['argv']])}`"
    known = {"shape": record.get("shape"), "workload": record.get("workload", {}).get("key"),
             "pairs": record.get("pairs"), "steps": record.get("steps"), "threads": record.get("threads")}  # fmt: skip
    options = [f"--{name} {value}" for name, value in known.items() if value is not None]
    rounds = rounds_of(record)
    seen = [f"{rounds} round{'s' * (rounds != 1)}"] if rounds else []
    if "workload" in record:
        seen.append(f"{record['workload']['pairs']} pairs")
    words = " ".join(["python -m", f"benchmarks.{module}", *options])
    return f"`{words}` … (its other options were not stored{': it holds ' + ', '.join(seen) if seen else ''})"


def rounds_of(record: Mapping[str, Any]) -> int | None:
    """How many rounds a result holds, where it has rounds."""
    if "runs" in record:
        return len({run["round"] for run in record["runs"]})
    seconds = record.get("seconds")
    return max(map(len, seconds.values())) if isinstance(seconds, dict) else None


def newest(directory: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Benchmark → machine → newest record, with its file's name under "file"."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for path in sorted(directory.glob("*.json")):  # names begin with the time
        record = {**read_json(path), "file": path.name}
        hardware = record["machine"]
        name = ", ".join([hardware["cpu"]["name"], *(gpu["name"] for gpu in hardware["gpus"])])
        found.setdefault(record["benchmark"], {})[name] = record
    return found


def page(results: Mapping[str, Mapping[str, dict[str, Any]]]) -> str:
    """The whole page."""
    parts = [HEAD]
    for name, title, module, show in sections():
        records = results.get(name, {})
        if not records:
            continue
        parts.append(f"## {title}\n")
        for record in records.values():
            versions = "; ".join(
                f"{tool}: " + ", ".join(f"{package} {version}" for package, version in found.items())
                for tool, found in record.get("versions", {}).items()
            )
            lines = [machine.in_words(record["machine"]), *([versions] if versions else [])]
            parts.append(f"{command(module, record)}\n")
            parts.append(f"[{record['file']}](../benchmarks/results/{record['file']})\n")
            parts.append("```\n" + "\n".join(lines) + f"\n\n{show(record)}\n```\n")
    if len(parts) == 1:
        parts.append("Nothing has been measured for this page yet.\n")
    return "\n".join(parts)


def main() -> None:
    PAGE.write_text(page(newest(RESULTS)), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
