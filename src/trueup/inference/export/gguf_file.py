"""A model as one GGUF file, for llama.cpp, Ollama and others; and whether that can be done.

Architectures are written that llama.cpp computes just as transformers does, from tensors that only need other names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from trueup.errors import ModelError, Problem
from trueup.inference.export.gguf_vocab import Vocabulary, read_vocabulary

#: transformers' architectures → GGUF's.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
FORMATS = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
_BLOCK = 32  # values of q8_0 that share a scale
#: How far a stored weight may be from what it stands for, as a share of the tensor's largest: half of the last digit,
#: and for q8_0 half of 1/127 and what its scale, an f16, is rounded by.
_ROUNDING = {
    gguf.GGMLQuantizationType.F16: 2**-11,
    gguf.GGMLQuantizationType.BF16: 2**-8,
    gguf.GGMLQuantizationType.Q8_0: 1 / 254 + 2**-11,
}
_SMALLEST = 127 * 2**-25  # half of the smallest step of an f16, by which even zero is rounded, and of q8_0's scale
_LARGEST_F16 = 65504.0


def check_gguf(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, kind: str) -> list[Problem]:
    """What keeps a model (its shapes are enough) from being written as GGUF in a format."""
    config = model.config
    problems = [Problem(reason, "export_gguf", fix="drop export_gguf") for reason in _not_plain(config)]
    if problems:
        return problems
    name_of = _names(config)
    unknown = [name for name in _own_tensors(model) if name_of(name) is None]
    if unknown:
        problems.append(Problem(f"GGUF has no name for {unknown[0]}", "export_gguf", fix="drop export_gguf"))
    width = min(config.hidden_size, config.intermediate_size)
    if kind == "q8_0" and (config.hidden_size % _BLOCK or config.intermediate_size % _BLOCK):
        problems.append(
            Problem(
                f"q8_0 stores rows in blocks of {_BLOCK}, and this model is {width} wide",
                "export_gguf",
                fix="set export_gguf: f16",
            )  # fmt: skip
        )
    try:
        read_vocabulary(tokenizer, config.vocab_size)
    except ModelError as error:
        problems += error.problems
    return problems


def _not_plain(config: PretrainedConfig) -> Iterator[str]:
    """What llama.cpp would compute differently."""
    name = config.model_type
    if name not in ARCHITECTURES:
        yield f"{name} is no architecture that is written as GGUF here; there are {', '.join(ARCHITECTURES)}"
        return
    if config.hidden_act != "silu":
        yield f"llama.cpp's {ARCHITECTURES[name]} computes with silu, and this model with {config.hidden_act}"
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
        yield "some of its layers attend to a sliding window, which llama.cpp does not for this architecture"
    window = getattr(config, "sliding_window", None)
    if name == "mistral" and window is not None and window < config.max_position_embeddings:
        yield f"it attends to a window of {window} tokens, which llama.cpp does not for this architecture"
    if name == "qwen3" and getattr(config, "attention_bias", False):
        yield "llama.cpp's qwen3 has no biases"
    if getattr(config, "mlp_bias", False):
        yield "llama.cpp's llama has no biases in its MLP"
    rope = config.rope_parameters
    if rope["rope_type"] not in ("default", "linear", "llama3", "yarn"):
        yield f"its positions are stretched by {rope['rope_type']}"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        yield "only a part of each head is rotated"
    if rope["rope_type"] == "yarn" and {"attention_factor", "beta_fast", "beta_slow", "mscale"} & rope.keys():
        yield "its YaRN has settings of its own"


@dataclass(frozen=True)
class GgufModel:
    """What goes into a file beside the weights.

    Attributes:
        stop_id: the token that ends an answer.
        chat_template: Jinja, or None.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    stop_id: int
    chat_template: str | None
    kind: str  # of FORMATS


