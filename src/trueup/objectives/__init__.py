"""Objectives as pure functions; importing the package fills the registry."""

from trueup.objectives import pairwise, reference_free, sft, unpaired
from trueup.objectives.registry import OBJECTIVES, Objective, objective

__all__ = ["OBJECTIVES", "Objective", "objective", "pairwise", "reference_free", "sft", "unpaired"]
