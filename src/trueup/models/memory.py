"""What a training step keeps in memory for its backward, what is free, and which layers therefore recompute.

The figures follow what the layers hand to autograd: the fused ones of `models/fused.py` and `models/attention.py` where
they apply, transformers' own elsewhere. tests/models/test_memory.py compares them with what autograd really keeps;
docs/log.md with the memory of whole processes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from trueup.config.optimizer_state import state_bytes
from trueup.config.optimizers import read_arguments
from trueup.config.schema import TrainSection, TuningSection
from trueup.config.sections.model import UNFUSED
from trueup.errors import ModelError
from trueup.models.attention import kernels_for
from trueup.models.device_memory import free_memory
from trueup.models.fused import GATED_MLPS
from trueup.models.logprobs import FP32, bytes_of_logit, tile_of
from trueup.models.tuners import ADAPTERS

#: Of the memory that is free, what a plan may use: kernels' own buffers, fragments and other programs have the rest.
USABLE = 0.85

#: What an allocator takes for what it is asked for (docs/log.md, 2026-11-21).
SLACK = 1.1


@dataclass(frozen=True)
class LayerCosts:
    """Bytes of activations a token of a micro-batch."""

    layers: int  # decoder layers that keep anything: those from the first trained one on
    kept: int  # by one such layer
    entry: int  # by one that recomputes: its input
    outside: int  # by the final norm and the head
    passing: int  # gradients and values on their way through one layer
    holes: int = 0  # memory that is free and cannot be used, where layers recompute
    offloaded: bool = False  # what is kept waits elsewhere, but for the layer at work

    def needed(self, tokens: int, recomputing: int = 0) -> int:
        """Peak for so many tokens when the first `recomputing` layers recompute.

        The backward comes to those last, when the others have let go of theirs, one at a time.
        """
        whole = max(self.layers - recomputing, min(1, self.layers))
        kept, entries = (min(1, whole), 0) if self.offloaded else (whole, recomputing)
        alive = kept * self.kept + entries * self.entry + self.outside + self.passing
        alive += self.holes if recomputing else 0
        return int(SLACK * tokens * alive)

    def fewest(self, tokens: int, room: int) -> int:
        """How few layers have to recompute to fit; all of them if even that does not."""
        return next((n for n in range(self.layers) if self.needed(tokens, n) <= room), self.layers)


def layer_costs(
    base: PreTrainedModel,
    tuning: TuningSection,
    dtype: torch.dtype,
    device: torch.device,
    booster: str = "auto",
    offloaded: bool = False,
) -> LayerCosts:
    """Costs of a model as it is set up for training; its shapes are enough (meta device).

    Args:
        booster: `booster`; fused layers keep less, as does attention over shared prompts.
        offloaded: `activation_offloading`.
    """
    layers = find_layers(base) or nn.ModuleList()  # in an unusual architecture the shapes alone have to do
    text = base.config.get_text_config()
    width, hidden = dtype.itemsize, text.hidden_size
    layer = layers[-1] if len(layers) else nn.Module()
    frozen = tuning.finetuning_type in ADAPTERS
    shares, fuses = booster != "none", booster not in UNFUSED
    in_blocks = shares and _in_blocks(device, dtype)
    per_token = sum(_norm_bytes(name, norm, text, width, frozen, fuses) for name, norm in layer.named_modules())
    per_token += _attention_bytes(text, width, in_blocks or (shares and kernels_for(device, dtype)[0]))
    per_token += _mlp_bytes(layer, text, width, tuning, fuses)
    per_token += _input_bytes(text, width, tuning)
    copies, holes = _copies(tuning, device, dtype)
    query, key = _head_columns(text)
    in_attention = 0 if in_blocks else 8 * (query + key) * width
    return LayerCosts(
        layers=(len(layers) or depth_of(base.config)) - _first_trained(base, layers),
        kept=per_token,
        entry=hidden * width,
        outside=4 * hidden * width,
        passing=copies * inner_size(text) * width + hidden * (8 * width + 6 * FP32) + in_attention,
        holes=holes * inner_size(text) * width,
        offloaded=offloaded and device.type != "cpu",
    )


def _copies(tuning: TuningSection, device: torch.device, dtype: torch.dtype) -> tuple[int, int]:
    """How many copies of a layer's widest values are on their way through it, and how many more lie in holes of glibc's
    heap while layers recompute: what is freed there is not always used again, and never given back
    (`models/allocator.py`). Fitted on whole processes (docs/log.md).
    """
    if device.type != "cpu":
        return 6, 0
    adapter = tuning.finetuning_type in ADAPTERS
    dropped = 20 if adapter and tuning.lora_dropout else 0  # each projection has an input of its own
    if dtype == torch.bfloat16:
        return 12 + dropped, 0
    return (10 + dropped if adapter else 0), 10


def inner_size(text) -> int:
    """Columns of the MLP a token goes through; of all its experts together."""
    experts = getattr(text, "num_experts_per_tok", None)
    names = ("moe_intermediate_size", "intermediate_size", "ffn_hidden_size")  # the last is ChatGLM's
    of_expert = next((size for name in names if (size := getattr(text, name, None))), None)
    return (of_expert or 4 * text.hidden_size) * (experts or 1)


def _norm_bytes(name: str, norm: nn.Module, text, width: int, frozen: bool, fuses: bool) -> int:
    if not type(norm).__name__.endswith("Norm"):
        return 0
    query, key = _head_columns(text)
    columns = {"q_norm": query, "k_norm": key}.get(name.rpartition(".")[2], text.hidden_size)
    fused = fuses and frozen and hasattr(norm, "variance_epsilon")
    if fused:
        return columns * width
    return columns * FP32 + (0 if frozen else columns * width)  # the input in fp32; normed, for the weight's gradient


def _head_columns(text) -> tuple[int, int]:
    heads = getattr(text, "num_attention_heads", None) or 1
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return heads * size, (getattr(text, "num_key_value_heads", None) or heads) * size


def _in_blocks(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether attention is `models/blocks.py`, which needs next to nothing beside what it keeps."""
    return device.type == "cpu" and dtype == torch.bfloat16