def write_gguf(path: Path, model: PreTrainedModel, about: GgufModel) -> None:
    """Write a model (fp32) as a GGUF file, tensor by tensor.

    Raises:
        ModelError: a weight is too large for f16.
    """
    config = model.config
    writer = gguf.GGUFWriter(None, ARCHITECTURES[config.model_type])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(about.name)
    _add_shapes(writer, config)
    writer.add_file_type(FORMATS[about.kind][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_vocabulary(writer, read_vocabulary(about.tokenizer, config.vocab_size), about)
    tensors = list(_tensors(model, about.kind))
    for name, shape, kind, _ in tensors:
        stored, of = _stored(shape, kind)
        writer.add_tensor_info(name, stored, of, int(np.prod(stored)) * of.itemsize, raw_dtype=kind)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, _, kind, value in tensors:
        data = value().float().cpu().numpy()
        if kind == gguf.GGMLQuantizationType.F16 and np.abs(data).max(initial=0) > _LARGEST_F16:
            raise ModelError(
                f"{name} holds values beyond f16's largest, {_LARGEST_F16:.0f}", where="export_gguf",
                fix="set export_gguf: bf16",
            )  # fmt: skip
        writer.write_tensor_data(gguf.quants.quantize(np.ascontiguousarray(data), kind))
    writer.close()


def _stored(shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> tuple[tuple[int, ...], np.dtype]:
    """(shape, type of the elements) of the array that `quantize` makes of a tensor: bytes, for what numpy lacks."""
    plain = {gguf.GGMLQuantizationType.F32: np.float32, gguf.GGMLQuantizationType.F16: np.float16}.get(kind)
    if plain is not None:
        return shape, np.dtype(plain)
    return tuple(gguf.quant_shape_to_byte_shape(shape, kind)), np.dtype(np.uint8)


def _add_shapes(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads or heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    rope = config.rope_parameters
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if rope["rope_type"] == "yarn":
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(int(original))


def _add_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary, about: GgufModel) -> None:
    tokenizer = about.tokenizer
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.space_prefix is not None:
        writer.add_add_space_prefix(vocabulary.space_prefix)
    ids = tokenizer("a").input_ids
    bos, pad, unknown = tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id
    if bos is not None:
        writer.add_bos_token_id(bos)
    writer.add_add_bos_token(bos is not None and ids[0] == bos)
    writer.add_add_eos_token(len(ids) > 1 and ids[-1] == tokenizer.eos_token_id)
    writer.add_eos_token_id(about.stop_id)
    if pad is not None:
        writer.add_pad_token_id(pad)
    if unknown is not None:
        writer.add_unk_token_id(unknown)
    if about.chat_template:
        writer.add_chat_template(about.chat_template)


# --- tensors --------------------------------------------------------------------------------------


def _names(config: PretrainedConfig) -> Callable[[str], str | None]:
    wanted = ARCHITECTURES[config.model_type]
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == wanted)
    table = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)

    def name_of(name: str) -> str | None:
        path, _, leaf = name.rpartition(".")
        found = table.get_name(path)
        return None if found is None else f"{found}.{leaf}"

    return name_of


def _own_tensors(model: PreTrainedModel) -> Mapping[str, Tensor]:
    """The parameters, each once: a head that shares the embeddings' weights is left out, as GGUF has it."""
    return dict(model.named_parameters())


def _tensors(
    model: PreTrainedModel, kind: str
) -> Iterator[tuple[str, tuple[int, ...], gguf.GGMLQuantizationType, Callable[[], Tensor]]]:
    """(name, shape, format, the values) of every tensor of the file."""
    config, name_of = model.config, _names(model.config)
    permuted = ARCHITECTURES[config.model_type] == "llama"
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads or config.num_attention_heads}
    for name, parameter in _own_tensors(model).items():
        new = str(name_of(name))
        count = heads.get(new.split(".")[-2]) if permuted else None
        # What is a vector, and every norm, stays exact: it weighs nothing.
        wanted = FORMATS[kind][0] if parameter.dim() > 1 else gguf.GGMLQuantizationType.F32
        yield new, tuple(parameter.shape), wanted, _value(parameter, count)
    if config.rope_parameters["rope_type"] == "llama3":
        factors = _rope_factors(model)
        yield "rope_freqs.weight", tuple(factors.shape), gguf.GGMLQuantizationType.F32, lambda: factors


def _value(parameter: Tensor, heads: int | None) -> Callable[[], Tensor]:
    def value() -> Tensor:
        return parameter.detach() if heads is None else interleaved(parameter.detach(), heads)

    return value


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """[heads · width, …] with each head's rows in the order of llama.cpp's `llama`: it rotates neighbours, and
    transformers the first half of a head with the second.
    """
    return weight.view(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _rope_factors(model: PreTrainedModel) -> Tensor:
    """[width / 2] by what Llama 3 divides the frequencies of its positions."""
    rotary: Any = model.get_decoder().rotary_emb
    count = rotary.inv_freq.shape[0]
    plain = model.config.rope_parameters["rope_theta"] ** -(torch.arange(count, dtype=torch.float64) / count)
    return (plain / rotary.inv_freq.double().cpu()).float()


# --- reading back ---------------------------------------------------------------------------------


def check_rounding(path: Path, model: PreTrainedModel, kind: str) -> None:
    """Whether a file's weights, read back, are the model's within what its format rounds.

    Raises:
        ModelError: a tensor is missing, has another shape or other values.
    """
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, shape, of, value in _tensors(model, kind):
        found = stored.get(name)
        if found is None or tuple(int(n) for n in found.shape)[::-1] != shape:
            raise _not_held(f"the GGUF file does not hold {name} of shape {shape}")
        read = torch.from_numpy(np.array(gguf.dequantize(found.data, found.tensor_type))).view(shape)
        wanted = value().float().cpu()
        share = _ROUNDING.get(of, 0.0)
        allowed = share * float(wanted.abs().max()) + _SMALLEST * bool(share)
        apart = float((read - wanted).abs().max())
        if not apart <= allowed:
            raise _not_held(f"{name} in the GGUF file is {apart:.3g} from the model's; {kind} rounds by {allowed:.3g}")


def _not_held(what: str) -> ModelError:
    return ModelError(
        what, where="export_gguf", fix="nothing was kept; this is a fault in gguf or in trueup: please report it"
    )  # fmt: skip
