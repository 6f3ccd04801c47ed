"""The machine a benchmark ran on, and how fast it multiplies matrices: what every other number is read against.

`python -m benchmarks.machine` prints it as one line of JSON.
"""

from __future__ import annotations

import json
import textwrap
import time
from collections.abc import Mapping
from typing import Any

from benchmarks.measure import ask

SHAPE = 1024, 896, 4864  # tokens × hidden × intermediate of the 0.5B shape


def describe(env: Mapping[str, str]) -> dict[str, Any]:
    """Versions, hardware and peak of the machine, asked of a fresh process so that the caller stays small."""
    return ask("benchmarks.machine", env=env)


def in_words(found: Mapping[str, Any]) -> str:
    """The machine in two lines or three."""
    cpu = found["cpu"]
    gpus = "".join(f", {gpu['name']} {gpu['memory_gb']:.0f} GiB" for gpu in found["gpus"])
    text = (
        f"{cpu['name']}, {cpu['cores']} cores, {cpu['threads']} threads, {cpu['memory_gb']:.0f} GiB{gpus}; "
        f"{' '.join(cpu['instructions'])}; "
        f"bf16 products at {found['peak_tflops']:.2f} TFLOP/s; torch {found['packages']['torch']}"
    )
    return textwrap.fill(text, 80)


def instructions() -> list[str]:
    """The matrix and bf16 instructions of an x86 CPU, where the kernel tells."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            flags = next((line.split() for line in file if line.startswith("flags")), [])
    except OSError:
        return []
    return sorted({"avx2", "avx512f", "avx512_bf16", "amx_bf16"} & set(flags))


def peak_tflops(seconds: float = 2.0) -> float:
    """TFLOP/s of a bf16 product of the model's size: the best of as many as fit into `seconds`, after a warm-up."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens, hidden, wide = (size * (8 if device == "cuda" else 1) for size in SHAPE)
    a = torch.randn(tokens, hidden, dtype=torch.bfloat16, device=device)
    b = torch.randn(hidden, wide, dtype=torch.bfloat16, device=device)

    def once() -> float:
        begun = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    once()
    times, end = [], time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        times.append(once())
    return 2 * tokens * hidden * wide / min(times) / 1e12


def main() -> None:
    from trueup.training.environment import describe_environment

    found = describe_environment()
    del found["command"], found["platform"]
    found["cpu"]["instructions"] = instructions()
    print(json.dumps({**found, "peak_tflops": round(peak_tflops(), 3)}))


if __name__ == "__main__":
    main()