def _attention_bytes(text, width: int, gathers: bool) -> int:
    query, key = _head_columns(text)
    own = (2 * query + 2 * key) * width  # queries, output, keys, values
    if gathers:
        return own  # keys of paths are gathered again in the backward
    return own + 3 * key * width + query * width  # keys and values of every path, and the output in pieces


def _mlp_bytes(layer: nn.Module, text, width: int, tuning: TuningSection, fuses: bool) -> int:
    names = {type(module).__name__.removeprefix("Fused") for module in layer.modules()}
    activation = getattr(text, "hidden_act", None)
    if not fuses or activation != "silu" or not names.intersection(GATED_MLPS):
        return 4 * inner_size(text) * width  # gate, its activation, up, their product
    return (2 if tuning.finetuning_type == "lora" else 3) * inner_size(text) * width  # LoRA makes the product again


def _input_bytes(text, width: int, tuning: TuningSection) -> int:
    """Inputs of attention and MLP, and LoRA's low-rank values; with dropout each projection's own input and mask."""
    low = 7 * tuning.lora_rank if tuning.finetuning_type == "lora" else 0
    rotated = tuning.finetuning_type in ("oft", "ia3")  # each projection has an input of its own
    if not (rotated or (low and tuning.lora_dropout)):
        return (2 * text.hidden_size + low) * width
    query, _ = _head_columns(text)
    return (2 * (5 * text.hidden_size + query + inner_size(text)) + low) * width


def _first_trained(base: PreTrainedModel, layers: nn.ModuleList) -> int:
    """Below the first trained layer nothing is kept, unless the embeddings train."""
    if any(p.requires_grad for p in base.get_input_embeddings().parameters()):
        return 0
    if not len(layers):
        return 0
    trained = [i for i, layer in enumerate(layers) if any(p.requires_grad for p in layer.parameters())]
    return trained[0] if trained else len(layers)


def decoder_layers(base: PreTrainedModel) -> nn.ModuleList:
    """The layers a hidden state goes through in turn.

    Raises:
        ModelError: they cannot be found.
    """
    layers = find_layers(base)
    if layers is None:
        raise ModelError(
            f"cannot find the decoder layers of {type(base).__name__}", where="finetuning_type: freeze",
            fix="use finetuning_type: lora or full",
        )  # fmt: skip
    return layers


def depth_of(config: PretrainedConfig) -> int:
    """How many layers a model has; code of repositories has names of its own (ChatGLM: num_layers)."""
    text = config.get_text_config()
    return getattr(text, "num_hidden_layers", None) or getattr(text, "num_layers", 0)


