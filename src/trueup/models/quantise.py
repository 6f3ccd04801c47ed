"""Quantised bases: frozen weights kept in few bits, and products of the numbers that they stand for.

A quantised layer here is a way to keep a weight, and nothing else: every product, in training, in evaluation and of
the reference, is of the weight written out in compute dtype, one layer at a time. Libraries differ between these
(bitsandbytes repacks 4-bit weights for evaluation on some CPUs, and its 8-bit product rounds inputs by what else is in
the batch), so that a policy would differ from its reference before the first step. The weights themselves are made,
kept and written out by the libraries: bitsandbytes, HQQ, torchao.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from trueup.config.schema import ModelSection
from trueup.errors import ModelError

log = logging.getLogger("trueup")

#: method → (what it is called, modules that have to be there, how they get there).
LIBRARIES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "bnb": ("bitsandbytes", ("bitsandbytes",), "pip install 'trueup[quant]'"),
    "hqq": ("HQQ", ("hqq",), "pip install 'trueup[hqq]'"),
    "torchao": ("torchao", ("torchao",), "pip install 'trueup[torchao]'"),
    "eetq": ("EETQ", ("kernels",), "pip install kernels"),
    "gptq": ("GPTQ", ("optimum", "gptqmodel"), "pip install optimum gptqmodel"),
    "awq": ("AWQ", ("gptqmodel",), "pip install gptqmodel"),
}
#: what a checkpoint's config calls a method → ours.
_OF_CHECKPOINTS = {"bitsandbytes": "bnb", "bitsandbytes_4bit": "bnb", "bitsandbytes_8bit": "bnb"}

HQQ_GROUP = 64  # weights that share a scale, as in HQQ's own examples


@dataclass(frozen=True)
class Loading:
    """How transformers is to load a base, and what is left to do with it."""

    config: Any = None  # transformers' quantization config, where it quantises while loading
    after: Callable[[PreTrainedModel], PreTrainedModel] = field(default=lambda base: base)


def loading(
    model: ModelSection, config: PretrainedConfig, dtype: torch.dtype, device: torch.device, whole: Sequence[str] = ()
) -> Loading:
    """What `quantization_bit` and its companions, or a checkpoint that is quantised already, ask for.

    Args:
        config: the model's; a quantised checkpoint says so there.
        whole: modules that stay as they are, beside the head over the vocabulary.

    Raises:
        ModelError: a library is missing, or it cannot do this on this device.
    """
    kept = ["lm_head", *whole]
    if stored := stored_quantisation(config):
        method = _OF_CHECKPOINTS.get(stored["quant_method"], stored["quant_method"])
        _require(method, "model_name_or_path")
        if model.quantization_bit:
            log.warning("the checkpoint is quantised already, by %s: quantization_bit has no effect", method)
        if method == "bnb":
            _keep_whole(config, stored, whole)
        return Loading()
    if not model.quantization_bit:
        return Loading()
    method = model.quantization_method
    _require(method, "quantization_method")
    make = {"bnb": _bitsandbytes, "hqq": _hqq, "torchao": _torchao, "eetq": _eetq}[method]
    return make(model, dtype, device, kept)


def in_bits(model: ModelSection, bits: int | None) -> ModelSection:
    """How another model than the policy is loaded: in bits of its own, whatever the policy's are."""
    return model.model_copy(update={"quantization_bit": bits})


def stored_quantisation(config: PretrainedConfig) -> dict[str, Any] | None:
    """The quantisation that a checkpoint's config names, as a dict with `quant_method`."""
    stored = getattr(config, "quantization_config", None)
    if not stored:
        return None
    stored = dict(stored if isinstance(stored, dict) else stored.to_dict())
    method = stored.get("quant_method") or "bitsandbytes"  # as old files of bitsandbytes leave it out
    return {**stored, "quant_method": str(getattr(method, "value", method)).lower()}


def _require(method: str, where: str) -> None:
    if method == "bnb":  # on a CPU it warns of a kernel for evaluation that nobody asks for here
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    name, modules, install = LIBRARIES.get(method, (method, (), ""))
    if missing := [module for module in modules if importlib.util.find_spec(module) is None]:
        raise ModelError(
            f"weights quantised by {name} need {' and '.join(missing)}, which is not installed", where=where,
            fix=install,
        )  # fmt: skip


