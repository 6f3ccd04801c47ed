"""What all benchmarks share: processes that are measured, results that are kept, tables of 80 columns."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"
#: Peer environments, models, data and runs: large, and none of it belongs into the repository.
HOME = Path(os.environ.get("TRUEUP_BENCH_HOME", "~/.cache/trueup/bench")).expanduser()
#: Data and output of this process's runs: two benchmarks at once must not write over each other.
WORK = HOME / "runs" / str(os.getpid())

#: glibc told to keep freed memory instead of handing it back and faulting it in again at every step.
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 62),
    "MALLOC_TOP_PAD_": str(64 << 20),
}
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "WANDB_DISABLED": "true"}


class Failed(Exception):
    """A measured process ended badly; the message has the end of its output."""


@dataclass(frozen=True)
class Usage:
    """What a process and those it waited for took. Memory is the largest single process's peak."""

    process_seconds: float  # wall clock, from start to end
    user: float  # CPU seconds
    system: float
    peak_gb: float  # resident memory, GiB
    gpu_gb: float | None  # device memory, GiB, None without a GPU


@dataclass
class GpuWatch:
    """Peak device memory while the block runs, above what was used before. Polled five times a second."""

    peak: float | None = None
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> GpuWatch:
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if gpu_memory() is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        before = gpu_memory() or 0.0
        while not self._stop.wait(0.2):
            self.peak = max(self.peak or 0.0, (gpu_memory() or 0.0) - before)


def gpu_memory() -> float | None:
    """GiB used on the first GPU; None where there is none."""
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    answer = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    return float(answer.stdout) / 1024 if answer.returncode == 0 else None


def environment(extra: Mapping[str, str] | None = None, *, threads: int | None = None) -> dict[str, str]:
    """The environment of a measured process: this checkout's package, offline, `threads` for torch if given."""
    chosen = {**os.environ, **OFFLINE, "PYTHONPATH": str(REPOSITORY / "src"), **(extra or {})}
    return {**chosen, "OMP_NUM_THREADS": str(threads)} if threads else chosen


def run(command: Sequence[str | Path], log: Path, env: Mapping[str, str], cwd: Path = REPOSITORY) -> Usage:
    """Run a process to its end, its output in `log`.

    The caller should be small: Linux counts the parent's memory at the moment of the fork as the child's.

    Raises:
        Failed: it ended with another code than 0.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w", encoding="utf-8") as output, GpuWatch() as gpu:
        begun = time.perf_counter()
        process = subprocess.Popen(
            [str(word) for word in command], stdout=output, stderr=subprocess.STDOUT, env=dict(env), cwd=cwd
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begun
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        end = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise Failed(f"{' '.join(map(str, command[:4]))} … ended with {process.returncode}; {log} ends with\n{end}")
    scale = 2**30 if sys.platform == "darwin" else 2**20  # macOS counts bytes, Linux KiB
    return Usage(seconds, usage.ru_utime, usage.ru_stime, usage.ru_maxrss / scale, gpu.peak)


def ask(module: str, *arguments: str, env: Mapping[str, str] | None = None) -> Any:
    """The JSON on the last line that a benchmark module prints in a process of its own.

    Raises:
        Failed: it ended badly; what it said on stderr is in the message.
    """
    command = [sys.executable, "-m", module, *arguments]
    answer = subprocess.run(
        command, capture_output=True, encoding="utf-8", cwd=REPOSITORY, env=dict(env or environment()), check=False
    )
    if answer.returncode:
        raise Failed(f"{' '.join(command)} ended with {answer.returncode}:\n{answer.stderr[-2000:]}")
    return json.loads(answer.stdout.splitlines()[-1])


def argv(words: Sequence[str] | None) -> list[str]:
    """The options that a benchmark was given, for its result: `words`, or those of the command line."""
    return list(sys.argv[1:] if words is None else words)


def result_path(name: str, directory: Path = RESULTS) -> Path:
    """Where a result that is made now is kept."""
    return directory / f"{datetime.now(UTC):%Y-%m-%d-%H%M}-{name}.json"


def write_result(path: Path, name: str, record: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"benchmark": name, **record}, file, indent=1)
        file.write("\n")


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def read_json(path: Path) -> Any:
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """ "median (least–most)", or the only value."""
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need to be; the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = []
    for row in (head, ["-" * width for width in widths], *rows):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
