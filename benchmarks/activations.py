"""Peak memory of one forward and backward in a fresh process, against the estimate (`trueup.models.memory`).

python -m benchmarks.activations --dtype bfloat16 --method lora --recompute 4 --pairs 5
"""

from __future__ import annotations

import argparse
import resource

import numpy as np
import psutil
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from trueup.config.load import load_config
from trueup.data.encoded import Answer, Encoded
from trueup.data.forest import build_forest
from trueup.models.adapters import attach_trained
from trueup.models.fused import fuse
from trueup.models.load import unfreeze
from trueup.models.memory import head_bytes, layer_costs, recompute
from trueup.models.policy import Policy
from trueup.models.tuners import adapter_config
from trueup.training.optim import MasterOptimizer
from trueup.types import Forest

SHAPE = dict(
    vocab_size=8192, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
    num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config}


def pairs(count: int, prompt: int, answer: int) -> Forest:
    """Pairs of random tokens in one batch."""
    rng = np.random.default_rng(0)

    def row() -> Encoded:
        ids = [rng.integers(3, 8000, size=n).astype(np.int32) for n in (prompt, answer, answer)]
        return Encoded("", ids[0], tuple(Answer(tokens, np.ones(answer, bool)) for tokens in ids[1:]))

    return build_forest([row() for _ in range(count)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=CONFIGS, default="llama")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--method", choices=("lora", "full"), default="lora")
    parser.add_argument("--recompute", type=int, default=0)
    parser.add_argument("--pairs", type=int, default=5)
    asked = parser.parse_args()
    dtype, device = getattr(torch, asked.dtype), torch.device("cpu")
    keys = {"model_name_or_path": "shape", "dataset": "alpaca_en_demo", "finetuning_type": asked.method}
    cfg = load_config(keys)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(CONFIGS[asked.shape](**SHAPE), dtype=dtype).requires_grad_(False)
    if asked.method == "lora":
        policy = Policy(base, attach_trained(base, adapter_config(cfg.tuning, base), [], "shape").model)
    else:
        policy = Policy(base)
        unfreeze(base, cfg.tuning)
    fuse(policy.model)
    policy.verify_layout()
    policy.model.train()
    recompute(base, asked.recompute)
    optimizer = MasterOptimizer.from_settings(policy.trainable(), cfg.train, 1)
    optimizer.backward(policy.token_logps(pairs(1, 20, 20)).sum())  # what is made once is made now

    forest = pairs(asked.pairs, 150, 350)
    before = psutil.Process().memory_info().rss
    optimizer.backward(policy.token_logps(forest).sum())
    measured = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    tokens = len(forest.input_ids)
    costs = layer_costs(base, cfg.tuning, dtype, device)
    estimate = costs.needed(tokens, asked.recompute) + head_bytes(base, dtype, device)
    print(
        f"{asked.shape} {asked.dtype} {asked.method}, {asked.recompute} of 8 layers recompute, {tokens:,} tokens: "
        f"measured {measured / 2**20:,.0f} MiB, estimated {estimate / 2**20:,.0f} MiB ({estimate / measured:.2f})"
    )


if __name__ == "__main__":
    main()