def _keep_whole(config: PretrainedConfig, stored: dict[str, Any], whole: Sequence[str]) -> None:
    """Keep a new head out of what transformers expects to find quantised in the files."""
    if whole:
        kept = stored.get("llm_int8_skip_modules") or ["lm_head"]
        config.quantization_config = {**stored, "llm_int8_skip_modules": [*kept, *whole]}


def _bitsandbytes(model: ModelSection, dtype: torch.dtype, device: torch.device, kept: list[str]) -> Loading:
    from transformers import BitsAndBytesConfig

    if device.type == "mps":
        raise ModelError(
            "bitsandbytes quantises on CPUs and GPUs, not on mps", where="quantization_method", fix="set device: cpu"
        )
    if model.quantization_bit == 8:
        # Outlier columns depend on the whole batch; `Weighted` does without them, whatever the threshold is.
        return Loading(BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0, llm_int8_skip_modules=kept))
    return Loading(
        BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=model.quantization_type,
            bnb_4bit_use_double_quant=model.double_quantization,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=kept,
        )
    )


def _torchao(model: ModelSection, dtype: torch.dtype, device: torch.device, kept: list[str]) -> Loading:
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    kind = Float8WeightOnlyConfig if model.quantization_type == "fp8" else Int8WeightOnlyConfig
    return Loading(TorchAoConfig(kind(), modules_to_not_convert=kept))


def _eetq(model: ModelSection, dtype: torch.dtype, device: torch.device, kept: list[str]) -> Loading:
    from transformers import EetqConfig

    if device.type != "cuda":
        raise ModelError(
            "EETQ needs a CUDA GPU", where="quantization_method",
            fix="quantization_method: bnb or torchao keeps 8-bit weights on any device",
        )  # fmt: skip
    return Loading(EetqConfig("int8", modules_to_not_convert=kept))


def _hqq(model: ModelSection, dtype: torch.dtype, device: torch.device, kept: list[str]) -> Loading:
    """transformers 5.23 loads no HQQ weights onto CPUs and makes none elsewhere, so the layers are made here."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    settings = BaseQuantizeConfig(nbits=model.quantization_bit, group_size=HQQ_GROUP)

    def quantise(base: PreTrainedModel) -> PreTrainedModel:
        linears = [(name, m) for name, m in base.named_modules() if type(m) is nn.Linear]
        for name, linear in linears:
            if name.rpartition(".")[2] not in kept:
                made = HQQLinear(linear, copy.deepcopy(settings), compute_dtype=dtype, device=str(device))
                base.set_submodule(name, made)
        base.is_quantized = True
        return base

    return Loading(after=quantise)


# --- layers -------------------------------------------------------------------------------------


class Weighted:
    """Forward of a frozen quantised layer: the product with the weight that it stands for."""

    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out]."""
        return _Product.apply(x, self)


class _Product(torch.autograd.Function):
    """y = x Wᵀ + bias, W written out again in the backward rather than kept."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return product(x, layer, transposed=True, bias=bias_of(layer, x.dtype))

    @staticmethod
    def backward(ctx, grad):
        return product(grad, ctx.layer), None


def product(x: Tensor, layer: nn.Module, transposed: bool = False, bias: Tensor | None = None) -> Tensor:
    """x W, or x Wᵀ + bias, with the weight of a linear layer, which is written out if it is quantised.

    There is room for the result before the weight takes some: a weight that lay below it would leave a hole in the
    heap when it goes, too small for the next one.
    """
    rows = x.reshape(-1, x.shape[-1])
    columns = layer.out_features if transposed else layer.in_features
    result = x.new_empty(len(rows), columns)  # type: ignore[arg-type]
    weight = weight_of(layer, x.dtype)
    weight = weight.t() if transposed else weight
    if bias is None:
        torch.mm(rows, weight, out=result)
    else:
        torch.addmm(bias, rows, weight, out=result)
    return result.view(*x.shape[:-1], -1)


def settle(base: nn.Module) -> int:
    """Let every quantised layer whose weight can be written out compute so; frozen, as it has to be.

    Returns:
        how many layers did not before.
    """
    found = [m for m in base.modules() if not isinstance(m, Weighted) and _writer_of(m) is not None]
    for module in found:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            _unpack(module)
        module.__class__ = _weighted(type(module))
        module.requires_grad_(False)
    return len(found)


def let_go_of_files(base: PreTrainedModel) -> None:
    """Weights that are not quantised as tensors of their own: while one of them is a part of a mapped file, all of that
    file that has been read stays in memory.
    """
    for parameter in base.parameters():
        if type(parameter) is nn.Parameter and parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def _unpack(layer: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights in evaluation (no gradient passes through them then), and take
    back what it has repacked, as far as it can be.
    """
    layer.support_avx512bf16_for_cpu = False
    state = layer.weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        layer.weight.data, state = _convert_weight_packed_for_cpu_inverse(layer.weight.data, state)
        if not state.nested:  # which bitsandbytes 0.50 forgets
            state.absmax = state.absmax.T.reshape(-1).float()
        layer.weight.quant_state = state


