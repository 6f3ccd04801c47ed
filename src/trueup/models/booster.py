"""`booster`: which faster kernels a model computes with.

fused     the fused layers of `models/fused.py` and the attention over forests of `models/attention.py`, where they
          reproduce the model's own numbers on this device (tried at load); what is in them was chosen by measurement
          (docs/log.md)
attention   transformers' own layers with that attention
auto      one of the two: fused, unless a trial before training finds them slower (recipes/boosting.py)
flash_attn  as fused, with flash-attention 2 where prompts are not shared and where answers are generated
liger     Liger's Triton layers in place of ours; LoRA and attention as with auto
none      transformers' own layers and attention: a row a sequence, padded
"""

from __future__ import annotations

import importlib.util
import logging

import torch
from transformers import PreTrainedModel
from transformers.integrations.liger import apply_liger_kernel

from trueup.config.sections.model import UNFUSED
from trueup.errors import ModelError
from trueup.models.fused import fuse, unfuse
from trueup.models.policy import Policy
from trueup.models.trial import disagreement, limit_of

log = logging.getLogger("trueup")

PLAIN = "booster: none"


def check_booster(booster: str, device: torch.device) -> None:
    """Whether a booster can be had on this device.

    Raises:
        ModelError: Liger's kernels are not installed, or not for such a device.
    """
    if booster != "liger":
        return
    if device.type != "cuda":
        raise ModelError(
            f"Liger's kernels run on GPUs, and this run is on {device}", where="booster", expected="device: cuda",
            fix="booster: auto, which has fused layers for this device too",
        )  # fmt: skip
    if importlib.util.find_spec("liger_kernel") is None:
        raise ModelError(
            "booster: liger needs the package liger-kernel, which is not installed", where="booster",
            fix="pip install liger-kernel; or booster: auto",
        )  # fmt: skip


def take_liger(base: PreTrainedModel) -> None:
    """Swap Liger's layers in; the losses stay ours, which never hold whole logits."""
    apply_liger_kernel(base, {"cross_entropy": False, "fused_linear_cross_entropy": False})


def boost(policy: Policy, booster: str) -> str:
    """Give a policy its kernels, prove its layout, and tell in a line which they are.

    Raises:
        ModelError: `verify_layout` does, or the booster cannot be had.
    """
    check_booster(booster, policy.device)
    policy.boosted = booster not in UNFUSED
    if booster == "none":
        policy.verify_layout(plain=PLAIN)
        return f"none: transformers' own layers and attention ({policy.plain_attention})"
    if booster == "liger":
        take_liger(policy.base)
    fused = fuse(policy.model) if policy.boosted else 0
    differs = _mind_numbers(policy) if fused else ""
    policy.verify_layout()
    if not policy.boosted:
        return f"{booster}: transformers' own layers; {_attention(policy)}{differs}"
    return f"{booster}: {fused} fused layers{', beside Liger’s' if booster == 'liger' else ''}; {_attention(policy)}"


def _mind_numbers(policy: Policy) -> str:
    """Compare fused layers with the model's own, and leave its own where they differ; what to tell then."""
    try:
        policy.gap = disagreement(policy)
    except Exception as error:  # layers called in a way of their own: they run, and are no reason not to
        log.warning(
            "fused layers could not be compared with this model's own, and are used all the same; booster: attention "
            "does without them: %s: %s", type(error).__name__, error,
        )  # fmt: skip
        return ""
    if policy.gap <= limit_of(policy.dtype):
        return ""
    leave_own_layers(policy)
    found = f"fused layers give other numbers than this model's own ({policy.gap:.2g} of their size)"
    log.warning("%s, which are used therefore", found)
    return f"; {found}"


def leave_own_layers(policy: Policy) -> None:
    """From `fused` to `attention`."""
    unfuse(policy.model)
    policy.boosted = False


def _attention(policy: Policy) -> str:
    if not policy.shared:
        return f"transformers' attention ({policy.plain_attention})"
    if policy.gathered:
        return "attention over shared prompts in one call of torch's flash kernel"
    in_blocks = policy.device.type == "cpu" and policy.dtype == torch.bfloat16
    return f"attention over shared prompts {'in blocks' if in_blocks else 'by torch, segment by segment'}"
