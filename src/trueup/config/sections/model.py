"""Keys about the model, its tokenizer, where both come from and where they run."""

from __future__ import annotations

from pathlib import PurePath, PurePosixPath, PureWindowsPath
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from trueup.config.values import Bits, Lower, Mapping, Names, NonNegativeFloat, Positive, Section

Hub = Literal["huggingface", "modelscope", "modelers"]
RopeScaling = Literal["linear", "dynamic", "ntk", "yarn", "llama3"]
Attention = Literal["auto", "disabled", "sdpa", "fa2", "fa3"]
Booster = Literal["auto", "fused", "attention", "flash_attn", "liger", "none"]
#: Boosters with transformers' own layers.
UNFUSED = ("attention", "none")


def _inside(folder: str) -> str:
    """A relative path that does not lead out of where it begins, whichever system reads it."""
    folder = folder.strip()
    if any(p.anchor or ".." in p.parts or not p.parts for p in (PurePosixPath(folder), PureWindowsPath(folder))):
        raise ValueError("a folder inside the adapter's directory, such as best or runs/best")
    return PurePath(folder).as_posix()


class ModelSection(Section):
    # which model
    model_name_or_path: str | None = None
    """The model to start from: a directory, a hub id, or builtin:sql-tiny."""
    adapter_name_or_path: Names = []
    """Adapter directories put on the model, in order; the last stage's output goes here."""
    adapter_folder: Annotated[str, AfterValidator(_inside)] | None = None
    """Folder in which the adapter lies, inside each of adapter_name_or_path: of a directory, or of a hub's
    repository."""
    model_revision: str = "main"
    """Branch, tag or commit of a hub model."""
    hub: Annotated[Hub, Lower] = "huggingface"
    """Where hub ids are looked up: huggingface, modelscope or modelers."""
    cache_dir: str | None = None
    """Where downloaded models are kept; the hub's own cache when unset."""
    hf_hub_token: str | None = None
    """Access token for Hugging Face; the logged-in one when unset."""
    ms_hub_token: str | None = None
    """Access token for ModelScope."""
    om_hub_token: str | None = None
    """Access token for Modelers."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for repositories you have read."""
    allow_pickle_weights: bool = False
    """Read weights that exist only as pickled .bin files (restricted unpickling; saved back as
    safetensors)."""
    train_from_scratch: bool = False
    """Start from random weights of this model's shape, drawn by seed; nothing of its files but the config is read."""

    # tokenizer
    use_fast_tokenizer: bool = True
    """Use the tokenizers library's fast tokenizer."""
    resize_vocab: bool = False
    """Give new tokens rows in embeddings and head, start them like other tokens' and train them: under lora they alone,
    unless additional_target names embeddings and head, otherwise with the whole matrices."""
    split_special_tokens: bool = True
    """Control tokens written in a message stay text; false lets them act."""
    add_tokens: Names = []
    """Ordinary tokens to add to the vocabulary."""
    add_special_tokens: Names = []
    """Special tokens to add to the vocabulary."""
    new_special_tokens_config: str | None = None
    """YAML file of new special tokens, each with a description that its row can start from (init_special_tokens)."""
    init_special_tokens: Literal["noise_init", "desc_init", "desc_init_w_noise"] = "noise_init"
    """How rows of new special tokens start: noise_init, like other tokens' (mean and noise); desc_init, at the mean of
    the tokens of their description; desc_init_w_noise, at that with noise."""

    # where and how it computes
    device: Annotated[str, Lower, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    low_cpu_mem_usage: bool = True
    """Load weights one at a time instead of building the model twice in memory."""
    flash_attn: Annotated[Attention, Lower] = "auto"
    """Attention kernel; auto takes what the device has."""
    booster: Annotated[Booster, Lower] = "auto"
    """Faster kernels: fused (fused layers and attention over shared prompts, where they give the model's own numbers),
    attention (the latter alone), auto (the faster of the two on this device, tried on a layer of a large model before
    the first step and kept in run.yaml), flash_attn (with flash-attention 2 for the rest), liger (Liger's layers, on a
    GPU) or none (transformers' own)."""
    rope_scaling: Annotated[RopeScaling, Lower] | None = None
    """Stretch the model's context: linear, ntk, yarn or llama3. dynamic depends on the longest row and is for answers
    only; training takes ntk for it, its frequencies at full length for every row. An adapter trained so needs no key:
    it brings its base's stretch along."""
    rope_scaling_length: Positive | None = None
    """Tokens the stretched context has to hold, which give the factor: this over the model's context, rounded up;
    cutoff_len when unset."""
    use_unsloth: bool = False
    """Unsloth's training kernels."""
    shift_attn: bool = False
    """LongLoRA's shifted sparse attention."""
    moe_aux_loss_coef: NonNegativeFloat | None = None
    """Weight of the router's balancing loss in a mixture of experts."""
    use_reentrant_gc: bool = True
    """Kind of gradient checkpointing; results are the same."""
    upcast_layernorm: bool = False
    """Keep layer norms in fp32."""
    upcast_lmhead_output: bool = False
    """Compute the logits in fp32."""

    # quantised base
    quantization_method: Annotated[Literal["bnb", "hqq", "eetq", "torchao", "gptq", "awq"], Lower] = "bnb"
    """Library that quantises the base while loading: bnb (4 or 8 bits), hqq (1 to 8), torchao (8) or eetq (8).
    Checkpoints quantised by GPTQ or AWQ need no key."""
    quantization_bit: Bits | None = None
    """Quantise the frozen base to this many bits while loading (QLoRA: 4)."""
    quantization_type: Annotated[Literal["nf4", "fp4", "fp8"], Lower] = "nf4"
    """Number format of bitsandbytes' 4-bit weights, nf4 or fp4; fp8 for torchao's 8-bit ones."""
    double_quantization: bool = True
    """Quantise the quantisation constants too."""
    quantization_device_map: Literal["auto"] | None = None
    """Spread a quantised model over the devices."""

    # inference
    infer_backend: Annotated[Literal["huggingface", "vllm", "sglang", "ktransformers"], Lower] = "huggingface"
    """Engine that generates text."""
    infer_dtype: Annotated[Literal["auto", "float16", "bfloat16", "float32"], Lower] = "auto"
    """Number format at inference and export."""
    offload_folder: str = "offload"
    """Where weights go that do not fit in memory."""
    use_kv_cache: bool = True
    """Keep keys and values while generating."""
    vllm_maxlen: Positive = 4096
    """Longest prompt plus answer in vLLM."""
    vllm_gpu_util: Annotated[float, Field(gt=0, lt=1)] = 0.7
    """Share of GPU memory vLLM may take."""
    vllm_enforce_eager: bool = False
    """Run vLLM without CUDA graphs."""
    vllm_max_lora_rank: Positive = 32
    """Largest LoRA rank vLLM is prepared for."""
    vllm_config: Mapping | None = None
    """Further settings for vLLM, as a JSON object."""
