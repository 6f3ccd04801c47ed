"""Writes trl_values.json: the losses of TRL's own trainers on fixed tensors. Run it in an environment that has TRL.

    python tests/objectives/make_trl_values.py

TRL computes its losses inside `_compute_loss`, from a model's outputs; the outputs are stood in for by tensors, so that
what runs is TRL's code from the log-probabilities on. One value per token: each answer's log-probability sits in its
first token, and the others are 0.
"""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
import trl
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

ROWS = [
    [-10, -20.5, -33], [-12.5, -18, -41], [5, 8, 13], [6, 4, 16], [-11.2, -20.1, -34], [-13.9, -18.7, -36.5],
]  # fmt: skip
CHOSEN, REJECTED, CHOSEN_LEN, REJECTED_LEN, REF_CHOSEN, REF_REJECTED = (
    torch.tensor(row, dtype=torch.float64) for row in ROWS
)
SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")
DPO = [
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sigmoid_norm",
]  # fmt: skip


class Gatherer:
    """The accelerator of one process."""

    device = torch.device("cpu")

    def gather(self, value):
        return value

    gather_for_metrics = gather


def dpo(loss: str, divergence: str = "reverse_kl", weighting: bool = False) -> float:
    """DPOTrainer's loss of the three pairs."""
    width = int(max(CHOSEN_LEN.max(), REJECTED_LEN.max()))
    lengths = torch.cat([CHOSEN_LEN, REJECTED_LEN]).long()
    answers = (torch.arange(width) < lengths[:, None]).long()
    mask = torch.cat([torch.zeros(6, 1, dtype=torch.long), answers], 1)  # one token of prompt

    def tokens(sums: torch.Tensor) -> torch.Tensor:
        values = torch.zeros(6, width, dtype=torch.float64)
        values[:, 0] = sums
        return values

    policy = tokens(torch.cat([CHOSEN, REJECTED]))
    outputs = SimpleNamespace(
        log_probs=policy,
        log_sum_sq_probs=-0.3 * answers.double(),
        entropy=torch.zeros(6, width, dtype=torch.float64),
        mean_logits=torch.zeros(6, width, dtype=torch.float64),
        is_top1=torch.zeros(6, width, dtype=torch.bool),
    )

    class Model:
        training = False

        def __call__(self, **_):
            return outputs

    this = SimpleNamespace(
        model=Model(), accelerator=Gatherer(), aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True,
        f_divergence_type=divergence, f_alpha_divergence_coef=0.5, beta=0.1, loss_types=[loss], loss_weights=[1.0],
        label_smoothing=0.1 if loss in SMOOTHED else 0.0, args=SimpleNamespace(discopop_tau=0.05),
        use_weighting=weighting, _metrics={"eval": defaultdict(list), "train": defaultdict(list)},
        _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    inputs = {
        "input_ids": torch.zeros(6, width + 1, dtype=torch.long), "attention_mask": mask, "completion_mask": mask,
        "ref_chosen_logps": REF_CHOSEN, "ref_rejected_logps": REF_REJECTED,
    }  # fmt: skip
    return float(DPOTrainer._compute_loss(this, this.model, inputs, False))


def kto(loss: str, weights: tuple[float, float] = (1.0, 1.0)) -> float:
    """KTOTrainer's loss of the six answers; the mismatched pairs' log-ratios have mean 0.05."""
    sums = torch.cat([CHOSEN, REJECTED])

    class Model:
        training = False

        def __call__(self, **_):
            zeros = torch.zeros(6, 1, dtype=torch.float64)
            return SimpleNamespace(log_probs=sums[:, None], entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())

    this = SimpleNamespace(
        model=Model(), accelerator=Gatherer(), aux_loss_enabled=False, precompute_ref_logps=True, beta=0.1,
        calculate_KL=loss == "kto", loss_type=loss, desirable_weight=weights[0], undesirable_weight=weights[1],
        _compute_kl_logps=lambda model, batch: torch.full((6,), -7.95, dtype=torch.float64),
        _metrics={"eval": defaultdict(list), "train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    mask = torch.ones(6, 2, dtype=torch.long)
    inputs = {
        "input_ids": torch.zeros(6, 2, dtype=torch.long), "attention_mask": mask, "completion_mask": mask,
        "label": torch.tensor([True] * 3 + [False] * 3), "ref_logps": torch.cat([REF_CHOSEN, REF_REJECTED]),
        "ref_KL_logps": torch.full((6,), -8.0, dtype=torch.float64),
    }  # fmt: skip
    return float(KTOTrainer._compute_loss(this, this.model, inputs, False))


def cpo(loss: str, beta: float, average: bool, alpha: float = 0.0, smoothing: float = 0.0) -> float:
    """CPOTrainer's preference loss of the three pairs."""
    this = SimpleNamespace(
        alpha=alpha, loss_type=loss, beta=beta, simpo_gamma=0.5, label_smoothing=smoothing, accelerator=Gatherer()
    )
    scale = (CHOSEN_LEN, REJECTED_LEN) if average else (1, 1)
    return float(CPOTrainer.cpo_loss(this, CHOSEN / scale[0], REJECTED / scale[1])[0].mean())


def orpo() -> float:
    """ORPOTrainer's odds-ratio term of the three pairs at β 1; TRL computes it in fp32."""
    this = SimpleNamespace(beta=1.0, accelerator=Gatherer())
    return -float(ORPOTrainer.odds_ratio_loss(this, CHOSEN / CHOSEN_LEN, REJECTED / REJECTED_LEN)[0].mean())


def main() -> None:
    values = {name: dpo(name) for name in DPO}
    # TRL's table of clamps has no float64, and its trainers never see it.
    values |= {
        f"{name}+{d}": dpo(name, d) for name in ("sigmoid", "hinge", "ipo") for d in ("forward_kl", "js_divergence")
    }
    values |= {f"{name}+weighting": dpo(name, weighting=True) for name in ("sigmoid", "hinge")}
    values |= {name: kto(name) for name in ("kto", "apo_zero_unpaired")} | {"kto+weights": kto("kto", (2.0, 0.5))}
    values |= {
        "cpo": cpo("sigmoid", 0.1, average=False),
        "cpo+smoothing": cpo("sigmoid", 0.1, average=False, smoothing=0.1),
        "simpo": cpo("simpo", 2.0, average=True),
        "alphapo": cpo("simpo", 2.0, average=True, alpha=0.25),
        "orpo_odds": orpo(),
    }
    assert all(map(math.isfinite, values.values()))
    path = Path(__file__).with_name("trl_values.json")
    path.write_text(json.dumps({"trl": trl.__version__, "values": values}, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"{path}: {len(values)} values of TRL {trl.__version__}\n")


if __name__ == "__main__":
    main()
