"""Layers of the step in fewer passes over memory: LoRA projections, gated MLPs, RMSNorm.

`fuse` swaps the class of modules that are exactly what the fused forms compute; everything else stays as it is. Where
the base is quantised, its weight is written out for each product and not kept (models/quantise.py). The
parameters, their names and what peft saves do not change. Less is kept for the backward, and on a CPU the elementwise
passes around the products cost as much as page faults and caches make them (docs/log.md). On a GPU it is unmeasured.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from trueup.models.quantise import Weighted, bias_of, product, weight_of


def fuse(model: nn.Module) -> int:
    """Swap in the fused classes where a module is certain to compute the same; returns how many were swapped."""
    swapped = 0
    for module in model.modules():
        if _is_plain_lora(module):
            module.__class__ = _fused_lora(type(module))
        elif _is_gated_mlp(module):
            module.__class__ = _gated(type(module))
        elif _is_plain_rms_norm(module):
            module.__class__ = _normed(type(module))
        else:
            continue
        swapped += 1
    return swapped


def fused_modules(model: nn.Module) -> list[nn.Module]:
    """Those that `fuse` has swapped."""
    return [module for module in model.modules() if isinstance(module, FusedLora | _GatedMLP | _RMSNorm)]


def own_class(module: nn.Module) -> type:
    """A module's class, or the one that it had before `fuse` swapped it."""
    fused = isinstance(module, FusedLora | _GatedMLP | _RMSNorm)
    return type(module).__bases__[-1] if fused else type(module)


def unfuse(model: nn.Module) -> None:
    """Put the modules' own classes back."""
    for module in fused_modules(model):
        module.__class__ = own_class(module)


# --- LoRA -------------------------------------------------------------------------------------


#: peft's LoRA layers over quantised weights, which do what its plain one does.
_OVER_QUANTISED = ("Linear4bit", "Linear8bitLt", "HqqLoraLinear", "TorchaoLoraLinear")


def _is_plain_lora(module: nn.Module) -> bool:
    """LoRA over one frozen projection, plain or quantised with a weight that can be written out."""
    if type(module) is LoraLinear:
        return type(module.base_layer) is nn.Linear or isinstance(module.base_layer, Weighted)
    known = isinstance(module, LoraLayer) and type(module).__name__ in _OVER_QUANTISED
    return known and isinstance(module.base_layer, Weighted)


class FusedLora:
    """Forward of a LoRA layer of peft's; one plain adapter over a frozen projection runs as one autograd node."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """x [..., in] → [..., out]."""
        weights = None if args or kwargs else self.single_adapter(x)
        if weights is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        return _LoraLinear.apply(x, self.base_layer, *weights)

    def single_adapter(self, x: Tensor) -> tuple[Tensor, Tensor, float] | None:
        """(A, B, scale) when exactly one plain adapter acts, without dropout; None where peft has to decide."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        base = self.base_layer
        if self.disable_adapters or self.merged or len(active) != 1 or active[0] in self.lora_variant:
            return None
        name = active[0]
        a, b, dropout = self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
        acts = isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0
        hooked = base._forward_hooks or base._forward_pre_hooks
        if acts or hooked or b.bias is not None or _trains(base) or a.weight.dtype != x.dtype:
            return None
        return a.weight, b.weight, self.scaling[name]


def _fused_lora(cls: type) -> type:
    return type(f"Fused{cls.__name__}", (FusedLora, cls), {})


def _trains(linear: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in linear.parameters())


class _LoraLinear(torch.autograd.Function):
    """y = x Wᵀ + bias + s (x Aᵀ) Bᵀ with W frozen; the low-rank part is added in place by its own product."""

    @staticmethod
    def forward(ctx, x, base, a, b, scale):
        y, low = _project(x.reshape(-1, x.shape[-1]), base, a, b, scale)
        ctx.save_for_backward(x, a, b, low)
        ctx.base, ctx.scale = base, scale
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        x, a, b, low = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        d_a, d_b, d_low = _low_rank_gradients(rows, x.reshape(-1, x.shape[-1]), b, low, ctx.scale)
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = product(rows, ctx.base).addmm_(d_low, a).view_as(x)
        return d_x, None, d_a, d_b, None


def _project(x: Tensor, base: nn.Module, a: Tensor, b: Tensor, scale: float):
    """(y [N, out], x Aᵀ [N, r])."""
    low = x @ a.t()
    y = product(x, base, transposed=True, bias=bias_of(base, x.dtype))
    return y.addmm_(low, b.t(), alpha=scale), low


