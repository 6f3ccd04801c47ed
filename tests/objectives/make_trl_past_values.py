"""Writes trl_past_values.json: BCO and PPO as TRL had them before it let them go (1.16 has neither).

    python tests/objectives/make_trl_past_values.py

Run it where TRL 0.29 is installed. What runs is TRL's own `BCOTrainer.bco_loss`, and all of `PPOTrainer.train` for one
round of answers; generation, models and optimizer are stood in for by tensors. All of PPO's answers are of one length:
in shorter ones TRL gives the reward one token past the end.
"""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
import trl
from trl.experimental.bco import bco_trainer
from trl.experimental.ppo import ppo_trainer

ROWS = [
    [-10, -20.5, -33], [-12.5, -18, -41], [5, 8, 13], [6, 4, 16], [-11.2, -20.1, -34], [-13.9, -18.7, -36.5],
]  # fmt: skip


def bco() -> dict[str, float]:
    """Losses of the six answers with δ held at 0, then at each of two steps that move it."""
    chosen, rejected, _, _, ref_chosen, ref_rejected = (torch.tensor(row, dtype=torch.float64) for row in ROWS)
    accelerator = SimpleNamespace(use_distributed=False)
    this = SimpleNamespace(
        beta=0.1, match_underlying_distribution=False, running=bco_trainer.RunningMoments(accelerator)
    )

    def loss(moved: float, **keywords) -> tuple[torch.Tensor, torch.Tensor]:
        found = bco_trainer.BCOTrainer.bco_loss(
            this, chosen + moved, rejected, ref_chosen, ref_rejected, None, None, **keywords
        )
        return found[0].mean(), found[3]

    values = {"bco": float(loss(0.0, do_train=False)[0])}
    for step, moved in enumerate([0.0, 6.0]):
        values |= {f"bco {name} {step}": float(v) for name, v in zip(("loss", "delta"), loss(moved), strict=True)}
    return values


# --- PPO: three answers of four tokens -------------------------------------------------------------------------------

OLD = [[-1.1, -1.6, -0.35, -1.2], [-0.4, -2.4, -0.9, -1.0], [-0.7, -1.4, -0.2, -2.0]]
REFERENCE = [[-1.0, -1.8, -0.2, -1.5], [-0.3, -2.0, -0.7, -1.3], [-0.5, -1.9, -0.9, -1.1]]
NEW = [[-0.9, -2.1, -0.3, -1.2], [-0.05, -3.0, -0.6, -1.1], [-0.45, -2.2, -0.25, -1.3]]
VALUES = [[0.3, 0.1, -0.2, 0.5], [0.0, 0.4, 0.2, -0.6], [-0.1, 0.7, 0.9, 0.2]]
NEW_VALUES = [[0.2, 0.5, -0.3, 0.6], [0.1, 0.1, 0.3, 0.2], [0.0, 0.6, 1.4, 0.1]]
SCORES = [1.0, -0.5, 0.7]
PROMPT, PAD, TOKEN = 2, 0, 1


def logits(logps: list[list[float]]) -> torch.Tensor:
    """[answers, prompt + answer, vocabulary] whose softmax gives TOKEN these log-probabilities, one place ahead."""
    p = torch.tensor(logps).exp()
    rest = (1 - p) / 2
    rows = torch.stack([rest, p, rest], -1).log()
    return torch.cat([rows.new_zeros(len(p), PROMPT - 1, 3), rows, rows.new_zeros(len(p), 1, 3)], 1)


def values_at(values: list[list[float]]) -> torch.Tensor:
    rows = torch.tensor(values)[..., None]
    return torch.cat([rows.new_zeros(len(rows), PROMPT - 1, 1), rows, rows.new_zeros(len(rows), 1, 1)], 1)


