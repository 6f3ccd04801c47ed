"""Keys about what trains: adapters, chosen layers, and optimisers that go with them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from trueup.config.values import (
    Int,
    Lower,
    Mapping,
    Names,
    NonNegativeFloat,
    Patterns,
    Positive,
    PositiveFloat,
    Section,
)

FinetuningType = Literal["lora", "full", "freeze", "oft", "ia3"]


class TuningSection(Section):
    finetuning_type: Annotated[FinetuningType, Lower] = "lora"
    """What trains: lora (small added matrices), full (every weight), freeze (the last layers), oft (rotations of
    layers' inputs), ia3 (one factor for each channel of some layers)."""
    additional_target: Names = []
    """Whole modules that train and are saved beside the adapter, e.g. embed_tokens."""
    create_new_adapter: bool = False
    """Leave the given adapter as it is and train a new one on top."""
    pure_bf16: bool = False
    """Keep weights and optimizer in bf16 without fp32 masters."""

    # LoRA
    lora_rank: Positive = 8
    """Width of the added matrices."""
    lora_alpha: Positive | None = None
    """Scale of the adapter; twice lora_rank when unset."""
    lora_dropout: Annotated[NonNegativeFloat, Field(lt=1)] = 0.0
    """Share of the adapter's input dropped while training."""
    lora_target: Patterns = ["all"]
    """Layers that get an adapter: all linear ones, names like q_proj,v_proj, or a regular
    expression. The name experts means the stacked weights of a mixture of experts."""
    rank_pattern: Mapping = {}
    """Ranks of single layers, by names or parts of them: {q_proj: 16}."""
    alpha_pattern: Mapping = {}
    """Scales of single layers' adapters, by names or parts of them: {q_proj: 32}."""
    loraplus_lr_ratio: PositiveFloat | None = None
    """Learning rate of LoRA's second matrix over the first's (LoRA+)."""
    loraplus_lr_embedding: PositiveFloat = 1e-6
    """LoRA+ learning rate of embedding adapters."""
    use_rslora: bool = False
    """Scale the adapter by the square root of its rank."""
    use_dora: bool = False
    """Train direction and size of the weights apart (DoRA)."""
    pissa_init: bool = False
    """Start the adapter from the weights' principal components (PiSSA)."""
    pissa_iter: Annotated[Int, Field(ge=-1)] = 16
    """Iterations of PiSSA's fast decomposition; -1 computes it exactly."""
    pissa_convert: bool = True
    """Save a PiSSA adapter as an ordinary LoRA of twice the rank, which the original model takes; always so."""
    loftq_init: bool = False
    """Start the adapter from what quantising the base has lost (LoftQ)."""

    # freeze
    freeze_trainable_layers: Int = 2
    """Layers that train: the last n, or the first n when negative; with use_llama_pro the number of inserted blocks."""
    freeze_trainable_modules: Names = ["all"]
    """Modules of those layers that train."""
    freeze_extra_modules: Names = []
    """Modules outside the layers that train too."""
    use_llama_pro: bool = False
    """Train only inserted blocks, freeze_trainable_layers of them: their weights (freeze), or adapters in them (lora);
    trueup export num_expand=N inserts N."""

    # OFT
    module_dropout: Annotated[NonNegativeFloat, Field(lt=1)] = 0.0
    """Share of OFT blocks left out while training."""
    oft_rank: Annotated[Int, Field(ge=0)] = 0
    """Number of OFT blocks; 0 to use oft_block_size."""
    oft_block_size: Annotated[Int, Field(ge=0)] = 32
    """Size of an OFT block."""
    oft_target: Patterns = ["all"]
    """Layers that get an OFT adapter."""

    # (IA)³
    ia3_target: Patterns = ["all"]
    """Layers that (IA)³ scales: all that it scales by custom (keys or queries, values, the MLP's second layer), or
    names."""

    # memory-saving optimisers
    use_galore: bool = False
    """GaLore: optimise a low-rank projection of the gradients."""
    galore_target: Patterns = ["all"]
    """Layers GaLore projects."""
    galore_rank: Positive = 16
    """Rank of GaLore's projection."""
    galore_update_interval: Positive = 200
    """Steps between new GaLore projections."""
    galore_scale: PositiveFloat = 2.0
    """Scale of GaLore's update."""
    galore_proj_type: Literal["std", "reverse_std", "right", "left", "full"] = "std"
    """Side GaLore projects on."""
    galore_layerwise: bool = False
    """Update GaLore layer by layer."""
    use_apollo: bool = False
    """APOLLO: Adam-like updates from a random low-rank projection."""
    apollo_target: Patterns = ["all"]
    """Layers APOLLO projects."""
    apollo_rank: Positive = 16
    """Rank of APOLLO's projection."""
    apollo_update_interval: Positive = 200
    """Steps between new APOLLO projections."""
    apollo_scale: PositiveFloat = 32.0
    """Scale of APOLLO's update."""
    apollo_proj: Literal["svd", "random"] = "random"
    """How APOLLO makes its projection."""
    apollo_proj_type: Literal["std", "right", "left"] = "std"
    """Side APOLLO projects on."""
    apollo_scale_type: Literal["channel", "tensor"] = "channel"
    """Whether APOLLO scales by channel or by tensor."""
    apollo_layerwise: bool = False
    """Update APOLLO layer by layer."""
    apollo_scale_front: bool = False
    """Limit the growth of norms before APOLLO scales."""
    use_adam_mini: bool = False
    """Adam-mini: one second moment for a block of weights."""
    use_muon: bool = False
    """Muon: orthogonalised updates for matrices."""