def find_layers(base: PreTrainedModel) -> nn.ModuleList | None:
    """The same, or None."""
    depth = depth_of(base.config)
    lists = (module for module in base.modules() if isinstance(module, nn.ModuleList))
    return next((layers for layers in lists if len(layers) == depth), None)


# --- what is decided ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Recomputation:
    """How many of the decoder layers recompute their activations, and what that rests on (bytes; 0 where unknown)."""

    recomputing: int
    layers: int
    activations: int = 0  # kept if no layer recomputes
    needed: int = 0  # as decided
    room: int = 0


def decide(mode: str, costs: LayerCosts, tokens: int, room: int) -> Recomputation:
    """Which layers recompute under `gradient_checkpointing: mode`.

    auto keeps what fits; selective takes half of the layers, and like auto more where memory asks for it.

    Args:
        tokens: of the largest micro-batch.
        room: bytes for its activations.
    """
    needed = costs.fewest(tokens, room)
    chosen = {"off": 0, "full": costs.layers, "selective": max(needed, costs.layers // 2), "auto": needed}[mode]
    return Recomputation(
        chosen, costs.layers, costs.needed(tokens), costs.needed(tokens, chosen), room if tokens else 0
    )


def fit_to_memory(
    base: PreTrainedModel,
    tuning: TuningSection,
    train: TrainSection,
    tokens: int | None = None,
    reserved: int = 0,
    booster: str = "auto",
) -> Recomputation:
    """Decide which layers of a model on its device recompute, and let them.

    Where the size of the largest micro-batch is unknown (None), `auto` recomputes all layers on accelerators (memory
    binds) and none on CPUs (time binds).

    Args:
        reserved: bytes for what is not loaded yet and stays beside the model (a reference).
        booster: `booster`, which says which layers are in use.
    """
    device, dtype, mode = base.device, base.dtype, train.gradient_checkpointing
    costs = layer_costs(base, tuning, dtype, device, booster, train.activation_offloading)
    if tokens is None:
        unknown = "off" if device.type == "cpu" else "full"
        plan = decide(unknown if mode == "auto" else mode, costs, 0, 0)
    else:
        taken = optimizer_bytes(base, train, dtype, device) + head_bytes(base, dtype, device) + reserved
        room = int(USABLE * free_memory(device)) - taken
        plan = decide(mode, costs, tokens, max(room, 0))
    recompute(base, plan.recomputing)
    return plan


def recompute(base: PreTrainedModel, count: int) -> None:
    """Let the first `count` of the layers that train recompute, and no others."""
    if base.is_activation_checkpointing:
        base.activation_checkpointing_disable()
    if not count:
        return
    base.activation_checkpointing_enable({"use_reentrant": False})
    base.disable_input_require_grads()  # only the reentrant form needs them; they would reach below what trains
    layers = find_layers(base)
    if layers is None:  # then all
        return
    for layer in layers[_first_trained(base, layers) + count :]:
        layer.gradient_checkpointing = False


def moments_bytes(base: nn.Module, train: TrainSection) -> int:
    """The state of `optim` for what trains."""
    shapes = {name: tuple(p.shape) for name, p in base.named_parameters() if p.requires_grad}
    return state_bytes(shapes, train.optim, read_arguments(train.optim, train.optim_args), train.optim_target_modules)


def optimizer_bytes(base: nn.Module, train: TrainSection, dtype: torch.dtype, device: torch.device) -> int:
    """fp32 gradients, fp32 masters of what computes in another format, and the optimizer's state; none where the host
    keeps them for a GPU.
    """
    if train.offload_optimizer and device.type != "cpu":
        return 0
    trainable = sum(p.numel() for p in base.parameters() if p.requires_grad)
    return trainable * FP32 * (1 if dtype == torch.float32 else 2) + moments_bytes(base, train)


def head_bytes(base: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> int:
    """The logits held at once, and what trains of the head: its gradient in fp32 and as the backward hands it on; a
    reward has no logits.
    """
    output = base.get_output_embeddings()
    if output is None:  # a head of one number
        return 0
    rows, columns = tile_of(output, device, dtype)
    trained = sum(p.numel() for p in output.parameters() if p.requires_grad)
    return rows * columns * bytes_of_logit(output, dtype) + (dtype.itemsize + FP32) * trained
