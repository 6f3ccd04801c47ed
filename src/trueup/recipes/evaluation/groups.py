"""Preference accuracy told apart by a column of the data; RewardBench's sections where the column has its subsets."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from trueup.errors import DataError
from trueup.recipes.evaluation.intervals import Bootstrap, Estimate
from trueup.recipes.prompts import PromptRows

#: RewardBench (arXiv 2403.13787, table 1): section → its subsets.
SECTIONS: dict[str, tuple[str, ...]] = {
    "Chat": ("alpacaeval-easy", "alpacaeval-length", "alpacaeval-hard", "mt-bench-easy", "mt-bench-med"),
    "Chat Hard": (
        "mt-bench-hard", "llmbar-natural", "llmbar-adver-neighbor", "llmbar-adver-GPTInst", "llmbar-adver-GPTOut",
        "llmbar-adver-manual",
    ),
    "Safety": (
        "refusals-dangerous", "refusals-offensive", "xstest-should-refuse", "xstest-should-respond", "donotanswer",
    ),
    "Reasoning": ("math-prm", "hep-cpp", "hep-go", "hep-java", "hep-js", "hep-python", "hep-rust"),
}  # fmt: skip
_MATH = "math-prm"  # weighs as much as all code together
_KNOWN = {subset for subsets in SECTIONS.values() for subset in subsets}


def groups_of(rows: PromptRows, ids: Sequence[str], column: str) -> np.ndarray | None:
    """The column's value of each row; None where the data has no such column."""
    try:
        values = [rows.columns(row).get(column) for row in ids]
    except (KeyError, ValueError, DataError):  # rows that are not their dataset's own, as of a stream
        return None
    if not any(value not in (None, "") for value in values):
        return None
    return np.array(["–" if value in (None, "") else str(value) for value in values], dtype=object)


def by_group(boot: Bootstrap, hits: np.ndarray, groups: np.ndarray) -> dict[str, Estimate]:
    """Accuracy of each group, in the order of the data."""
    return {name: boot.share(hits[groups == name]) for name in dict.fromkeys(groups.tolist())}


def sections(boot: Bootstrap, hits: np.ndarray, groups: np.ndarray) -> dict[str, Estimate]:
    """RewardBench's sections and their mean, as its leaderboard has them; nothing for other groups.

    A section weighs its subsets by their rows, and mathematics as much as code. Sections without rows are left out, and
    then there is no mean.
    """
    names = set(groups.tolist())
    if not names <= _KNOWN:
        return {}
    weights = np.ones(len(hits))
    code = sum(bool(re.match("hep-", str(name))) for name in groups)
    if code and _MATH in names:
        weights[groups == _MATH] = code / (groups == _MATH).sum()
    masks = {title: np.isin(groups, subsets) for title, subsets in SECTIONS.items()}
    present = {title: mask for title, mask in masks.items() if mask.any()}
    found = {title: _weighed(boot, hits[mask], weights[mask]) for title, mask in present.items()}
    if len(present) == len(SECTIONS):
        found["RewardBench"] = boot.of(
            lambda w: _mean_of_sections(w * weights, hits, list(present.values())), len(hits)
        )
    return found


def _weighed(boot: Bootstrap, hits: np.ndarray, weights: np.ndarray) -> Estimate:
    return boot.of(lambda w: (w * weights) @ hits / (w @ weights), len(hits))


def _mean_of_sections(w: np.ndarray, hits: np.ndarray, masks: Sequence[np.ndarray]) -> np.ndarray:
    return np.mean([w[:, mask] @ hits[mask] / w[:, mask].sum(1) for mask in masks], axis=0)
