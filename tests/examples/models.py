"""The models that the examples name: their real shapes, and tiny ones of the same architecture."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from tests.data.tiny_tokenizers import make_tokenizer

STANDINS = Path(__file__).parent / "standins"


@dataclass(frozen=True)
class Model:
    """`config` names a class of transformers, or a directory of `standins`; `small`: of a tiny one."""

    config: str
    tokenizer: str
    shape: dict[str, Any]  # as published in its config.json
    small: dict[str, Any] = field(default_factory=dict)

    @property
    def remote(self) -> bool:
        return (STANDINS / self.config).is_dir()


def _shape(hidden: int, inner: int, layers: int, heads: int, groups: int, vocabulary: int, **more: Any) -> dict:
    return dict(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=groups, vocab_size=vocabulary, **more,
    )  # fmt: skip


_QWEN3 = {"head_dim": 128, "tie_word_embeddings": True}
_GEMMA2 = dict(head_dim=256, query_pre_attn_scalar=256, sliding_window=4096, tie_word_embeddings=True)
_DEEPSEEK2 = dict(
    num_hidden_layers=27, hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408, vocab_size=102400,
    num_attention_heads=16, num_key_value_heads=16, n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6,
    kv_lora_rank=512, q_lora_rank=None, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
    first_k_dense_replace=1, topk_method="greedy", n_group=1, topk_group=1,
)  # fmt: skip
_TINY_DEEPSEEK2 = dict(
    moe_intermediate_size=64, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, kv_lora_rank=16,
    qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, first_k_dense_replace=1, head_dim=16,
)  # fmt: skip
_CHATGLM = dict(
    num_layers=28, padded_vocab_size=65024, hidden_size=4096, ffn_hidden_size=13696, kv_channels=128,
    num_attention_heads=32, multi_query_group_num=2,
)  # fmt: skip
_TINY_CHATGLM = dict(num_layers=2, ffn_hidden_size=128, kv_channels=16, multi_query_group_num=2)
_QWEN25_7B = _shape(3584, 18944, 28, 28, 4, 152064)

MODELS: dict[str, Model] = {
    "Qwen/Qwen1.5-7B-Chat": Model("Qwen2Config", "qwen", _shape(4096, 11008, 32, 32, 32, 151936)),
    "Qwen/Qwen2.5-0.5B": Model("Qwen2Config", "qwen", _shape(896, 4864, 24, 14, 2, 151936, tie_word_embeddings=True)),
    "Qwen/Qwen2.5-0.5B-Instruct": Model(
        "Qwen2Config", "qwen", _shape(896, 4864, 24, 14, 2, 151936, tie_word_embeddings=True)
    ),
    "Qwen/Qwen2.5-3B-Instruct": Model(
        "Qwen2Config", "qwen", _shape(2048, 11008, 36, 16, 2, 151936, tie_word_embeddings=True)
    ),
    "Qwen/Qwen2.5-7B": Model("Qwen2Config", "qwen", _QWEN25_7B),
    "Qwen/Qwen2.5-7B-Instruct": Model("Qwen2Config", "qwen", _QWEN25_7B),
    "unsloth/Qwen2.5-7B-Instruct-bnb-4bit": Model("Qwen2Config", "qwen", _QWEN25_7B),
    "Qwen/Qwen3-0.6B": Model("Qwen3Config", "qwen3", _shape(1024, 3072, 28, 16, 8, 151936, **_QWEN3)),
    "Qwen/Qwen3-4B-Base": Model("Qwen3Config", "qwen3", _shape(2560, 9728, 36, 32, 8, 151936, **_QWEN3)),
    "Qwen/Qwen3-4B-Instruct-2507": Model("Qwen3Config", "qwen3", _shape(2560, 9728, 36, 32, 8, 151936, **_QWEN3)),
    "Qwen/Qwen3-14B": Model("Qwen3Config", "qwen3", _shape(5120, 17408, 40, 40, 8, 151936, head_dim=128)),
    "meta-llama/Llama-3.2-1B-Instruct": Model(
        "LlamaConfig", "llama3", _shape(2048, 8192, 16, 32, 8, 128256, tie_word_embeddings=True)
    ),
    "meta-llama/Llama-3.1-8B-Instruct": Model("LlamaConfig", "llama3", _shape(4096, 14336, 32, 32, 8, 128256)),
    "mistralai/Mistral-7B-Instruct-v0.3": Model(
        "MistralConfig", "mistral", _shape(4096, 14336, 32, 32, 8, 32768, sliding_window=None)
    ),
    "google/gemma-2-2b-it": Model("Gemma2Config", "gemma", _shape(2304, 9216, 26, 8, 4, 256000, **_GEMMA2)),
    "google/gemma-2-9b-it": Model("Gemma2Config", "gemma", _shape(3584, 14336, 42, 16, 8, 256000, **_GEMMA2)),
    "zai-org/GLM-4-9B-0414": Model("Glm4Config", "glm4", _shape(4096, 13696, 40, 32, 2, 151552, head_dim=128)),
    "zai-org/chatglm3-6b": Model("chatglm", "chatglm3", _CHATGLM, _TINY_CHATGLM),
    "baichuan-inc/Baichuan2-7B-Chat": Model(
        "baichuan", "baichuan2",
        {k: v for k, v in _shape(4096, 11008, 32, 32, 32, 125696).items() if k != "num_key_value_heads"},
    ),
    "deepseek-ai/deepseek-llm-7b-chat": Model(
        "LlamaConfig", "deepseek", _shape(4096, 11008, 30, 32, 32, 102400, max_position_embeddings=4096)
    ),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": Model("Qwen2Config", "deepseek3", _QWEN25_7B),
    "deepseek-ai/DeepSeek-V2-Lite-Chat": Model("DeepseekV2Config", "deepseek", _DEEPSEEK2, _TINY_DEEPSEEK2),
    "microsoft/Phi-4-mini-instruct": Model(
        "Phi3Config", "phi", _shape(3072, 8192, 32, 24, 8, 200064, tie_word_embeddings=True, pad_token_id=0)
    ),
}  # fmt: skip
_SMALL = dict(hidden_size=64, num_attention_heads=4, bos_token_id=None, eos_token_id=2, pad_token_id=0)


def shape_of(name: str, directory: Path) -> PretrainedConfig:
    """The real model's config."""
    model = MODELS[name]
    return _config(model, model.shape, directory)


