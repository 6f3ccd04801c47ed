"""What fused layers and torch.compile bring to a step: one decoder layer's forward and backward, ways in turn.

Run: python -m benchmarks.boosted [--shape 0.5b] [--dtype float32] [--method lora] [--tokens 512] [--rounds 5]
     [--ways plain fused compiled]

One layer of a Qwen 2.5 shape with a vocabulary of 1,000, in the shared layout, pairs of random tokens of other lengths
every round; every round runs all ways on the same batch. Ratios are to `plain`, round by round. `compiled` is
transformers' own layer under torch.compile with dynamic shapes (the attention over forests breaks its graph),
`compiled-parts` its norms and MLP only, `compiled-fused` the layer with our fused classes; seconds until a first round
has compiled are told apart.
"""

from __future__ import annotations

import argparse
import copy
import time
from statistics import median

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.measure import spread
from benchmarks.models import SHAPES
from trueup.config.load import load_config
from trueup.data.encoded import Answer, Encoded
from trueup.data.forest import build_forest
from trueup.models.adapters import attach_trained
from trueup.models.fused import fuse
from trueup.models.load import unfreeze
from trueup.models.policy import Policy
from trueup.models.tuners import adapter_config
from trueup.types import Forest

WAYS = ("plain", "fused", "compiled", "compiled-parts", "compiled-fused")


def pairs(tokens: int, round_: int) -> Forest:
    """Pairs of some 160 + 2 × 48 random tokens, as many as give about so many in all; other lengths in each round."""
    rng = np.random.default_rng(10 + round_)
    rows, total = [], 0
    while total < 0.9 * tokens:
        sizes = rng.integers(100, 220), rng.integers(20, 76), rng.integers(20, 76)
        scale = min(1.0, tokens / 256)
        ids = [rng.integers(3, 1000, size=max(4, int(scale * size))).astype(np.int32) for size in sizes]
        answers = tuple(Answer(tokens_, np.ones(len(tokens_), bool)) for tokens_ in ids[1:])
        rows.append(Encoded("", ids[0], answers))
        total += sum(map(len, ids))
    return build_forest(rows)


def policy(shape: str, dtype: torch.dtype, method: str) -> Policy:
    keys = {"model_name_or_path": "shape", "dataset": "alpaca_en_demo", "finetuning_type": method}
    cfg = load_config(keys)
    torch.manual_seed(0)
    config = Qwen2Config(**{**SHAPES[shape].config(), "num_hidden_layers": 1, "vocab_size": 1000})
    base = Qwen2ForCausalLM(config).to(dtype).requires_grad_(False)
    if method == "lora":
        made = Policy(base, attach_trained(base, adapter_config(cfg.tuning, base), [], "shape").model)
    else:
        made = Policy(base)
        unfreeze(base, cfg.tuning)
    return made


def made(way: str, plain: Policy) -> Policy:
    """A copy of the model that computes so."""
    found = copy.deepcopy(plain)
    if "fused" in way:
        fuse(found.model)
    assert found.verify_layout() is None
    found.model.train()
    (layer,) = found.base.get_decoder().layers
    if way in ("compiled", "compiled-fused"):
        layer.compile(dynamic=True)
    elif way == "compiled-parts":
        for part in (layer.mlp, layer.input_layernorm, layer.post_attention_layernorm):
            part.compile(dynamic=True)
    return found


def seconds(policy: Policy, forest: Forest) -> float:
    """Forward to hidden states, and backward."""
    policy.model.zero_grad(set_to_none=True)
    begun = time.perf_counter()
    hidden = policy.hidden(forest)
    hidden.backward(torch.ones_like(hidden))
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32")
    parser.add_argument("--method", choices=("lora", "full"), default="lora")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["plain", "fused"])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    plain = policy(asked.shape, getattr(torch, asked.dtype), asked.method)
    ways = {way: made(way, plain) for way in asked.ways}
    first = {way: sum(seconds(found, pairs(asked.tokens, -1 - n)) for n in range(2)) for way, found in ways.items()}
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(asked.rounds):
        forest = pairs(asked.tokens, number)
        for way, found in ways.items():
            taken[way].append(seconds(found, forest))
    print(f"{asked.shape} {asked.dtype} {asked.method}, about {asked.tokens} tokens, {asked.rounds} rounds")
    for way, times in taken.items():
        ratios = [time_ / other for time_, other in zip(times, taken["plain"], strict=True)]
        print(f"  {way:15} {1000 * median(times):8.1f} ms, ratio {spread(ratios)}, first two {first[way]:.2f} s")


if __name__ == "__main__":
    main()
