"""LoRA weights for two tools to start from: `python -m benchmarks.parity_adapter MODEL DIRECTORY RANK`."""

from __future__ import annotations

import json
import sys


def main(model: str, directory: str, rank: str) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from benchmarks.tools import LORA

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = LoraConfig(**LORA | {"r": int(rank)}, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(directory)
    print(json.dumps(directory))


if __name__ == "__main__":
    main(*sys.argv[1:])