def unsettle(model: nn.Module) -> None:
    """Put the layers' own forward back."""
    for module in model.modules():
        if isinstance(module, Weighted):
            module.__class__ = type(module).__bases__[1]


@cache
def _weighted(cls: type) -> type:
    if issubclass(cls, nn.Linear):
        return type(f"Weighted{cls.__name__}", (Weighted, cls), {})
    # HQQ's layers are no `nn.Linear` and have no `weight`; whoever looks for linear layers (peft, we) asks for both.
    packed = property(lambda layer: layer.W_q)
    return type(f"Weighted{cls.__name__}", (Weighted, cls, nn.Linear), {"weight": packed})


def is_quantised(model: nn.Module) -> bool:
    """Whether a model has quantised layers."""
    return any(is_packed(module) for module in model.modules())


def made_here(base: PreTrainedModel) -> bool:
    """Whether quantised weights were made while loading, of files that hold them in full."""
    return not getattr(getattr(base, "hf_quantizer", None), "pre_quantized", False)


def is_packed(module: nn.Module) -> bool:
    """Whether a layer's weight is quantised."""
    foreign = type(module).__module__.split(".")[0] in ("gptqmodel", "eetq", "kernels")
    return isinstance(module, Weighted) or _writer_of(module) is not None or foreign


def weight_of(layer: Any, dtype: torch.dtype) -> Tensor:
    """[out, in] the weight of a linear layer, written out in `dtype` if it is quantised; for reading only."""
    writer = _writer_of(layer)
    weight = layer.weight if writer is None else writer(layer)
    return weight.to(dtype)


def bias_of(layer: Any, dtype: torch.dtype) -> Tensor | None:
    return None if layer.bias is None else layer.bias.to(dtype)


def _writer_of(module: Any) -> Callable[[Any], Tensor] | None:
    """What writes a quantised layer's weight out; None for one that is not quantised, or not by these libraries."""
    if type(module) is nn.Linear and type(module.weight.data) is Tensor:  # nearly all
        return None
    name = next((c.__name__ for c in type(module).__mro__ if c.__name__ in _WRITERS), None)
    if name is not None:
        return _WRITERS[name]
    weight = module._parameters.get("weight") if isinstance(module, nn.Linear) else None
    is_torchao = weight is not None and type(weight.data).__module__.startswith("torchao")
    return _write_torchao if is_torchao else None


