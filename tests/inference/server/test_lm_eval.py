"""lm-evaluation-harness through the server and on the model itself: the same numbers (A5)."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from tests.inference.server.conftest import MODEL
from trueup.builtin import BUILTIN_DATA, builtin_path

lm_eval = pytest.importorskip("lm_eval")
pytest.importorskip("tenacity")

PAIRS = """\
task: pairs
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}\\n"
doc_to_choice: "{{{{[good, bad]}}}}"
doc_to_target: 0
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
"""
ANSWERS = """\
task: answers
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{good}}}}"
generation_kwargs: {{until: ["\\n\\n", ";"], max_gen_toks: 24}}
metric_list:
  - metric: exact_match
    ignore_case: true
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """Two tasks of our own on 12 rows of the bundled data."""
    folder = tmp_path_factory.mktemp("tasks")
    with open(BUILTIN_DATA / "sql_pairs.jsonl", encoding="utf-8") as lines:
        rows = [json.loads(next(lines)) for _ in range(12)]
    fields = {"question": "instruction", "good": "chosen", "bad": "rejected"}
    short = [{name: row[key] for name, key in fields.items()} for row in rows]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in short), encoding="utf-8")
    for name, text in (("pairs", PAIRS), ("answers", ANSWERS)):
        (folder / f"{name}.yaml").write_text(text.format(data=folder / "rows.jsonl"), encoding="utf-8")
    return folder


def evaluate(model: str, arguments: dict, task: str, folder: Path, monkeypatch, **more):
    from lm_eval.tasks import TaskManager

    for name in ("HF_DATASETS_CACHE", "HF_HOME"):
        monkeypatch.setenv(name, str(folder / "cache"))
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=[task], task_manager=manager, bootstrap_iters=0, **more
    )  # fmt: skip


def test_local_completions_give_the_models_own_likelihoods(url, tasks, monkeypatch):
    remote = {
        "model": MODEL, "base_url": f"{url}/completions", "tokenizer": str(builtin_path(MODEL)), "num_concurrent": 2,
        "tokenizer_backend": "huggingface", "batch_size": 4, "max_length": 512,
    }  # fmt: skip
    ours = evaluate("local-completions", remote, "pairs", tasks, monkeypatch)
    here = {"pretrained": str(builtin_path(MODEL)), "dtype": "float32", "device": "cpu", "max_length": 512}
    theirs = evaluate("hf", here, "pairs", tasks, monkeypatch)
    assert ours["results"]["pairs"]["acc,none"] == theirs["results"]["pairs"]["acc,none"]
    assert ours["results"]["pairs"]["acc_norm,none"] == theirs["results"]["pairs"]["acc_norm,none"]
    apart = []
    for a, b in zip(ours["samples"]["pairs"], theirs["samples"]["pairs"], strict=True):
        assert a["doc_id"] == b["doc_id"]
        for (mine, my_greedy), (its, its_greedy) in zip(a["filtered_resps"], b["filtered_resps"], strict=True):
            apart.append(abs(float(mine) - float(its)))
            assert str(my_greedy) == str(its_greedy)
    print(f"\n{len(apart)} log-likelihoods, at most {max(apart):.1e} apart")
    assert len(apart) == 24 and max(apart) < 1e-4


def test_local_chat_completions_run_a_task_of_answers(url, tasks, monkeypatch):
    remote = {"model": MODEL, "base_url": f"{url}/chat/completions", "num_concurrent": 4}
    found = evaluate("local-chat-completions", remote, "answers", tasks, monkeypatch, apply_chat_template=True)
    answers = [sample["filtered_resps"][0] for sample in found["samples"]["answers"]]
    assert len(answers) == 12 and any(answers) and not any(";" in answer for answer in answers)