def tiny(name: str, directory: Path) -> Path:
    """A directory with a tiny random model of that architecture, its tokenizer and, where it has any, its code."""
    model = MODELS[name]
    if (directory / "config.json").exists():
        return directory
    tokenizer = make_tokenizer(model.tokenizer)
    rows = len(tokenizer) + 3
    small = {**model.shape, **_SMALL, **model.small}
    if "intermediate_size" in small:
        small |= {"intermediate_size": 128}
    if "num_key_value_heads" in small:
        small |= {"num_key_value_heads": 4 if model.small else 2}
    if "num_hidden_layers" in small:
        small |= {"num_hidden_layers": 2}
    if "head_dim" in small:
        small |= {"head_dim": 16}
    small["padded_vocab_size" if "padded_vocab_size" in small else "vocab_size"] = rows
    torch.manual_seed(0)
    config = _config(model, small, directory)
    built = AutoModelForCausalLM.from_config(config, trust_remote_code=model.remote)
    built.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    if model.remote:
        _bring_code(model, directory)
    return directory


def _config(model: Model, settings: dict[str, Any], directory: Path) -> PretrainedConfig:
    if not model.remote:
        return getattr(transformers, model.config)(**settings)
    directory.mkdir(parents=True, exist_ok=True)
    name = model.config
    own = {"chatglm": "ChatGLM", "baichuan": "Baichuan"}[name]
    kind = {"chatglm": "ChatGLMForConditionalGeneration", "baichuan": "BaichuanForCausalLM"}[name]
    code = {"AutoConfig": f"configuration_{name}.{own}Config", "AutoModelForCausalLM": f"modeling_{name}.{kind}"}
    _bring_code(model, directory)
    text = json.dumps({"model_type": name, "architectures": [kind], "auto_map": code, **settings})
    (directory / "config.json").write_text(text, encoding="utf-8")
    return AutoConfig.from_pretrained(directory, trust_remote_code=True)


def _bring_code(model: Model, directory: Path) -> None:
    for file in (STANDINS / model.config).glob("*.py"):
        shutil.copy(file, directory / file.name)