def _write_4bit(layer: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    weight = layer.weight
    return dequantize_4bit(weight.data, weight.quant_state)


def _write_8bit(layer: Any) -> Tensor:
    weight = layer.weight
    scale = weight.SCB if weight.SCB is not None else layer.state.SCB
    return weight.data * (scale / 127.0).unsqueeze(1)


def _write_hqq(layer: Any) -> Tensor:
    return layer.dequantize()


def _write_torchao(layer: Any) -> Tensor:
    return layer.weight.dequantize()


_WRITERS = {"Linear4bit": _write_4bit, "Linear8bitLt": _write_8bit, "HQQLinear": _write_hqq}


# --- looking at them ----------------------------------------------------------------------------


@torch.no_grad()
def dequantise(base: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model with plain layers of the weights that its quantised ones stand for, in place.

    Raises:
        ModelError: its library does not tell the weights.
    """
    layers = [(name, module) for name, module in base.named_modules() if is_packed(module)]
    if any(_writer_of(module) is None for _, module in layers):
        raise ModelError(
            "the weights of this quantised checkpoint cannot be written out", where="model_name_or_path",
            fix="name the checkpoint that it was quantised from",
        )  # fmt: skip
    for name, layer in layers:
        weight, bias = weight_of(layer, dtype), bias_of(layer, dtype)
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, weight.device, dtype)
        plain.weight.data = weight
        if bias is not None:
            plain.bias.data = bias
        base.set_submodule(name, plain.requires_grad_(False))
    for mark in ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized", "hf_quantizer", "quantization_method"):
        if mark in base.__dict__:
            delattr(base, mark)
    if hasattr(base.config, "quantization_config"):
        del base.config.quantization_config
    conversions = getattr(base, "_weight_conversions", None)  # of the files' tensors, to be undone when it is saved
    if conversions:
        base._weight_conversions = [c for c in conversions if not any(map(_of_quantiser, _operations(c)))] or None
    return base


def _operations(conversion: Any) -> list[Any]:
    return list(getattr(conversion, "operations", None) or ())


def _of_quantiser(operation: Any) -> bool:
    return type(operation).__module__.startswith("transformers.integrations")


def count_parameters(model: nn.Module) -> int:
    """Numbers in a model, those that share a byte counted one by one."""
    return sum(map(_numel, model.parameters())) + sum(map(_beyond_parameters, model.modules()))


def _beyond_parameters(module: Any) -> int:
    """What HQQ's layers hold beside, or more densely than, their parameters."""
    if _writer_of(module) is not _write_hqq:
        return 0
    bias = 0 if module.bias is None or isinstance(module.bias, nn.Parameter) else module.bias.numel()
    return module.in_features * module.out_features - module.W_q.numel() + bias


def _numel(parameter: nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def resident_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights as they are kept, with the constants that quantised ones need."""
    return sum({tensor.data_ptr(): tensor.nbytes for _, tensor in tensors_of(model)}.values())


def expected_bytes(base: PreTrainedModel, model: ModelSection, dtype: torch.dtype) -> int:
    """What `resident_bytes` will be of a model as it is going to be loaded, from its shapes (meta device)."""
    plain = sum(parameter.numel() for parameter in base.parameters()) * dtype.itemsize
    per_weight = _bytes_of_weight(base.config, model, dtype)
    if per_weight is None:
        return plain
    packed = sum(m.weight.numel() for name, m in base.named_modules() if type(m) is nn.Linear and not _is_head(name))
    return int(plain - packed * (dtype.itemsize - per_weight))


def _is_head(name: str) -> bool:
    return name.rpartition(".")[2] in ("lm_head", "score")


def _bytes_of_weight(config: PretrainedConfig, model: ModelSection, dtype: torch.dtype) -> float | None:
    """Bytes of a quantised weight with its share of the constants; None where nothing is quantised."""
    method, bits, nested = model.quantization_method, model.quantization_bit, model.double_quantization
    if stored := stored_quantisation(config):
        bits = stored.get("bits") or (4 if stored.get("load_in_4bit") else 8)
        method = _OF_CHECKPOINTS.get(stored["quant_method"], stored["quant_method"])
        nested = stored.get("bnb_4bit_use_double_quant", False)
    if bits is None:
        return None
    if method == "bnb" and bits == 4:  # of 64 weights an fp32 scale, or a byte and of 256 such scales another
        return 0.5 + (1 / 64 + 4 / (64 * 256) if nested else 4 / 64)
    group = 2 * dtype.itemsize / HQQ_GROUP if method in ("hqq", "gptq", "awq") else 0.0
    return bits / 8 + group


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every plain tensor that decides what a model computes; those of packed weights one by one."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        yield from _plain_tensors(name, tensor.detach() if isinstance(tensor, Tensor) else tensor)


def _plain_tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if not isinstance(value, Tensor):
        return
    parts = getattr(value, "__tensor_flatten__", None)
    if parts is None or type(value) is Tensor:
        yield name, value
        return
    for part in parts()[0]:
        yield from _plain_tensors(f"{name}.{part}", getattr(value, part))


def describe(base: PreTrainedModel) -> str | None:
    """`4-bit weights (bitsandbytes)`, for a person; None for a model that is not quantised."""
    for module in base.modules():
        writer = _writer_of(module)
        if writer is _write_4bit:
            state = module.weight.quant_state  # type: ignore[union-attr]
            nested = ", constants too" if getattr(state, "nested", False) else ""
            return f"4-bit weights (bitsandbytes {state.quant_type}{nested})"
        if writer is _write_8bit:
            return "8-bit weights (bitsandbytes)"
        if writer is _write_hqq:
            return f"{module.meta['nbits']}-bit weights (HQQ)"  # type: ignore[index]
        if writer is _write_torchao:
            return f"8-bit weights (torchao {type(module.weight.data).__name__})"  # type: ignore[union-attr]
    return "quantised weights" if is_quantised(base) else None
