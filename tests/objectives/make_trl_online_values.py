"""Writes trl_online_values.json: TRL's own GRPO, RLOO and online DPO losses on fixed tensors. Run it where TRL is.

    python tests/objectives/make_trl_online_values.py

What runs is TRL's `_compute_loss` (online DPO: `training_step`) from the log-probabilities on; the model's outputs are
stood in for by tensors.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
import trl
from trl.experimental.online_dpo import OnlineDPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

LENGTHS = [3, 1, 4, 2]
LOGPS = [-0.9, -2.1, -0.3, -1.2, -0.05, -3.0, -0.6, -1.1, -0.45, -2.2]
OLD = [-1.1, -1.6, -0.35, -1.2, -0.4, -2.4, -0.9, -1.0, -0.7, -1.4]
REFERENCE = [-1.0, -1.8, -0.2, -1.5, -0.3, -2.0, -0.7, -1.3, -0.5, -1.9]
ADVANTAGES = torch.tensor([1.3, -0.7, 0.4, -1.1], dtype=torch.float64)


def padded(values: list[float]) -> torch.Tensor:
    """[answers, longest], zeros after each answer's end."""
    rows, start = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.float64), 0
    for row, length in zip(rows, LENGTHS, strict=True):
        row[:length] = torch.tensor(values[start : start + length], dtype=torch.float64)
        start += length
    return rows


MASK = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).double()


def trainer(**settings) -> SimpleNamespace:
    """What `_compute_loss` reads of a trainer."""
    accelerator = SimpleNamespace(
        num_processes=1, gather=lambda t: t, gather_for_metrics=lambda t: t, reduce=lambda t, reduction="sum": t
    )
    args = SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1)
    found = SimpleNamespace(
        accelerator=accelerator, args=args, aux_loss_enabled=False, top_entropy_quantile=1.0, use_vllm=False,
        off_policy_mask_threshold=None, model=SimpleNamespace(training=True), current_gradient_accumulation_steps=1,
        max_completion_length=8, _entropy_bonus_enabled=False, epsilon_low=0.2, epsilon_high=0.28,
        importance_sampling_level="token", _metrics=defaultdict(lambda: defaultdict(list)),
    )  # fmt: skip
    vars(found).update(settings)
    found._get_per_token_logps_and_entropies = lambda *_, **__: (padded(LOGPS), torch.zeros_like(MASK), None)
    return found


INPUTS = {
    "prompt_ids": torch.zeros(4, 1), "prompt_mask": torch.ones(4, 1), "completion_ids": torch.zeros_like(MASK),
    "completion_mask": MASK, "advantages": ADVANTAGES, "old_per_token_logps": padded(OLD),
    "ref_per_token_logps": padded(REFERENCE), "num_items_in_batch": MASK.sum(),
    "old_logps": padded(OLD).sum(1),
}  # fmt: skip


def online_dpo() -> float:
    """OnlineDPOTrainer's loss of two prompts with two answers each, by rewards; TRL has all first answers first."""
    order = [0, 2, 1, 3]
    logps, reference, mask = padded(LOGPS)[order], padded(REFERENCE)[order], MASK[order]
    ids = torch.ones_like(mask).long()
    rewards = torch.tensor([0.3, 1.0, 2.0, -1.0], dtype=torch.float64)[order]
    this = SimpleNamespace(
        args=SimpleNamespace(
            use_vllm=False, missing_eos_penalty=None, loss_type="sigmoid", torch_empty_cache_steps=None,
            optim="adamw_torch", n_gpu=1, gradient_accumulation_steps=1,
        ),
        eos_token_ids=[1], beta=0.1, ref_model="reference", model="policy", reward_funcs=None,
        processing_class=SimpleNamespace(batch_decode=lambda ids, **_: ["" for _ in ids]),
        accelerator=SimpleNamespace(gather_for_metrics=lambda t: t, backward=lambda loss: None),
        stats=defaultdict(list), _calculate_rewards_from_functions=lambda **_: rewards,
        _generate=lambda *_: (ids[:2], ids[:2], ids, mask, None),
        _forward=lambda model, *_: reference if model == "reference" else logps,
    )  # fmt: skip
    model = SimpleNamespace(train=lambda: None)
    return float(OnlineDPOTrainer.training_step(this, model, {"prompt": ["a", "b"]}))


def main() -> None:
    values: dict[str, float] = {}
    for name in ("dapo", "bnpo", "grpo", "dr_grpo", "gspo", "cispo"):
        for beta in (0.0, 0.04):
            special = {"gspo": {"importance_sampling_level": "sequence"}, "cispo": {"epsilon_high": 5.0}}.get(name, {})
            found = trainer(loss_type="grpo" if name == "gspo" else name, beta=beta, **special)
            values[f"{name} {beta}"] = float(GRPOTrainer._compute_loss(found, None, INPUTS))
    values["rloo 0.0"] = float(RLOOTrainer._compute_loss(trainer(), None, INPUTS))
    values["online_dpo 0.1"] = online_dpo()
    path = Path(__file__).with_name("trl_online_values.json")
    path.write_text(json.dumps({"trl": trl.__version__, "values": values}, indent=1) + "\n", encoding="utf-8")
    print(values)


if __name__ == "__main__":
    main()
