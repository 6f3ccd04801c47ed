"""`trueup eval`: figures equal what is known otherwise, models stand side by side, nothing is lost on the way."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.rollout.judge_server import serving
from trueup.config.load import load_config
from trueup.errors import ConfigError, UserError
from trueup.recipes.evaluation.evaluate import evaluate
from trueup.recipes.evaluation.report import aligned, folded
from trueup.recipes.evaluation.target import evaluation_config
from trueup.recipes.run import run

PLAIN = ["--device", "cpu", "--bf16", "false", "--bootstrap_samples", "50"]


def figures(report, model: int = 0) -> dict[str, float]:
    return {name: estimate.value for name, estimate in report.models[model].figures.items()}


def test_a_run_is_measured_beside_its_start_and_its_own_evaluation_is_reproduced(trained: Path):
    told = json.loads((trained / "eval_results.json").read_text(encoding="utf-8"))
    cfg = evaluation_config([str(trained)], None, [*PLAIN, "max_new_tokens=8"])
    report = evaluate(cfg)
    start, end = figures(report, 0), figures(report, 1)
    assert [model.name for model in report.models][1] == trained.name
    assert start["accuracy"] == 0.5 and start["margin"] == start["kl"] == 0.0  # all ties with itself
    assert end["accuracy"] == pytest.approx(told["eval_rewards/accuracies"])
    assert end["margin"] == pytest.approx(told["eval_rewards/margins"], rel=1e-4)
    assert end["loss"] == pytest.approx(told["eval_loss"], rel=1e-4)
    assert end["longer_wins"] == pytest.approx(told["eval_rewards/longer_wins"])
    assert end["kl"] > 0 and end["entropy"] > 0 and end["answers/tokens"] <= 8
    assert {p.name for p in (trained / "eval").iterdir()} >= {
        "eval_report.json", "eval_report.md", "eval_report.html", "eval_answers.jsonl", "journal.jsonl",
    }  # fmt: skip
    page = (trained / "eval" / "eval_report.html").read_text(encoding="utf-8")
    assert "data:image/png;base64," in page and "img-src data:" in page and not re.search(r'(?:src|href)="http', page)
    saved = json.loads((trained / "eval" / "eval_report.json").read_text(encoding="utf-8"))
    assert saved["models"][1]["figures"]["accuracy"]["count"] == 6 and saved["settings"]["seed"] == 42
    assert saved["models"][1]["data_fingerprint"] and saved["models"][1]["template"]["fingerprint"]
    assert report.differences[trained.name]["margin"].value == pytest.approx(end["margin"] - start["margin"])
    assert "| preference accuracy (ties ½) | 0.5" in report.markdown()


def test_the_config_of_a_finished_run_stands_for_its_directory(trained: Path):
    by_file = evaluation_config([], str(trained / "run.yaml"), PLAIN)
    by_name = evaluation_config([str(trained)], None, PLAIN)
    assert by_file.evaluate.eval_models == by_name.evaluate.eval_models == ["start", str(trained)]
    assert by_file.train.output_dir == by_name.train.output_dir == str(trained / "eval")


def test_rows_that_are_asked_for_stand_in_place_of_those_that_a_run_held_out(tmp_path: Path):
    run = "stage: dpo\nmodel_name_or_path: builtin:sql-tiny\ndataset: sql_pairs_demo\nval_size: 0.1\n"
    (tmp_path / "run.yaml").write_text(run, encoding="utf-8")
    assert evaluation_config([str(tmp_path)], None, []).data.val_size == 0.1
    asked = evaluation_config([str(tmp_path)], None, ["--eval_dataset", "sql_heldout_demo"]).data
    assert (asked.eval_dataset, asked.val_size) == (["sql_heldout_demo"], 0)


def test_after_a_preference_run_a_report_against_the_start_is_there(trained: Path):
    found = json.loads((trained / "regression_results.json").read_text(encoding="utf-8"))
    assert found["regression_kl"] > 0 and found["regression_perplexity"] != found["regression_perplexity_start"]
    for name in ("tokens", "distinct_2", "repetition", "refusals"):
        assert {f"regression_{name}", f"regression_{name}_start"} <= set(found)
    everything = json.loads((trained / "all_results.json").read_text(encoding="utf-8"))
    assert everything["regression_kl"] == found["regression_kl"]


def test_the_report_changes_no_run_and_can_be_turned_off(trained: Path, config: Callable, tmp_path: Path):
    other = config(
        eval_dataset="held", do_eval=True, do_train=True, max_steps=6, pref_ftx=0.5, output_dir=str(tmp_path / "off")
    )
    run(other)
    assert not (tmp_path / "off" / "regression_results.json").exists()
    same = [(d / "adapter_model.safetensors").read_bytes() for d in (trained, tmp_path / "off")]
    assert same[0] == same[1]


@pytest.fixture
def keys(tiny_dir: Path, data_dir: Path, tmp_path: Path) -> dict:
    return {
        "model_name_or_path": str(tiny_dir), "dataset_dir": str(data_dir), "device": "cpu", "bf16": False,
        "output_dir": str(tmp_path / "eval"), "bootstrap_samples": 50,
    }  # fmt: skip


def measured(keys: dict, **more):
    return evaluate(load_config({**keys, **more}, verb="eval"))


def test_perplexity_and_entropy_are_those_of_plain_transformers(keys: dict, tiny_dir: Path):
    report = measured(keys, stage="pt", eval_dataset="texts", eval_measures="perplexity,divergence")
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    model = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32).eval()
    rows = json.loads((Path(keys["dataset_dir"]) / "texts.json").read_text(encoding="utf-8"))
    nats, entropy, count = 0.0, 0.0, 0
    for row in rows:
        ids = torch.tensor([[*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            logps = torch.log_softmax(model(ids).logits[0, :-1].float(), -1)
        nats -= float(logps.gather(1, ids[0, 1:, None]).sum())
        entropy -= float((logps.exp() * logps).sum())
        count += ids.shape[1] - 1
    assert figures(report)["perplexity"] == pytest.approx(np.exp(nats / count), rel=1e-4)
    assert figures(report)["entropy"] == pytest.approx(entropy / count, rel=1e-4)
    assert "kl" not in figures(report) and report.reference is None


def test_kl_is_exact_and_needs_no_adapter(keys: dict, tiny_dir: Path, tmp_path: Path):
    moved = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.mul_(1.02)
    moved.save_pretrained(tmp_path / "moved")
    AutoTokenizer.from_pretrained(tiny_dir).save_pretrained(tmp_path / "moved")
    report = measured(keys, stage="pt", eval_dataset="texts", eval_models=f"start,{tmp_path / 'moved'}")
    plain = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32).eval()
    tokenizer, total, count = AutoTokenizer.from_pretrained(tiny_dir), 0.0, 0
    for row in json.loads((Path(keys["dataset_dir"]) / "texts.json").read_text(encoding="utf-8")):
        ids = torch.tensor([[*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            own, other = (torch.log_softmax(m(ids).logits[0, :-1].float(), -1) for m in (moved.eval(), plain))
        total += float((own.exp() * (own - other)).sum())
        count += ids.shape[1] - 1
    assert figures(report, 0)["kl"] == 0.0
    assert figures(report, 1)["kl"] == pytest.approx(total / count, rel=1e-3)


def test_chats_are_answered_and_compared_with_the_data(keys: dict):
    report = measured(keys, stage="sft", eval_dataset="chats", eval_prompts=5, max_new_tokens=6)
    found = figures(report)
    assert {"answers/bleu-4", "answers/rouge-l", "answers/refusals", "answers/distinct_2"} <= set(found)
    lines = (Path(keys["output_dir"]) / "eval_answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 5 and {"row", "prompt", "label", "answers"} == set(json.loads(lines[0]))


def test_rules_score_answers_and_say_who_wins(keys: dict, tiny_dir: Path, tmp_path: Path):
    noisy = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
    with torch.no_grad():
        noisy.model.embed_tokens.weight += 0.5 * torch.randn_like(noisy.model.embed_tokens.weight)
    noisy.save_pretrained(tmp_path / "noisy")
    AutoTokenizer.from_pretrained(tiny_dir).save_pretrained(tmp_path / "noisy")
    report = measured(
        keys, stage="dpo", eval_dataset="held", eval_measures="answers,wins", rule_keywords="e", max_new_tokens=6,
        eval_models=f"start,{tmp_path / 'noisy'}",
    )  # fmt: skip
    duel = report.duels["noisy"]
    assert duel["wins"] + duel["ties"] + duel["losses"] == 6 and duel["undecided"] == 0
    means = [figures(report, i)["score"] for i in (0, 1)]
    assert duel["win_rate"].value == pytest.approx(0.5 + (means[1] - means[0]) / 2)
    assert report.differences["noisy"]["score"].value == pytest.approx(means[1] - means[0])


def test_a_judge_sees_both_orders_and_its_replies_are_kept(keys: dict, tiny_dir: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    asked = []

    def biased(request: dict, number: int) -> str:
        asked.append(request["messages"][-1]["content"])
        return json.dumps({"reason": "the first", "better": "A"})

    noisy = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
    with torch.no_grad():
        noisy.model.embed_tokens.weight += 0.5 * torch.randn_like(noisy.model.embed_tokens.weight)
    noisy.save_pretrained(tmp_path / "noisy")
    AutoTokenizer.from_pretrained(tiny_dir).save_pretrained(tmp_path / "noisy")
    with serving(biased) as server:
        more = {
            "judge_model": server.url, "eval_measures": "wins", "eval_dataset": "held", "stage": "dpo",
            "eval_models": f"start,{tmp_path / 'noisy'}", "max_new_tokens": 6,
        }  # fmt: skip
        first = measured(keys, **more)
        count = len(asked)
        second = measured(keys, **more)
    assert first.duels["noisy"]["ties"] == 6, (first.duels, first.judged_by)
    assert first.duels["noisy"]["win_rate"].value == 0.5
    assert first.judged_by["decided_by_place"] == count // 2 > 0
    assert len(asked) == count and second.duels["noisy"]["ties"] == 6


def test_accuracy_is_told_apart_by_a_column(keys: dict, data_dir: Path, trained: Path):
    rows = [json.loads(line) for line in (data_dir / "held.jsonl").read_text(encoding="utf-8").splitlines()]
    subsets = ["hep-cpp", "hep-cpp", "math-prm", "llmbar-natural", "alpacaeval-easy", "donotanswer"]
    bench = [
        {"prompt": row["instruction"], "chosen": row["chosen"], "rejected": row["rejected"], "subset": subset}
        for row, subset in zip(rows, subsets, strict=True)
    ]
    (data_dir / "bench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bench), encoding="utf-8")
    cfg = evaluation_config([str(trained)], None, [*PLAIN, f"eval_dataset={data_dir / 'bench.jsonl'}",
                                                   "eval_measures=preference"])  # fmt: skip
    groups = {name: e.value for name, e in evaluate(cfg).models[1].groups.items()}
    assert set(subsets) <= set(groups) and {"Chat", "Chat Hard", "Safety", "Reasoning", "RewardBench"} <= set(groups)
    assert groups["Reasoning"] == pytest.approx((groups["hep-cpp"] + groups["math-prm"]) / 2)
    four = [groups[name] for name in ("Chat", "Chat Hard", "Safety", "Reasoning")]
    assert groups["RewardBench"] == pytest.approx(np.mean(four))


def test_a_reward_model_is_known_by_its_files(config: Callable, data_dir: Path, tmp_path: Path):
    cfg = config(stage="rm", max_steps=4, eval_dataset="held", do_eval=True, do_train=True,
                 output_dir=str(tmp_path / "rm"))  # fmt: skip
    run(cfg)
    told = json.loads((tmp_path / "rm" / "eval_results.json").read_text(encoding="utf-8"))
    words = [*PLAIN, f"dataset_dir={data_dir}", "eval_dataset=held", f"output_dir={tmp_path / 'e'}"]
    report = evaluate(evaluation_config([], None, ["--model_name_or_path", str(tmp_path / "rm"), *words]))
    assert figures(report)["accuracy"] == pytest.approx(told["eval_accuracy"])
    assert figures(report)["margin"] == pytest.approx(told["eval_margin"], rel=1e-4)
    assert figures(report)["loss"] == pytest.approx(told["eval_loss"], rel=1e-4)


def test_all_that_is_wrong_is_told_before_weights_load(keys: dict, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(torch, "load", None)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    models = f"start,{tmp_path}/a,{tmp_path}/b"
    with pytest.raises(UserError) as caught:
        measured(
            keys, stage="dpo", eval_dataset=str(tmp_path / "none.jsonl"), eval_models=models,
            eval_measures="preference,wins", reward_funcs="none.py:f",
        )  # fmt: skip
    places = [problem.where for problem in caught.value.problems]
    assert places.count("eval_models") == 2 and {"eval_models", "reward_funcs"} < set(places), caught.value
    assert len(places) == 4 and not Path(keys["output_dir"]).exists()


def test_rows_that_do_not_fit_are_counted_once_however_many_models_read_them(keys: dict, tiny_dir: Path):
    report = measured(
        keys, stage="sft", eval_dataset="chats", eval_models=f"start,{tiny_dir}", eval_measures="perplexity",
        cutoff_len=24, truncation="drop",
    )  # fmt: skip
    left = report.data["left_out"]["chats"]
    assert 0 < left < 21 and {m.figures["perplexity"].count for m in report.models} == {21 - left}
    told = json.loads((Path(keys["output_dir"]) / "eval_data_report.json").read_text(encoding="utf-8"))
    assert told["datasets"]["chats"]["dropped"] and str(left) in " ".join(report.notes)


def test_answers_of_an_endpoint_stand_beside_those_of_a_model(keys: dict, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with serving(lambda request, number: "I'm sorry, but I can't help with that.") as server:
        more = {"eval_models": f"start,{server.url}", "eval_measures": "answers", "max_new_tokens": 6}
        report = measured(keys, stage="sft", eval_dataset="chats", **more)
        assert len(server.requests) == 21 and server.requests[0]["messages"][-1]["role"] == "user"
        with pytest.raises(ConfigError, match="only answers can be had"):
            measured(keys, stage="sft", eval_dataset="chats", **(more | {"eval_measures": "perplexity"}))
    assert figures(report, 1)["answers/refusals"] == 1.0 and report.models[1].name == "judge"


def test_several_models_stay_readable_on_a_narrow_terminal():
    rows = [["Figures", "start", "checkpoint-60"], ["accuracy", "0.5 [0.5, 0.5]", "0.9 [0.8, 1]"]]
    assert folded(rows, 80) == [rows]
    narrow = folded(rows, 26)
    assert [table[0] for table in narrow] == [["Figures", "start"], ["Figures", "checkpoint-60"]]
    assert all(len(line) <= 26 for table in narrow for line in aligned(table).splitlines())
    assert len(folded(rows, 5)) == 2  # never nothing at all


def test_preference_without_a_reference_is_refused(keys: dict):
    with pytest.raises(ConfigError, match="none is named"):
        measured(keys, stage="dpo", eval_dataset="held")
    assert figures(measured(keys, stage="simpo", eval_dataset="held"))["accuracy"] >= 0.0


def test_rows_of_a_training_that_holds_some_back_are_those(config: Callable, tmp_path: Path):
    cfg = config(val_size=0.3, do_train=True, max_steps=2)
    run(cfg)
    told = json.loads((tmp_path / "out" / "eval_results.json").read_text(encoding="utf-8"))
    report = evaluate(evaluation_config([str(tmp_path / "out")], None, [*PLAIN, "eval_measures=preference"]))
    assert report.models[1].figures["accuracy"].count == 6
    assert figures(report, 1)["loss"] == pytest.approx(told["eval_loss"], rel=1e-4)
