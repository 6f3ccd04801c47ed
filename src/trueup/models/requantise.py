"""A written model quantised into another directory, by the libraries that people load such models with.

bitsandbytes needs no text and runs anywhere. GPTQ (gptqmodel) and AWQ (llm-compressor) look at text while they work,
and are best run on a GPU; they are called as their documentation says, and have not been measured here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import BitsAndBytesConfig

from trueup.models.policy import Policy

_GROUP = 128  # weights that share a scale, in GPTQ's and AWQ's own examples


def quantise_bitsandbytes(
    source: Path, target: Path, bits: int, device: torch.device, dtype: torch.dtype, kind: type[Policy],
    shard_bytes: int,
) -> None:  # fmt: skip
    """8-bit weights, or 4-bit ones (nf4, constants quantised too); embeddings and heads stay as they are."""
    if bits == 8:
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head", *kind.always_trained])
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=["lm_head", *kind.always_trained],
        )  # fmt: skip
    model = kind.auto_class.from_pretrained(
        str(source), quantization_config=config, dtype=dtype, device_map={"": device}, use_safetensors=True
    )
    model.save_pretrained(target, max_shard_size=shard_bytes)


def quantise_gptq(source: Path, target: Path, bits: int, texts: Sequence[str], longest: int) -> None:
    """GPTQ (arXiv 2210.17323) by gptqmodel."""
    from gptqmodel import GPTQModel, QuantizeConfig

    model = GPTQModel.load(str(source), QuantizeConfig(bits=bits, group_size=_GROUP))
    rows = [model.tokenizer(text, truncation=True, max_length=longest) for text in texts]
    model.quantize([{"input_ids": row["input_ids"], "attention_mask": row["attention_mask"]} for row in rows])
    model.save(str(target))


def quantise_awq(source: Path, target: Path, texts: Sequence[str], longest: int) -> None:
    """4-bit AWQ (arXiv 2306.00978) by llm-compressor, in the format that vLLM and transformers read."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.awq import AWQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    oneshot(
        model=str(source),
        dataset=Dataset.from_dict({"text": list(texts)}),
        recipe=[AWQModifier(), QuantizationModifier(ignore=["lm_head"], scheme="W4A16_ASYM", targets=["Linear"])],
        max_seq_length=longest,
        num_calibration_samples=len(texts),
        output_dir=str(target),
    )
