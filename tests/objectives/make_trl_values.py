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
from trl.trainer.reward_trainer import RewardTrainer

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


def tokens(sums: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """[answers, longest]: what each token has of its answer's log-probability, zeros after the end."""
    number = torch.arange(1, int(lengths.max()) + 1, dtype=sums.dtype)
    share = torch.where(number <= lengths[:, None], number, 0.0)
    return sums[:, None] * share / share.sum(1, keepdim=True)


class Model(torch.nn.Module):
    """Stands in for a model whose log-probabilities are these."""

    is_gradient_checkpointing = False

    def __init__(self, log_probs: torch.Tensor, answers: torch.Tensor) -> None:
        super().__init__()
        self.training = False
        zeros = torch.zeros_like(log_probs)
        self.outputs = SimpleNamespace(
            log_probs=log_probs, log_sum_sq_probs=-0.3 * answers, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
        )

    def forward(self, **_):
        return self.outputs


def dpo(loss: str | list[str], divergence: str = "reverse_kl", weighting: bool = False, ld_alpha: float | None = None,
        weights: list[float] | None = None, dtype: torch.dtype = torch.float64) -> float:  # fmt: skip
    """DPOTrainer's loss of the three pairs."""
    lengths = torch.cat([CHOSEN_LEN, REJECTED_LEN]).long()
    policy, reference = (
        tokens(torch.cat(pair).to(dtype), lengths) for pair in ((CHOSEN, REJECTED), (REF_CHOSEN, REF_REJECTED))
    )
    answers = (torch.arange(policy.shape[1]) < lengths[:, None]).long()
    mask = torch.cat([torch.zeros(6, 1, dtype=torch.long), answers], 1)  # one token of prompt
    losses = [loss] if isinstance(loss, str) else loss
    this = SimpleNamespace(
        model=Model(policy, answers.to(dtype)), ref_model=Model(reference, answers.to(dtype)), accelerator=Gatherer(),
        aux_loss_enabled=False, ld_alpha=ld_alpha, precompute_ref_logps=False, f_divergence_type=divergence,
        f_alpha_divergence_coef=0.5, beta=0.1, loss_types=losses, loss_weights=weights or [1.0],
        label_smoothing=0.1 if loss in SMOOTHED else 0.0, use_weighting=weighting,
        args=SimpleNamespace(discopop_tau=0.05, gradient_checkpointing_kwargs=None),
        _metrics={"eval": defaultdict(list), "train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    inputs = {"input_ids": torch.zeros_like(mask), "attention_mask": mask, "completion_mask": mask}
    return float(DPOTrainer._compute_loss(this, this.model, inputs, False))


def kto(loss: str, weights: tuple[float, float] = (1.0, 1.0)) -> float:
    """KTOTrainer's loss of the six answers; the mismatched pairs' log-ratios have mean 0.05."""
    sums = torch.cat([CHOSEN, REJECTED])[:, None]
    this = SimpleNamespace(
        model=Model(sums, torch.ones_like(sums)), accelerator=Gatherer(), aux_loss_enabled=False,
        precompute_ref_logps=True, beta=0.1,
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


def reward(margin: bool = False, center: float | None = None) -> float:
    """RewardTrainer's loss of three pairs of answers whose rewards are their log-probabilities."""
    rewards = torch.cat([CHOSEN, REJECTED])[:, None]

    class Classifier:
        training = False

        def __call__(self, **_):
            return SimpleNamespace(logits=rewards)

    this = SimpleNamespace(
        model=Classifier(), accelerator=Gatherer(), args=SimpleNamespace(center_rewards_coefficient=center),
        _metrics={"eval": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    inputs = {"margin": torch.tensor([0.5, 0.0, 1.5], dtype=torch.float64)} if margin else {}
    return float(RewardTrainer.compute_loss(this, this.model, inputs))


def main() -> None:
    values = {name: dpo(name) for name in DPO}
    # TRL's table of clamps for the alpha divergence has no float64.
    dtypes = {"forward_kl": torch.float64, "js_divergence": torch.float64, "alpha_divergence": torch.float32}
    values |= {
        f"{name}+{d}": dpo(name, d, dtype=dtype) for name in ("sigmoid", "hinge", "ipo") for d, dtype in dtypes.items()
    }
    values |= {f"{name}+ld": dpo(name, ld_alpha=0.3) for name in ("sigmoid", "ipo", "nca_pair")}
    values |= {"sigmoid+bco_pair": dpo(["sigmoid", "bco_pair"], weights=[0.8, 0.2]), "sft": dpo("sft")}
    values |= {"reward": reward(), "reward+margin": reward(margin=True), "reward+centred": reward(center=0.01)}
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
