"""Keys about what is learnt: the stage, the preference loss, the reference."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from trueup.config.values import (
    Bits,
    Fraction,
    Lower,
    Names,
    NonNegativeFloat,
    PositiveFloat,
    Section,
)


class ObjectiveSection(Section):
    stage: Annotated[str, Lower] = "sft"
    """What to do: pt (plain text), sft (answers), dpo (preferred over rejected answers), rm, ppo,
    kto …"""

    # preference losses
    pref_loss: Annotated[str, Lower] = "sigmoid"
    """Loss on preference pairs; sigmoid is DPO."""
    pref_beta: PositiveFloat = 0.1
    """How firmly the model is held to its reference: 0.01 bold, 0.1 usual, 0.5 careful."""
    pref_ftx: NonNegativeFloat = 0.0
    """Weight of an added SFT loss on the chosen answer."""
    dpo_label_smoothing: Annotated[NonNegativeFloat, Field(lt=0.5)] = 0.0
    """Share of labels taken to be wrong (cDPO)."""
    pref_bco_weight: NonNegativeFloat = 0.0
    """Weight of an added BCO loss."""
    simpo_gamma: NonNegativeFloat = 0.5
    """Margin SimPO asks for between the two answers."""
    ld_alpha: Fraction | None = None
    """LD-DPO: weight of the tokens by which one answer is longer."""
    knowledge_weight: NonNegativeFloat = 0.0
    """Weight of the SFT loss on question-answer rows mixed into the preference pairs."""
    kto_chosen_weight: PositiveFloat = 1.0
    """Weight of desirable answers in KTO."""
    kto_rejected_weight: PositiveFloat = 1.0
    """Weight of undesirable answers in KTO."""

    # reference
    ref_model: str | None = None
    """A reference other than the policy as it stands before the first step."""
    ref_model_adapters: Names = []
    """Adapters of ref_model."""
    ref_model_quantization_bit: Bits | None = None
    """Quantise ref_model to this many bits."""
    precompute_ref_log_probs: bool = True
    """Compute the reference's log-probs once and keep them; false computes them in every step."""

    # variants of the SFT loss
    use_dft_loss: bool = False
    """DFT: weigh each token's loss by its probability."""
    use_asft_loss: bool = False
    """ASFT: DFT with a KL anchor."""
    asft_alpha: NonNegativeFloat = 0.1
    """Weight of ASFT's anchor."""
    use_eaft_loss: bool = False
    """EAFT: weigh each token's loss by its entropy."""
    eaft_alpha: NonNegativeFloat = 1.0
    """Power of EAFT's weights."""
