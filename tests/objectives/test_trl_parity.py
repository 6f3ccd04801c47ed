"""The same values as TRL's own trainers on the same tensors; `make_trl_values.py` says how they were made.

Where TRL differs, it is by choice, and the objective's docstring says so: `ipo_sum`, a running shift in `bco_pair`, the
sort of a whole step in `aot`, cDPO's smoothing, LD-DPO on the policy alone, ORPO's likelihood without the prompt.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from tests.objectives.vector import evaluate, mean, pairs
from trueup.objectives import pairwise, reference_free

TRL = json.loads(Path(__file__).with_name("trl_values.json").read_text(encoding="utf-8"))["values"]
SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")


SINGLE = ("kto", "apo_zero_unpaired")
FP32 = {"exo_pair": 1e-7}  # TRL takes the logarithms of ε in fp32


@pytest.mark.parametrize("name", [name for name in TRL if "+" not in name and name not in ("orpo_odds", *SINGLE)])
def test_losses(name: str) -> None:
    keywords = {"label_smoothing": 0.1} if name in SMOOTHED else {}
    assert float(mean(evaluate(name, pairs(), **keywords))) == pytest.approx(TRL[name], abs=FP32.get(name, 1e-8))


@pytest.mark.parametrize("name", [*SINGLE, "kto+weights"])
def test_losses_of_single_answers(name: str) -> None:
    keywords: dict = {"mismatched": torch.full((6,), 0.05).double()} if "kto" in name else {}
    if name.endswith("weights"):
        keywords |= {"desirable_weight": 2.0, "undesirable_weight": 0.5}
    value = mean(evaluate(name.split("+")[0], pairs(), **keywords), 6)
    assert float(value) == pytest.approx(TRL[name], abs=1e-8)


@pytest.mark.parametrize("name", [name for name in TRL if name.endswith(("forward_kl", "js_divergence"))])
def test_losses_under_other_divergences(name: str) -> None:
    loss, divergence = name.split("+")
    assert float(mean(evaluate(loss, pairs(), divergence=divergence))) == pytest.approx(TRL[name], abs=1e-8)


def test_smoothed_cpo() -> None:
    assert float(mean(evaluate("cpo", pairs(), label_smoothing=0.1))) == pytest.approx(TRL["cpo+smoothing"], abs=1e-8)


def test_odds_ratio_term() -> None:
    """TRL computes it in fp32."""
    whole = reference_free.orpo(pairs(), beta=1.0).sum - pairwise.chosen_nll(pairs())
    assert float(whole) / 3 == pytest.approx(TRL["orpo_odds"], abs=1e-7)


@pytest.mark.parametrize("name", ["sigmoid", "hinge"])
def test_weights_of_pairs(name: str) -> None:
    """Σ_v π(v)² was e^−0.3 at every token."""
    logps = pairs()
    weight = torch.exp(logps.chosen / logps.chosen_len + logps.rejected / logps.rejected_len + 0.6)
    weighed = dataclasses.replace(logps, weight=weight)
    assert float(mean(evaluate(name, weighed))) == pytest.approx(TRL[f"{name}+weighting"], abs=1e-8)
