"""Tiny randomly initialised models of real architectures."""

from __future__ import annotations

import torch
import transformers as tf

COMMON = dict(
    vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip

ARCHITECTURES = {
    "llama": (tf.LlamaConfig, {}),
    "qwen2": (tf.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (tf.Qwen3Config, {"head_dim": 8}),
    "mistral": (tf.MistralConfig, {"sliding_window": None}),
    "gemma": (tf.GemmaConfig, {"head_dim": 8}),
    "gemma2": (tf.Gemma2Config, {"head_dim": 8, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0,
                                 "sliding_window": 8, "query_pre_attn_scalar": 8}),
    "glm": (tf.GlmConfig, {"head_dim": 8}),
    "glm4": (tf.Glm4Config, {"head_dim": 8}),
    "phi3": (tf.Phi3Config, {"sliding_window": None}),
    "cohere": (tf.CohereConfig, {"logit_scale": 0.25}),
    "granite": (tf.GraniteConfig, {"logits_scaling": 4.0}),
    "olmo2": (tf.Olmo2Config, {}),
}  # fmt: skip


def tiny_model(name: str = "qwen2", seed: int = 0, std: float = 0.25, **overrides) -> tf.PreTrainedModel:
    """A two-layer model in fp32 whose attention matters: weights are large enough to tell a wrong mask apart."""
    config_class, extra = ARCHITECTURES[name]
    torch.manual_seed(seed)
    config = config_class(**{**COMMON, **extra, "initializer_range": std, **overrides})
    return tf.AutoModelForCausalLM.from_config(config).eval()
