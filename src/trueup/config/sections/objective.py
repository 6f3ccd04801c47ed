"""Keys about what is learnt: the stage, the preference loss, the reference."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from trueup.config.values import (
    Bits,
    Float,
    Fraction,
    Lower,
    Names,
    NonNegativeFloat,
    Numbers,
    Positive,
    PositiveFloat,
    Section,
)


def _one_or_several(value: Any) -> Any:
    """`sigmoid`, or several between commas or in a list; a list of one is the one."""
    if isinstance(value, str):
        value = [word.strip().strip("'\"") for word in value.strip().strip("[]").split(",")]
    if not isinstance(value, list):
        return value
    names = [name.strip().lower() if isinstance(name, str) else name for name in value]
    return names[0] if len(names) == 1 else names


Losses = Annotated[str | list[str], BeforeValidator(_one_or_several)]


class ObjectiveSection(Section):
    stage: Annotated[str, Lower] = "sft"
    """What to do: pt (plain text), sft (answers), dpo (preferred over rejected answers), rm, ppo,
    kto …"""

    # preference losses
    pref_loss: Losses = "sigmoid"
    """Loss on preferences; sigmoid is DPO. Several are added up: sigmoid,bco_pair,sft."""
    custom_objective: str | None = None
    """A loss of a Python program, in the place of the stage's own; trueup.train(objective=…) sets it."""
    loss_weights: Numbers = []
    """Weight of each loss when pref_loss names several; unset: 1 each."""
    pref_beta: PositiveFloat = 0.1
    """How firmly the model is held to its reference: 0.01 bold, 0.1 usual, 0.5 careful. Unset: as the loss's paper."""
    pref_ftx: NonNegativeFloat = 0.0
    """Weight of an added SFT loss on the chosen (or wanted) answers; unset: 1 with cpo, else 0."""
    dpo_label_smoothing: Annotated[NonNegativeFloat, Field(lt=0.5)] = 0.0
    """Share of labels taken to be wrong (cDPO); unset: 0.1 with robust, 0.001 with exo_pair, else 0."""
    pref_bco_weight: NonNegativeFloat = 0.0
    """Weight w of an added BCO loss; the sum is divided by 1 + w."""
    f_divergence_type: Annotated[Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"], Lower] = (
        "reverse_kl"
    )
    """What holds the model to its reference (f-DPO): reverse_kl is DPO's own."""
    f_alpha_divergence_coef: Float = 0.5
    """Order of the alpha divergence: 1 is the reverse, 0 the forward KL."""
    discopop_tau: PositiveFloat = 0.05
    """How sharply DiscoPOP passes from its logistic to its exponential part."""
    dpop_lambda: NonNegativeFloat = 50.0
    """Price of a chosen answer less likely than under the reference (DPO-positive)."""
    rdpo_alpha: NonNegativeFloat = 0.01
    """Price of a token of length (R-DPO)."""
    tdpo_alpha: NonNegativeFloat = 0.5
    """Weight of the divergence over the vocabulary (TDPO2)."""
    simpo_gamma: NonNegativeFloat = 0.5
    """Margin SimPO and AlphaPO ask for between the two answers; unset: 1 with simpo, 0.1 with alphapo."""
    alphapo_alpha: Float = 0.25
    """Shape of AlphaPO's reward: 0 is the log-probability, as in SimPO."""
    ld_alpha: Fraction | None = None
    """LD-DPO: weight of the tokens by which one answer is longer; unset: 1, all tokens alike."""
    ld_reference: bool = True
    """LD-DPO: weigh the reference's tokens in the same way (as TRL); false: the policy's alone (as LLaMA-Factory)."""
    use_weighting: bool = False
    """WPO: weigh each pair by how likely the model would have written it."""
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
    sync_ref_model: bool = False
    """TR-DPO: the reference follows the model, every ref_model_sync_steps steps."""
    ref_model_mixup_alpha: Annotated[PositiveFloat, Field(le=1)] = 0.6
    """TR-DPO: share of the model in the new reference; 1 replaces it."""
    ref_model_sync_steps: Positive = 512
    """TR-DPO: optimizer steps between two updates of the reference."""

    # variants of the SFT loss
    use_dft_loss: bool = False
    """DFT: weigh each token's loss by its probability, so that tokens the model finds absurd count little."""
    use_asft_loss: bool = False
    """ASFT: DFT with a KL anchor."""
    asft_alpha: NonNegativeFloat = 0.1
    """Weight of ASFT's anchor."""
    use_eaft_loss: bool = False
    """EAFT: weigh each token's loss by how unsure the model is there, so that what it knows is not overwritten."""
    eaft_alpha: NonNegativeFloat = 1.0
    """Power of EAFT's weights; 0 is the plain loss."""
