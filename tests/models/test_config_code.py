"""A model's config names settings; what names code is refused before anything is made of it (S8)."""

from __future__ import annotations

import json
import shutil

import pytest

from trueup.builtin import builtin_path
from trueup.config.load import load_config
from trueup.errors import ModelError
from trueup.models.load import load_for_inference, read_model_config

CODE = "from transformers import PretrainedConfig\nopen('pwned', 'w').close()\nclass Own(PretrainedConfig): pass\n"


@pytest.fixture
def directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(builtin_path("builtin:sql-tiny"), tmp_path / "model")
    (tmp_path / "model" / "own.py").write_text(CODE, encoding="utf-8")
    return tmp_path / "model"


def section(directory, **changed):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changed), encoding="utf-8")
    return load_config(None, [f"model_name_or_path={directory}"], verb="infer")


@pytest.mark.parametrize(
    "changed",
    [
        {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}},
        {"_attn_implementation_internal": "evil/kernel"},
        {"_attn_implementation": "evil/kernel@main"},
        {"attn_implementation": "evil/kernel"},
        {"rope_kernel": "evil/kernel"},
        {"trust_remote_code": True},
        {"model_file": "own.py"},
        {"text_config": {"model_type": "qwen2", "_attn_implementation_internal": "evil/kernel"}},
        {"text_config": {"deeper": {"trust_remote_code": True}}},
    ],
)
def test_what_names_code_is_refused_and_not_run(directory, changed):
    cfg = section(directory, **changed)
    for load in (
        lambda: read_model_config(str(directory), cfg.model, "m"),
        lambda: load_for_inference(cfg.model, cfg.train),
    ):
        with pytest.raises(ModelError, match="names code to be run") as caught:
            load()
        assert "trust_remote_code: true" in str(caught.value)
    assert not (directory.parent / "pwned").exists()


def test_a_class_of_its_own_is_passed_over_where_transformers_has_one(directory):
    harmless = {"_attn_implementation": "sdpa", "_attn_implementation_autoset": True, "trust_remote_code": False}
    cfg = section(directory, auto_map={"AutoConfig": "own.Own"}, **harmless)
    assert type(read_model_config(str(directory), cfg.model, "m")).__name__ == "Qwen2Config"
    assert not (directory.parent / "pwned").exists()
