"""Forest attention alone in bf16: our blocks against torch's fused kernel, in turn, CPU time on one thread."""

from __future__ import annotations

import random
import statistics
import time

import torch

from trueup.models.attention import _fused
from trueup.models.blocks import BlockAttention
from trueup.models.layout import ForestLayout
from trueup.types import Segment

SHAPES = {  # name: (pairs, prompt tokens, answer tokens, heads)
    "16 short pairs": (16, (20, 40), (20, 80), 4),
    "2 long pairs": (2, (300, 600), (250, 400), 14),
    "1 very long pair": (1, (1500, 1500), (1000, 1000), 14),
}


def pairs(count: int, prompt: tuple[int, int], answer: tuple[int, int]) -> list[Segment]:
    """Segments of pairs with random lengths."""
    rng, segments, cursor = random.Random(0), [], 0
    for _ in range(count):
        root = len(segments)
        for lengths, parent in ((prompt, -1), (answer, root), (answer, root)):
            length = rng.randint(*lengths)
            segments.append(Segment(cursor, cursor + length, parent))
            cursor += length
    return segments


KERNELS = {"blocks": BlockAttention.apply, "fused": _fused}


def milliseconds(kernel, segments: list[Segment], heads: int) -> float:
    """CPU time of one forward and backward pass in bf16."""
    tokens = segments[-1].stop
    layout = ForestLayout(segments, torch.device("cpu"))
    q, k, v = (torch.randn(1, n, tokens, 64, dtype=torch.bfloat16, requires_grad=True) for n in (heads, 2, 2))
    begun = time.process_time()
    kernel(q, k, v, layout, None).sum().backward()
    return 1000 * (time.process_time() - begun)


def main(runs: int = 10) -> None:
    torch.set_num_threads(1)
    for name, (count, prompt, answer, heads) in SHAPES.items():
        segments = pairs(count, prompt, answer)
        times: dict[str, list[float]] = {name: [] for name in KERNELS}
        for _ in range(runs + 1):
            for kernel, values in times.items():
                values.append(milliseconds(KERNELS[kernel], segments, heads))
        blocks, fused = (statistics.median(values[1:]) for values in times.values())
        print(f"{name:<16} blocks {blocks:7.1f} ms   fused {fused:7.1f} ms   ratio {fused / blocks:.2f}")


if __name__ == "__main__":
    main()
