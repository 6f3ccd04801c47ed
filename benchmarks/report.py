"""docs/benchmarks.md from the stored results: `python -m benchmarks.report`.

Of every benchmark the newest result on every machine is shown, by the same functions that print it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import dpo, machine, memory, overhead, parity, startup, tokenize
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
"""


def sections() -> list[tuple[str, str, str, Callable[[dict[str, Any]], str]]]:
    """Benchmark's name as stored (or its start), title, command, and what shows it."""
    rows = [
        (f"dpo-{shape}-{key}", f"DPO, {shape.upper()} shape, workload ({key}): {workload.title}",
         f"python -m benchmarks.dpo --shape {shape} --workload {key}", show_dpo)
        for shape in dpo.SHAPES
        for key, workload in dpo.WORKLOADS.items()
    ]  # fmt: skip
    return [
        *rows,
        ("parity", "Parity with TRL", "python -m benchmarks.parity", parity.summary),
        ("memory", "Peak memory of one step", "python -m benchmarks.memory", memory.summary),
        ("tokenize", "Tokenising", "python -m benchmarks.tokenize", tokenize.summary),
        ("overhead", "Loop overhead", "python -m benchmarks.overhead", overhead.summary),
        ("startup", "Startup", "python -m benchmarks.startup", startup.summary),
    ]


def show_dpo(record: dict[str, Any]) -> str:
    return f"{dpo.in_words(record['workload'])}\n\n{dpo.summary(record)}"


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
    for name, title, command, show in sections():
        records = results.get(name, {})
        if not records:
            continue
        parts.append(f"## {title}\n\n`{command}`\n")
        for record in records.values():
            versions = "; ".join(
                f"{tool}: " + ", ".join(f"{package} {version}" for package, version in found.items())
                for tool, found in record.get("versions", {}).items()
            )
            lines = [machine.in_words(record["machine"]), *([versions] if versions else [])]
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
