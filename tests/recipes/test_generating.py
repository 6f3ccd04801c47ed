"""Batch inference: a line for every row, the log-probabilities the model gives, and no work twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import ROOT
from trueup.config.load import load_config
from trueup.errors import ConfigError
from trueup.recipes import generating
from trueup.recipes.generating import generate


@pytest.fixture
def keys(tiny_dir: Path, data_dir: Path) -> dict:
    return {
        "model_name_or_path": str(tiny_dir), "dataset": "held", "dataset_dir": str(data_dir), "device": "cpu",
        "bf16": False, "max_new_tokens": 8, "generation_batch_size": 4,
    }  # fmt: skip


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_row_has_its_lines_and_log_probabilities_are_the_models_own(keys: dict, tiny_dir: Path, tmp_path: Path):
    output = tmp_path / "new" / "answers.jsonl"
    cfg = load_config({**keys, "temperature": 0.8, "num_generations": 2, "token_logprobs": True}, verb="generate")
    done, _ = generate(cfg, output)
    lines = lines_of(output)
    assert (done.rows, done.answers, len(lines)) == (6, 12, 12)
    assert [(line["row"], line["sample"]) for line in lines] == [(f"held:{i}", k) for i in range(6) for k in (0, 1)]
    assert len({line["seed"] for line in lines}) == 12
    assert sorted(path.name for path in output.parent.iterdir()) == ["answers.jsonl"]
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    model = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32).eval()
    for line in lines[:3]:
        told = line["token_logprobs"]
        prompt = tokenizer.apply_chat_template(line["prompt"], add_generation_prompt=True, return_dict=False)
        ids = torch.tensor([[*prompt, *(token for _, token, _ in told)]])
        with torch.no_grad():
            logps = torch.log_softmax(model(ids).logits[0].float(), -1)[len(prompt) - 1 : -1]
        own = logps.gather(1, ids[0, len(prompt) :, None]).squeeze(1)
        assert [logp for *_, logp in told] == pytest.approx(own.tolist(), abs=1e-4)
        assert line["logprob"] == pytest.approx(float(own.sum()), abs=1e-3) and line["tokens"] == len(told)
        assert line["finish_reason"] in ("stop", "length")


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(keys: dict, tmp_path: Path, monkeypatch):
    cfg = load_config({**keys, "temperature": 1.0, "generation_batch_size": 1}, verb="generate")  # blocks of four
    generate(cfg, tmp_path / "whole.jsonl")
    put, count = generating.Journal.put, []

    def interrupted(journal, key, value) -> None:
        put(journal, key, value)
        count.append(key)
        if len(count) == 5:
            raise KeyboardInterrupt

    output = tmp_path / "answers.jsonl"
    monkeypatch.setattr(generating.Journal, "put", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(cfg, output)
    assert not output.exists() and (tmp_path / "answers.jsonl.journal").exists()
    monkeypatch.setattr(generating.Journal, "put", put)
    done, _ = generate(cfg, output)
    assert done.found == 4 and done.answers == 6
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_killed_process_goes_on_and_ends_with_the_same_bytes(keys: dict, tmp_path: Path):
    keys |= {"temperature": 1.0, "num_generations": 3, "generation_batch_size": 2}
    words = [f"{key}={value}" for key, value in keys.items()]
    output = tmp_path / "answers.jsonl"
    command = [sys.executable, "-m", "trueup", "generate", *words, "--output", str(output)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "TRUEUP_FAULT_AT": "journal:put:11"}
    assert subprocess.run(command, env=environment, capture_output=True).returncode == -signal.SIGKILL
    assert not output.exists()
    cfg = load_config(keys, verb="generate")
    done, _ = generate(cfg, output)
    assert (done.found, done.answers) == (8, 18)
    generate(cfg, tmp_path / "whole.jsonl")
    told, whole = lines_of(output), lines_of(tmp_path / "whole.jsonl")
    assert [line | {"logprob": 0} for line in told] == [line | {"logprob": 0} for line in whole]
    assert [line["logprob"] for line in told] == pytest.approx([line["logprob"] for line in whole], abs=1e-4)


def test_an_output_is_not_replaced_without_a_word(keys: dict, tmp_path: Path):
    output = tmp_path / "answers.jsonl"
    output.write_text("mine", encoding="utf-8")
    cfg = load_config(keys, verb="generate")
    with pytest.raises(ConfigError, match="exists already"):
        generate(cfg, output)
    generate(cfg, output, force=True)
    assert len(lines_of(output)) == 6


def test_rows_that_cannot_be_answered_are_named(keys: dict, data_dir: Path):
    rows = [
        {"instruction": "sun rain"},
        {"instruction": "wind " * 400},
        {"instruction": ""},
        {"instruction": "sun rain"},
    ]
    (data_dir / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    cfg = load_config({**keys, "dataset": str(data_dir / "odd.jsonl"), "cutoff_len": 64}, verb="generate")
    done, lines = generate(cfg, None)
    assert [line["row"][-2:] for line in lines] == [":0", ":3"] and lines[0]["answer"] == lines[1]["answer"]
    left_out = [row for rows in done.left_out.values() for row in rows.ids]
    assert sorted(row[-2:] for row in left_out) == [":1", ":2"]


@pytest.mark.parametrize(
    "more, words, what",
    [
        ({"dataset": None}, [], "there are no prompts"),
        ({"num_generations": 2}, [], "are the same"),
        ({"top_p": 0.5}, [], "always takes the likeliest"),
        ({}, ["learning_rate=1e-5"], "`learning_rate` does nothing in `trueup generate`"),
    ],
)
def test_what_cannot_be_meant_is_refused(keys: dict, more: dict, words: list[str], what: str):
    given = {key: value for key, value in {**keys, **more}.items() if value is not None}
    with pytest.raises(ConfigError, match=what):
        load_config(given, words, verb="generate")


def test_a_file_may_hold_a_whole_training(keys: dict):
    cfg = load_config({**keys, "stage": "dpo", "learning_rate": 1e-5, "val_size": 0.1}, verb="generate")
    assert (cfg.generate.temperature, cfg.online.num_generations) == (0.0, 1)
    assert load_config({**keys, "do_sample": True}, verb="generate").generate.temperature == 1.0
