"""The schema as a whole: help, JSON Schema, round trips, starter files, and that it stays light."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml

from trueup.config.load import dump_yaml, json_schema, load_config
from trueup.config.methods import STAGES
from trueup.config.schema import FIELDS, SECTIONS, default
from trueup.config.starter import starter
from trueup.errors import ConfigError

BASE = {"model_name_or_path": "m", "dataset": "a,b"}


def test_every_key_has_one_section_and_a_help_sentence():
    assert len(FIELDS) == sum(len(model.model_fields) for model in SECTIONS.values())
    assert [key for key, rule in FIELDS.items() if len(rule.description or "") < 8] == []


def test_defaults_are_valid_values():
    for name, model in SECTIONS.items():
        values = {key: default(key) for key in model.model_fields}
        assert model(**values) == model(), name


def test_json_schema_is_flat_and_closed():
    schema = json_schema()
    assert set(schema["properties"]) == set(FIELDS) and schema["additionalProperties"] is False
    assert schema["properties"]["pref_beta"]["exclusiveMinimum"] == 0
    assert schema["properties"]["lora_rank"]["x-section"] == "tuning"


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"stage": "dpo", "pref_beta": 0.3, "lora_rank": 4, "ref_model": "r", "fp16": True},
        {"stage": "pt", "finetuning_type": "full", "max_steps": 7, "packing": True},
        {"finetuning_type": "freeze", "eval_strategy": "epoch", "val_size": 0.2},
        {"do_eval": True, "do_train": False, "enable_thinking": None, "report_to": "wandb"},
        {"simpo_gamma": 0.7, "on_unused_keys": "warn"},
        {"warmup_steps": 0.1, "save_steps": 0.5, "default_system": "a: b # c\nd, “é”"},
        {"lr_scheduler_kwargs": {"min_lr": 1e-6}, "lr_scheduler_type": "cosine_with_min_lr"},
    ],
)
def test_a_written_config_loads_equal_and_without_a_word(tmp_path, keys, caplog):
    cfg = load_config({**BASE, **keys})
    path = tmp_path / "run.yaml"
    path.write_text(dump_yaml(cfg), encoding="utf-8")
    with caplog.at_level("INFO", "trueup"):
        assert load_config(path) == cfg
        load_config(path, verb="infer")
    assert not caplog.records or "on_unused_keys" in keys
    path.write_text(yaml.safe_dump(cfg.resolved(), allow_unicode=True), encoding="utf-8")
    assert load_config(path) == cfg
    assert load_config(cfg.resolved()) == cfg


def test_written_configs_keep_no_secret_and_no_command():
    cfg = load_config({**BASE, "hf_hub_token": "hf_secret", "overwrite_output_dir": True})
    assert "hf_secret" not in dump_yaml(cfg) and "overwrite_output" not in dump_yaml(cfg)
    again = load_config(cfg.resolved(), ["resume_from_checkpoint=auto"])
    assert again.model.hf_hub_token is None and again.train.resume_from_checkpoint == "auto"


def test_a_config_is_not_changed_in_place():
    cfg = load_config(BASE)
    with pytest.raises(ValueError):
        cfg.train.seed = 1
    assert cfg.replace(seed=1).train.seed == 1 and cfg.train.seed == 42


@pytest.mark.parametrize("stage", [name for name, row in STAGES.items() if not row.instead])
@pytest.mark.parametrize("model", ["builtin:sql-tiny", "Qwen/Qwen2.5-0.5B-Instruct"])
def test_starter_files_load_without_a_word(tmp_path, stage, model, caplog):
    path = tmp_path / "start.yaml"
    path.write_text(starter(stage, model), encoding="utf-8")
    with caplog.at_level("INFO", "trueup"):
        cfg = load_config(path)
    assert (cfg.objective.stage, cfg.model.model_name_or_path) == (stage, model)
    assert not caplog.records and len(path.read_text().splitlines()) < 50


def test_starters_for_other_stages_say_why_not():
    assert "stage: pt" in starter("pretrain")
    with pytest.raises(ConfigError):
        starter("nonsense")


def test_loading_is_quick_and_imports_nothing_heavy():
    code = (
        "import sys, time; from trueup.config.load import load_config;"
        "load_config({'model_name_or_path': 'm', 'dataset': 'd', 'stage': 'dpo'});"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets', 'peft'} & set(sys.modules);"
        "print(time.process_time(), sorted(heavy))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, heavy = run.stdout.split(maxsplit=1)
    assert heavy.strip() == "[]"
    assert float(seconds) < 0.6  # about 0.2 s on an idle machine
