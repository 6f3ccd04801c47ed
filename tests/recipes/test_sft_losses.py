"""DFT and EAFT: the formulas from whole logits, whatever the layout and the batches; answers are learnt by them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.recipes.conftest import sentence
from tests.recipes.test_equivalence import assert_same_step, perturb, program_of, step
from tests.recipes.test_learning import COUPLES
from trueup.config.load import load_config
from trueup.config.schema import RunConfig
from trueup.errors import ConfigError
from trueup.recipes.header import describe_objective
from trueup.recipes.program import OfflineProgram
from trueup.recipes.run import run
from trueup.trl.configs import SFTConfig

Config = Callable[..., RunConfig]
SFT = {"stage": "sft", "dataset": "chats", "disable_shuffling": True}
SIDES = ("chosen", "rejected")
LOSSES = {
    "dft": {"use_dft_loss": True},
    "eaft": {"use_eaft_loss": True},
    "eaft, other power": {"use_eaft_loss": True, "eaft_alpha": 2.0},
}


def by_the_formula(program: OfflineProgram, keys: dict) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Loss, likelihood and gradients of the first step, from plain forwards of single examples."""
    (batch,) = program.micro_batches(0, 0)
    losses, plain = [], []
    with program.policy.generating() as model:
        for index in batch.indices:
            example = program.datasets["train"][index]
            (answer,) = example.answers
            ids = torch.from_numpy(np.concatenate([example.prompt, answer.ids])).long()
            trained = torch.from_numpy(np.concatenate([np.zeros(len(example.prompt), bool), answer.mask]))[1:]
            logits = model(input_ids=ids[None]).logits[0, :-1][trained].float()
            nll = F.cross_entropy(logits, ids[1:][trained], reduction="none")
            top = torch.softmax(logits.detach().topk(20).values, 1)
            unsure = -(top * top.log()).sum(1) / 3
            weight = torch.exp(-nll.detach()) if "use_dft_loss" in keys else unsure ** keys.get("eaft_alpha", 1.0)
            losses.append(nll * weight)
            plain.append(nll.detach())
    loss = torch.cat(losses).mean()
    for parameter in program.trainable.values():
        parameter.grad = None
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in program.trainable.items() if p.grad is not None}
    return float(loss.detach()), float(torch.cat(plain).mean()), gradients


@pytest.mark.parametrize("loss", LOSSES)
def test_a_run_has_the_loss_of_the_formula_whatever_the_batches(config: Config, loss: str) -> None:
    keys = LOSSES[loss]
    program = program_of(config(**SFT, **keys, per_device_train_batch_size=8))
    assert program.policy.shared
    perturb(program)
    whole = step(program)
    expected = by_the_formula(program, keys)
    assert whole[0] == pytest.approx(expected[0], rel=1e-5)
    assert whole[1]["nll"] == pytest.approx(expected[1], rel=1e-5)
    for name, gradient in expected[2].items():
        torch.testing.assert_close(whole[2][name], gradient, rtol=1e-4, atol=1e-7)
    pieces = program_of(config(**SFT, **keys, per_device_train_batch_size=2, gradient_accumulation_steps=4))
    perturb(pieces)
    assert_same_step(step(pieces), whole, 1e-5)


def test_eafts_power_0_is_the_plain_loss(config: Config) -> None:
    weighed, plain = step(program_of(config(**SFT, use_eaft_loss=True, eaft_alpha=0))), step(program_of(config(**SFT)))
    assert weighed[0] == pytest.approx(plain[0]) == pytest.approx(weighed[1]["nll"])
    assert all(torch.allclose(weighed[2][name], gradient) for name, gradient in plain[2].items())


@pytest.mark.parametrize("loss", ["dft", "eaft"])
def test_it_learns_the_answers(config: Config, tmp_path: Path, loss: str) -> None:
    """A question's last word decides the answer. The model has first learnt to give that word or its partner, as one
    that was trained before, and then learns the partner: DFT moves what is likely already, and from weights that are
    random it would go for the most frequent token.
    """
    rows = {
        "either": [{"instruction": row["instruction"], "output": row[s]} for row in asked(128, 0) for s in SIDES],
        "partner": [{"instruction": row["instruction"], "output": row["chosen"]} for row in asked(128, 0)],
        "held_out": asked(32, 1),
    }
    for name, given in rows.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(given, ensure_ascii=False), encoding="utf-8")
    entries = {name: {"file_name": f"{name}.json", "type": "dpo" if name == "held_out" else "sft"} for name in rows}
    (tmp_path / "dataset_info.json").write_text(json.dumps(entries), encoding="utf-8")
    start, end, common = str(tmp_path / "start"), str(tmp_path / "end"), {"dataset_dir": str(tmp_path)}
    train = {"stage": "sft", "finetuning_type": "full", "lora_rank": None, "learning_rate": 5e-3, **common}
    train |= {"per_device_train_batch_size": 32, "max_steps": 60}
    run(config(**train, dataset="either", output_dir=start))
    run(config(**train, dataset="partner", output_dir=end, model_name_or_path=start, **LOSSES[loss]))
    compared = {"do_eval": True, "dataset": None, "eval_dataset": "held_out", "model_name_or_path": end, **common}
    found = run(config(**compared, ref_model=start, output_dir=str(tmp_path / "evaluation"))).metrics
    assert found["eval_rewards/accuracies"] >= 0.9
    assert found["eval_rewards/chosen"] > 0


def asked(count: int, seed: int) -> list[dict]:
    rng = random.Random(seed)
    words = [COUPLES[i % len(COUPLES)] for i in range(count)]
    return [{"instruction": f"{sentence(rng, 1, 3)} {a}", "chosen": b, "rejected": a} for a, b in words]


def test_the_header_names_them(config: Config) -> None:
    said = [describe_objective(config(**SFT, **keys)) for keys in LOSSES.values()]
    assert said == ["sft: dft", "sft: eaft", "sft: eaft (alpha 2.0)"]


def test_one_loss_at_a_time_and_with_answers_alone(config: Config) -> None:
    with pytest.raises(ConfigError, match="keep one of them"):
        config(**SFT, use_dft_loss=True, use_eaft_loss=True)
    with pytest.raises(ConfigError, match="`use_dft_loss` has no effect with `stage: dpo`"):
        config(use_dft_loss=True)


def test_trls_name_of_dft() -> None:
    cfg = load_config({"model_name_or_path": "m", "dataset": "d", "stage": "sft", "loss_type": "dft"})
    assert cfg.objective.use_dft_loss
    assert SFTConfig(output_dir="out", loss_type="dft").keys()["use_dft_loss"] is True
