"""What may be written for a value, in YAML, in JSON and on a command line."""

from __future__ import annotations

import json

import pytest

from trueup.config.load import load_config
from trueup.errors import ConfigError

BASE = {"model_name_or_path": "m", "dataset": "d"}


def from_yaml(tmp_path, text, *words):
    path = tmp_path / "config.yaml"
    path.write_text("model_name_or_path: m\ndataset: d\n" + text, encoding="utf-8")
    return load_config(path, words)


@pytest.mark.parametrize(
    "text, key, value",
    [
        ("learning_rate: 5e-7", "learning_rate", 5e-7),  # a string in YAML 1.1
        ('learning_rate: "5e-7"', "learning_rate", 5e-7),
        ("learning_rate: 1.e-4", "learning_rate", 1e-4),
        ("learning_rate: .0001", "learning_rate", 1e-4),
        ("bf16: yes", "bf16", True),
        ("bf16: off", "bf16", False),
        ("bf16: auto", "bf16", None),
        ("eval_strategy: no", "eval_strategy", "no"),
        ("eval_strategy: false", "eval_strategy", "no"),
        ("save_strategy: off", "save_strategy", "no"),
        ("report_to: none", "report_to", []),
        ("report_to: [wandb, tensorboard]", "report_to", ["wandb", "tensorboard"]),
        ("report_to: wandb", "report_to", ["wandb"]),
        ("run_name: 007", "run_name", "007"),
        ("run_name: 1:30", "run_name", "1:30"),
        ("run_name: 2024-01-01", "run_name", "2024-01-01"),
        ("run_name: on", "run_name", "on"),
        ("lora_rank: 16.0", "lora_rank", 16),
        ("lora_target: q_proj, v_proj", "lora_target", ["q_proj", "v_proj"]),
        ("lora_target: [q_proj, v_proj]", "lora_target", ["q_proj", "v_proj"]),
        ("lora_target:\n- q_proj\n- v_proj", "lora_target", ["q_proj", "v_proj"]),
        (r"lora_target: '.*\.(q|v)_proj'", "lora_target", [r".*\.(q|v)_proj"]),
        ("default_system: Be, in short, kind.", "default_system", "Be, in short, kind."),
        ("stage: SFT", "stage", "sft"),
        ("enable_thinking: null", "enable_thinking", None),
        ("ref_model: null", "ref_model", None),
        ("eval_dataset: ~", "eval_dataset", []),
        ("seed:", "seed", 42),
        ("save_steps: 0.25", "save_steps", 0.25),
        ("save_steps: 50.0", "save_steps", 50),
        ("warmup_steps: 0.1", "warmup_ratio", 0.1),  # transformers 5
        ("warmup_steps: 20", "warmup_steps", 20),
        ("resume_from_checkpoint: true", "resume_from_checkpoint", "auto"),
        ("resume_from_checkpoint: false", "resume_from_checkpoint", None),
        ("lr_scheduler_kwargs: {min_lr: 1e-6}", "lr_scheduler_kwargs", {"min_lr": 1e-6}),
        ("gradient_checkpointing: auto", "gradient_checkpointing", "auto"),
        ("gradient_checkpointing: no", "gradient_checkpointing", "off"),
        ("gradient_checkpointing: true", "gradient_checkpointing", "full"),
        ("val_size: 0.1", "val_size", 0.1),
    ],
)  # fmt: skip
def test_yaml_values_mean_what_they_plainly_mean(tmp_path, text, key, value):
    found = from_yaml(tmp_path, text)[key]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "words, key, value",
    [
        (["--plot_loss"], "plot_loss", True),
        (["--plot_loss", "true"], "plot_loss", True),
        (["--plot_loss=false"], "plot_loss", False),
        (["--plot_loss", "False", "--seed", "1"], "plot_loss", False),
        (["--plot-loss"], "plot_loss", True),
        (["--no-plot-loss"], "plot_loss", False),
        (["plot_loss=True"], "plot_loss", True),
        (["--plot_loss", "--seed", "7"], "seed", 7),
        (["--plot_loss", "seed=7"], "seed", 7),
        (["--learning-rate", "1e-6"], "learning_rate", 1e-6),
        (["learning_rate=1e-6"], "learning_rate", 1e-6),
        (["--max_steps", "-1"], "max_steps", -1),
        (["--lora_target", "q_proj,v_proj"], "lora_target", ["q_proj", "v_proj"]),
        (["lora_target=[q_proj,v_proj]"], "lora_target", ["q_proj", "v_proj"]),
        (["--default_system", "You are a --kind bot"], "default_system", "You are a --kind bot"),
        (["default_system=a = b"], "default_system", "a = b"),
        (["lr_scheduler_kwargs.min_lr=1e-6"], "lr_scheduler_kwargs", {"min_lr": 1e-6}),
        (["--lr_scheduler_kwargs", '{"min_lr": 1e-6}'], "lr_scheduler_kwargs", {"min_lr": 1e-6}),
        (["--fp16", "auto"], "fp16", None),
        (["--seed", "1", "--seed", "2"], "seed", 2),
        (["--resume"], "resume_from_checkpoint", "auto"),
        (["--overwrite"], "overwrite_output_dir", True),
        (["--new-run"], "new_run", True),
        (["seed=null"], "seed", 42),
        (["--plot_loss", "null"], "plot_loss", True),
        (["enable_thinking=null"], "enable_thinking", None),
    ],
)
def test_words_of_the_command_line(words, key, value):
    assert load_config(BASE, words)[key] == value


