"""From a reward model to PPO, as the guides' readers type it; and rewards from a function."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.guides.conftest import register, succeed, write_json
from tests.guides.test_guides import G2_PPO, G2_RM, G2_SFT, best_and_worse, g2_data, g4_data
from trueup.training.run_directory import read_metrics


def moved(directory: Path) -> bool:
    """Whether training has moved the adapter: its second factors begin at zero."""
    tensors = load_file(directory / "adapter_model.safetensors")
    return all(bool(t.any()) for name, t in tensors.items() if "lora_B" in name)


def test_g2_reward_model_then_ppo(work: Path):
    g2_data()
    prompts = [{"instruction": row["instruction"], "output": ""} for row in best_and_worse()][:12]
    write_json("data/sql_ppo_prompts.json", prompts)
    registry = json.loads(Path("data/dataset_info.json").read_text(encoding="utf-8"))
    register({**registry, "sql_ppo_prompts": {"file_name": "sql_ppo_prompts.json"}})
    succeed(G2_SFT)
    succeed(G2_RM)
    result = succeed(f"{G2_PPO} --dpo_beta 0.1")
    assert "`pref_beta` has no effect with `stage: ppo`" in result.stderr
    assert "reward" in result.stdout and "reward_model" in result.stdout
    out = work / "saves/Qwen1.5-7B/lora/sql_ppo_v1"
    rows = read_metrics(out)
    assert {"reward", "kl", "objective/kl", "loss/value_avg"} <= rows[0].keys()
    assert moved(out) and (out / "value_head.safetensors").is_file() and (out / "completions.jsonl").is_file()
    succeed(f"{G2_PPO} --kl_coeff 0.1 --ppo_score_norm --max_steps 2 --overwrite_output_dir")


def test_g4_reward_model_then_rlhf(work: Path):
    g4_data()
    base = "--finetuning_type lora --max_steps 2"
    succeed(
        f"train --stage sft --model_name_or_path ./Qwen2.5-7B --dataset my_sft_data --output_dir ./sft_output {base}"
    )
    succeed(
        "train --stage rm --model_name_or_path ./sft_output --dataset my_rm_data --finetuning_type lora "
        "--lora_target value --output_dir ./rm_output"
    )
    result = succeed(
        "train --stage rlhf --model_name_or_path ./sft_output --rm_path ./rm_output --dataset my_sft_data "
        "--ppo_clip_ratio 0.2 --ppo_kl_coeff 0.05 --max_grad_norm 1.0 --output_dir ./ppo_output --max_steps 4"
    )
    assert "`rm_path` is read as `reward_model`" in result.stderr
    assert moved(work / "ppo_output")


@pytest.mark.parametrize("verb", ["check", "train"])
def test_a_grpo_config_with_a_reward_file(work: Path, verb: str):
    g2_data()
    Path("rewards.py").write_text("def short(completions): return [-len(c) for c in completions]", encoding="utf-8")
    Path("grpo.yaml").write_text(
        "model_name_or_path: Qwen/Qwen1.5-7B-Chat\nstage: grpo\ndataset: sql_gen_custom\ntemplate: default\n"
        "reward_funcs: rewards.py:short\nnum_generations: 4\nmax_new_tokens: 8\nmax_steps: 2\noutput_dir: out\n",
        encoding="utf-8",
    )
    result = succeed(f"{verb} grpo.yaml")
    if verb == "train":
        assert "grpo: dapo" in result.stdout and "4 answers of at most 8 tokens" in result.stdout