@contextmanager
def stood_in():
    """TRL's module without models: what it asks them is answered from the tensors above."""

    def forward(model, *_):
        out = SimpleNamespace(logits=logits(REFERENCE if model == "reference" else NEW))
        return out if model == "reference" else (out, values_at(NEW_VALUES))

    def rewards(model, *_):
        return values_at(VALUES), torch.tensor(SCORES), None

    def generation(_, queries, *__):
        answers = torch.full((len(queries), 4), TOKEN)
        return torch.cat([queries, answers], 1), logits(OLD)[:, PROMPT - 1 : -1]

    found = {"forward": forward, "get_reward": rewards, "batch_generation": generation,
             "unwrap_model_for_generation": lambda model, *_, **__: nullcontext(model)}  # fmt: skip
    before = {name: getattr(ppo_trainer, name) for name in found}
    vars(ppo_trainer).update(found)
    try:
        yield
    finally:
        vars(ppo_trainer).update(before)


class Anything:
    """A trainer's state, callbacks and the like: takes every call and every attribute."""

    def __getattr__(self, name):
        return lambda *_, **__: SimpleNamespace(should_save=False)


def ppo() -> dict[str, float]:
    """The metrics of one round with one pass over it; vf_coef 0.1, kl_coef 0.05, γ 0.97, λ 0.9."""
    metrics: dict[str, float] = {}
    args = SimpleNamespace(
        response_length=4, temperature=1 - 1e-7, num_ppo_epochs=1, num_mini_batches=1, gradient_accumulation_steps=1,
        num_total_batches=1, total_episodes=3, batch_size=3, local_batch_size=3, local_mini_batch_size=3,
        per_device_train_batch_size=3, local_rollout_forward_batch_size=3, ds3_gather_for_generation=False,
        logging_steps=None, eval_steps=None, save_steps=None, missing_eos_penalty=None, kl_estimator="k1", kl_coef=0.05,
        whiten_rewards=False, gamma=0.97, lam=0.9, cliprange=0.2, cliprange_value=0.2, vf_coef=0.1,
        num_sample_generations=0,
    )  # fmt: skip
    accelerator = SimpleNamespace(
        device="cpu", print=lambda *_: None, gather_for_metrics=lambda t: t, accumulate=lambda _: nullcontext(),
        backward=lambda loss: metrics.update(loss=float(loss)),
        unwrap_model=lambda model: SimpleNamespace(value_model=None),
    )  # fmt: skip
    this = SimpleNamespace(
        args=args, accelerator=accelerator, optimizer=Anything(), ref_model="reference", reward_model=None,
        model=SimpleNamespace(train=lambda: None, policy=None), is_deepspeed_enabled=False, stop_token_id=None,
        processing_class=SimpleNamespace(pad_token_id=PAD, eos_token_id=TOKEN), train_dataset_len=3,
        dataloader=[{"input_ids": torch.full((3, PROMPT), 2)}], state=SimpleNamespace(), callback_handler=Anything(),
        lr_scheduler=SimpleNamespace(step=lambda: None, get_last_lr=lambda: [0.0]), control=None, log=metrics.update,
    )  # fmt: skip
    with stood_in():
        ppo_trainer.PPOTrainer.train(this)
    wanted = ("objective/", "policy/", "loss", "val/ratio", "val/clip")
    return {
        f"ppo {k}": float(v)
        for k, v in metrics.items()
        if k.startswith(wanted) and not k.endswith(("entropy_avg", "_var"))
    }


def main() -> None:
    torch.set_default_dtype(torch.float64)
    values = {**bco(), **ppo()}
    path = Path(__file__).with_name("trl_past_values.json")
    inputs = {
        "old": OLD,
        "reference": REFERENCE,
        "new": NEW,
        "values": VALUES,
        "new_values": NEW_VALUES,
        "scores": SCORES,
    }
    path.write_text(
        json.dumps({"trl": trl.__version__, "ppo": inputs, "values": values}, indent=1) + "\n", encoding="utf-8"
    )
    sys.stdout.write(f"{path}: {len(values)} values of TRL {trl.__version__}\n")


if __name__ == "__main__":
    main()