def test_the_command_line_wins_over_the_file_and_keeps_the_rest(tmp_path):
    cfg = from_yaml(tmp_path, "learning_rate: 1e-4\nseed: 1\nlr_scheduler_kwargs: {a: 1, b: 2}",
                    "seed=2", "--beta", "0.3", "stage=dpo", "lr_scheduler_kwargs.b=3")  # fmt: skip
    assert (cfg.train.learning_rate, cfg.train.seed, cfg.objective.pref_beta) == (1e-4, 2, 0.3)
    assert cfg.train.lr_scheduler_kwargs == {"a": 1, "b": 3}


def test_json_files_work_with_tabs_and_lines(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**BASE, "lora_target": ["q_proj"], "seed": 3}, indent="\t"))
    assert load_config(str(path)).train.seed == 3
    path.write_text('{\n"model_name_or_path": "m",\n"dataset": "d",\n"lora_rank": "x"\n}')
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert caught.value.problems[0].where == f"{path}:4"


def test_a_utf8_file_with_bom_and_crlf_loads(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes("\ufeffmodel_name_or_path: m\r\ndataset: 数据\r\n".encode())
    assert load_config(path).data.dataset == ["数据"]


def test_defaults_that_follow_from_other_keys():
    cfg = load_config({**BASE, "model_name_or_path": "org/Name/", "stage": "dpo", "lora_rank": 4})
    assert cfg.tuning.lora_alpha == 8
    assert cfg.train.output_dir == "saves/Name/lora/dpo"
    assert cfg.train.do_train and not cfg.train.do_eval
    assert (cfg.train.bf16, cfg.train.fp16) == (None, None)
    held_out = load_config({**BASE, "val_size": 0.1})
    assert held_out.train.do_train and held_out.train.do_eval
    steps = load_config({**BASE, "eval_strategy": "steps", "logging_steps": 7})
    assert steps.train.eval_steps == 7


def test_max_steps_wins_over_epochs_and_says_so(caplog):
    with caplog.at_level("INFO", "trueup"):
        cfg = load_config({**BASE, "max_steps": 5, "num_train_epochs": 2})
    assert cfg.train.max_steps == 5
    assert [r.message for r in caplog.records] == ["`max_steps: 5` wins over `num_train_epochs`"]


def test_explicit_holds_canonical_names_only():
    assert load_config({**BASE, "stage": "dpo", "beta": 0.2}).explicit == {
        "model_name_or_path", "dataset", "stage", "pref_beta"
    }  # fmt: skip
