"""`profile: true` tells apart what single recipes do: sampling, rewards, looking ahead, a live reference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trueup.recipes.run import run
from trueup.training.profile import PROFILE_FILE

RUNS = {
    "ppo": {"rollout", "look-ahead", "reference", "forward", "backward"},
    "grpo": {"rollout", "rewards", "forward", "backward"},
    "aot": {"look-ahead", "forward", "backward"},  # sees its step as a whole first
    "tdpo2": {"reference", "forward", "backward"},
}
ONLY_THERE = {"rollout", "reference"}  # rewards may take too little to be seen


@pytest.mark.parametrize("name", RUNS)
def test_phases_of_a_recipe(config, tmp_path: Path, name: str) -> None:
    (tmp_path / "rewards.py").write_text("def size(completions): return [len(c) for c in completions]\n", "utf-8")
    if name in ("ppo", "grpo"):
        keys = {"stage": name, "dataset": "chats", "reward_funcs": f"{tmp_path}/rewards.py:size", "max_new_tokens": 8}
    else:
        keys = {"pref_loss": name, "precompute_ref_log_probs": False, "gradient_accumulation_steps": 2}
        keys |= {"per_device_train_batch_size": 2}
    out = run(config(profile=True, max_steps=2, **keys)).output_dir
    phases = json.loads((out / PROFILE_FILE).read_text(encoding="utf-8"))["phases"]
    spent = {phase for phase, of in phases.items() if of["seconds"] > 1e-3}
    assert spent >= RUNS[name]
    assert not (spent & ONLY_THERE) - RUNS[name] - ({"reference"} if name == "aot" else set())