def _low_rank_gradients(grad: Tensor, x: Tensor, b: Tensor, low: Tensor, scale: float):
    """Gradients of A [r, in], B [out, r] and of x Aᵀ [N, r], from the output's gradient [N, out]."""
    d_b = (low.t() @ grad).t() * scale
    d_low = (grad @ b).mul_(scale)
    return d_low.t() @ x, d_b, d_low


# --- gated MLPs -------------------------------------------------------------------------------


def _is_gated_mlp(module: nn.Module) -> bool:
    """Llama's MLP and its many copies: down(silu(gate(x)) · up(x)), and nothing else."""
    return (
        type(module).__name__ in GATED_MLPS
        and module.config.hidden_act == "silu"
        and not (module._forward_hooks or module._forward_pre_hooks)
    )


#: Classes whose forward is that formula, as read in transformers 5.
GATED_MLPS = ("LlamaMLP", "Qwen2MLP", "Qwen3MLP", "MistralMLP", "SmolLM3MLP", "Olmo2MLP", "GraniteMLP", "Ernie4_5MLP")


class _GatedMLP:
    """Forward of a gated MLP that keeps gate and up for the backward, and not their product."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden] → [..., hidden]."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        down = self.down_proj
        hooked = down._forward_hooks or down._forward_pre_hooks
        weights = down.single_adapter(up) if isinstance(down, FusedLora) and not hooked else None
        if weights is None:
            return down(_SwiGLU.apply(gate, up))
        return _SwiGLULora.apply(gate, up, down.base_layer, *weights)


def _gated(cls: type) -> type:
    return type(f"Fused{cls.__name__}", (_GatedMLP, cls), {})


class _SwiGLU(torch.autograd.Function):
    """silu(gate) · up (Shazeer 2020, arXiv 2002.05202)."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        return _swiglu_gradients(grad, *ctx.saved_tensors)


def _swiglu_gradients(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    d_gate = torch.ops.aten.silu_backward(grad * up, gate)
    return d_gate, F.silu(gate).mul_(grad)


class _SwiGLULora(torch.autograd.Function):
    """(silu(gate) · up) through a LoRA projection; the product is made again in the backward."""

    @staticmethod
    def forward(ctx, gate, up, base, a, b, scale):
        inner = F.silu(gate).mul_(up)
        y, low = _project(inner.view(-1, inner.shape[-1]), base, a, b, scale)
        ctx.save_for_backward(gate, up, a, b, low)
        ctx.base, ctx.scale = base, scale
        return y.view(*gate.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        gate, up, a, b, low = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        activated = F.silu(gate)
        inner = (activated * up).view(-1, up.shape[-1])
        d_a, d_b, d_low = _low_rank_gradients(rows, inner, b, low, ctx.scale)
        d_inner = torch.mm(rows, weight_of(ctx.base, rows.dtype), out=inner).addmm_(d_low, a).view_as(gate)
        d_up = activated.mul_(d_inner)
        d_gate = torch.ops.aten.silu_backward(d_inner.mul_(up), gate)
        return d_gate, d_up, None, d_a, d_b, None


# --- RMSNorm ----------------------------------------------------------------------------------


def _is_plain_rms_norm(module: nn.Module) -> bool:
    """weight · x / rms(x), x rounded to its dtype before the weight: Llama's order, tried on numbers."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if isinstance(module, _RMSNorm):  # it has been swapped already
        return False
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(weight, nn.Parameter) or eps is None:
        return False
    if module._forward_hooks or module._forward_pre_hooks or weight.requires_grad or weight.ndim != 1:
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, len(weight), generator=generator).to(weight.device, weight.dtype) * 3 + 1
    with torch.no_grad():
        return torch.equal(module(x), _rms_norm(x, weight, eps)[0])


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(output, 1 / rms [..., 1] in fp32)."""
    wide = x.float()
    inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (wide * inverse).to(x.dtype), inverse


class _RMSNorm:
    """Forward of an RMSNorm with a frozen weight, as one autograd node that keeps x and one number a row."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, x: Tensor) -> Tensor:
        """x [..., H] → [..., H]."""
        return _RMSNormFunction.apply(x, self.weight, self.variance_epsilon)


def _normed(cls: type) -> type:
    return type(f"Fused{cls.__name__}", (_RMSNorm, cls), {})


class _RMSNormFunction(torch.autograd.Function):
    """y = w · x̂, x̂ = x / rms(x) (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        y, inverse = _rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight, inverse = ctx.saved_tensors
        normed = x * inverse  # fp32, by promotion
        scaled = (grad * weight).float()
        return (scaled - normed * (scaled * normed).mean(-1, keepdim=True)).mul_(inverse).to(x.dtype), None, None
