"""The built-in model learns to format SQL from a reward alone, and stays right: held-out requests, greedy answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import ROOT
from trueup.config.load import load_config
from trueup.recipes.run import run
from trueup.training.run_directory import read_metrics


def gain(example: str, output: Path, **keys) -> float:
    """How much the held-out reward rose from before the first step to the end."""
    base = {"output_dir": str(output), "reward_funcs": f"{ROOT}/examples/sql_rewards.py:formatted",
            "save_strategy": "no", "plot_loss": False, "report_to": "none"}  # fmt: skip
    steps = keys.setdefault("max_steps", load_config(ROOT / "examples" / example).train.max_steps)
    words = [f"{key}={value}" for key, value in {**base, **keys, "eval_steps": steps}.items()]
    run(load_config(ROOT / "examples" / example, words))
    first, last = (row["eval_reward"] for row in read_metrics(output) if "eval_reward" in row)
    print(f"{example} {keys}: held-out reward {first:.2f} → {last:.2f}")  # `pytest -s` shows it
    return last - first


@pytest.mark.slow
def test_grpo_raises_a_verifiable_reward(tmp_path: Path):
    assert gain("builtin_grpo.yaml", tmp_path / "run", max_steps=14) >= 0.3


@pytest.mark.prove
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("example", ["builtin_grpo.yaml", "builtin_ppo.yaml"])
def test_examples_raise_it_from_every_seed(tmp_path: Path, example: str, seed: int):
    assert gain(example, tmp_path / "run", seed=seed) >= 0.3


@pytest.mark.prove
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("keys", [{"stage": "rloo", "ppo_kl_coeff": 0.01}, {"stage": "online_dpo"}], ids=str)
def test_the_other_stages_do_too(tmp_path: Path, keys: dict, seed: int):
    assert gain("builtin_grpo.yaml", tmp_path / "run", seed=seed, **keys) >= 0.3
