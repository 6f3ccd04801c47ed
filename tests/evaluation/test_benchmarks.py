"""Tasks of lm-evaluation-harness: one of one's own is asked, and its figure is the model's."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trueup.builtin import builtin_path
from trueup.config.load import load_config
from trueup.errors import ConfigError
from trueup.recipes.evaluation.evaluate import evaluate

QUESTIONS = [
    {"question": "list all students", "choices": ["select * from students;", "no", "SELECT"], "answer": 0},
    {"question": "list all employees", "choices": ["students", "select * from employees;", "x"], "answer": 1},
    {"question": "names of products", "choices": ["select name from products;", "why", "1"], "answer": 2},
]
TASK = """\
task: own_task
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: "{{{{choices}}}}"
target_delimiter: " "
metric_list:
  - metric: acc
"""


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "evaluation"
    folder.mkdir()
    data = folder / "own.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS), encoding="utf-8")
    (folder / "own.yaml").write_text(TASK.format(data=data), encoding="utf-8")
    return {
        "model_name_or_path": "builtin:sql-tiny", "task": "own_task", "task_dir": str(folder), "device": "cpu",
        "bf16": False, "save_dir": str(tmp_path / "out"), "n_shot": 0, "batch_size": 2, "lang": "en",
    }  # fmt: skip


def config(keys: dict, **more):
    return load_config({**keys, **more}, verb="eval")


def test_a_task_of_ones_own_is_asked_and_its_figure_is_the_models(keys: dict, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    report = evaluate(config(keys))
    location = builtin_path("builtin:sql-tiny")
    model = AutoModelForCausalLM.from_pretrained(location, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(location)
    hits = []
    for row in QUESTIONS:
        prompt = tokenizer(row["question"])["input_ids"]
        told = [tokenizer(f"{row['question']} {choice}")["input_ids"] for choice in row["choices"]]
        logps = [logp(model, ids, len(prompt)) for ids in told]
        hits.append(int(max(range(3), key=logps.__getitem__) == row["answer"]))
    found = report.models[0].tasks["own_task/acc"]
    assert (found.value, found.count) == (pytest.approx(sum(hits) / 3), 3)
    assert (Path(keys["save_dir"]) / "eval_report.json").is_file() and "own_task/acc" in report.markdown()
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)  # nobody loads weights in vain
    with pytest.raises(ConfigError, match="no task other_task"):
        evaluate(config(keys, task="own_task,other_task"))


def logp(model: torch.nn.Module, ids: list[int], prompt: int) -> float:
    """The log-probability of what follows the first `prompt` tokens."""
    with torch.no_grad():
        logps = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)
    return float(logps[prompt - 1 : -1].gather(1, torch.tensor(ids[prompt:])[:, None]).sum())


def test_without_the_harness_its_extra_is_named(keys: dict, monkeypatch: pytest.MonkeyPatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "lm_eval" else find(name))
    with pytest.raises(ConfigError, match=r"pip install 'trueup\[eval\]'"):
        evaluate(config(keys))


def test_other_tools_keys_act_or_say_what_does(keys: dict):
    cfg = config(keys, task="mmlu_test", lang="en", n_shot=5)
    assert cfg.train.output_dir == keys["save_dir"] and cfg.evaluate.eval_measures == ["task"]
    assert config(keys, task="cmmlu_test,ceval_validation", lang="zh").evaluate.task
    with pytest.raises(ConfigError, match="`lang` has no effect"):
        config(keys, lang="zh")
    with pytest.raises(ConfigError, match="`download_mode` has no effect"):
        config(keys, download_mode="force_redownload")
