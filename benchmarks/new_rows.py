"""Rows of new tokens that train alone: a step's embeddings and head with them, without them, and by peft's own layer.

Run: python -m benchmarks.new_rows [--tokens 1024] [--rounds 5] [--ways none ours peft]

The embeddings and the untied head of a model of the 0.5B shape, in one process on one thread; the way through
log-probabilities forward and backward, in fp32.
"""

from __future__ import annotations

import argparse
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measure import spread
from trueup.models.logprobs import token_logps
from trueup.models.policy import head_of
from trueup.models.rows import lighten

VOCABULARY, HIDDEN, NEW = 151_936, 896, 3


def model(rows: bool, ours: bool) -> LlamaForCausalLM:
    """No layer between embeddings and head, but a projection that nobody calls for the adapter to be on."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=8, num_hidden_layers=1,
                         num_attention_heads=2, tie_word_embeddings=False)  # fmt: skip
    ids = list(range(VOCABULARY - NEW, VOCABULARY))
    wanted = {"embed_tokens": ids, "lm_head": ids} if rows else None
    found = get_peft_model(LlamaForCausalLM(config).requires_grad_(False),
                           LoraConfig(r=1, target_modules=["q_proj"], trainable_token_indices=wanted))  # fmt: skip
    if ours:
        lighten(found)
    return found.get_base_model()


def step(base: LlamaForCausalLM, ids: torch.Tensor) -> float:
    begun = time.perf_counter()
    hidden = base.get_input_embeddings()(ids[:-1])
    if not hidden.requires_grad:
        hidden = hidden.detach().requires_grad_()
    token_logps(hidden, head_of(base), ids[1:]).sum().backward()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", nargs="+", default=["none", "ours", "peft"])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    ids = torch.randint(VOCABULARY, (asked.tokens + 1,), generator=torch.Generator().manual_seed(0))
    ids[::50] = VOCABULARY - 1
    ways = {"none": (False, True), "ours": (True, True), "peft": (True, False)}
    for name in asked.ways:
        base = model(*ways[name])
        step(base, ids)
        print(f"{name}: {spread([step(base, ids) for _ in range(asked.rounds)])} s", flush=True)
        del base


if __name__ == "__main__":
    main()
