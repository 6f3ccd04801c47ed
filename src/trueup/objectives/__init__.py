"""Objectives as pure functions; importing the package fills the registry."""

from trueup.objectives import pairwise, ranking, reference_free, sft, unpaired
from trueup.objectives.registry import OBJECTIVES, Objective, objective

__all__ = ["OBJECTIVES", "Objective", "objective", "pairwise", "ranking", "reference_free", "sft", "unpaired"]
