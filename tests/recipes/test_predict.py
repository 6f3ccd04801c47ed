"""Predictions: which rows are answered, what is written, with training and without, on several processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.training.processes import needs_fork, run_ranks
from trueup.config.load import load_config
from trueup.config.schema import RunConfig
from trueup.data.encoded import Answer, Encoded
from trueup.errors import ConfigError
from trueup.recipes import predict as predicting
from trueup.recipes.run import run
from trueup.rollout import similarity
from trueup.training.run_directory import read_metrics, read_status

pytest.importorskip("sacrebleu", reason="needs the extra metrics")
pytest.importorskip("rouge_score", reason="needs the extra metrics")
pytest.importorskip("jieba", reason="needs the extra metrics")

Config = Callable[..., RunConfig]
MEASURES = {"predict_bleu-4", "predict_rouge-1", "predict_rouge-2", "predict_rouge-l"}


@pytest.fixture
def sft(config: Config) -> Config:
    def make(**keys) -> RunConfig:
        base = {"stage": "sft", "dataset": "chats", "max_new_tokens": 6, "do_predict": True}
        return config(**{**base, "per_device_eval_batch_size": 4, "on_unused_keys": "warn", **keys})

    return make


def predictions(directory: Path) -> list[dict]:
    text = (directory / "generated_predictions.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_a_run_that_only_predicts_answers_every_row(sft: Config, data_dir: Path):
    """The lines of LLaMA-Factory's nlg_eval example: no dataset to train on, no do_eval."""
    result = run(sft(dataset=[], eval_dataset="chats", predict_with_generate=True))
    out, rows = result.output_dir, json.loads((data_dir / "chats.json").read_text(encoding="utf-8"))
    found = predictions(out)
    assert [line["label"] for line in found] == [row["output"] for row in rows]
    assert found[0]["prompt"] == f"<|im_start|>user\n{rows[0]['instruction']}<|im_end|>\n<|im_start|>assistant\n"
    assert all(isinstance(line["predict"], str) and line["row"] == f"chats:{i}" for i, line in enumerate(found))
    written = json.loads((out / "predict_results.json").read_text(encoding="utf-8"))
    assert written == result.metrics and written.keys() >= MEASURES | {"predict_runtime", "predict_samples_per_second"}
    assert json.loads((out / "all_results.json").read_text(encoding="utf-8")) == written
    assert not list(out.glob("adapter*")) and not (out / "eval_results.json").exists()
    assert read_status(out)["state"] == "finished"


def test_after_training_the_trained_model_answers(sft: Config, tmp_path: Path, data_dir: Path):
    """It answers as it was taught, and loaded again as it did in the run that taught it."""
    rows = [{"instruction": f"rain {i}", "output": "sun moon star"} for i in range(16)]
    (data_dir / "chats.json").write_text(json.dumps(rows), encoding="utf-8")
    keys = {"eval_dataset": "chats", "do_sample": False, "max_new_tokens": 20}
    learnt = run(sft(do_train=True, learning_rate=2e-2, max_steps=30, lora_rank=16, **keys))
    assert learnt.metrics["predict_rouge-l"] > 80
    assert {"train_loss", "eval_loss", *MEASURES} <= learnt.metrics.keys()
    found = predictions(learnt.output_dir)
    keys |= {"output_dir": str(tmp_path / "again"), "adapter_name_or_path": str(learnt.output_dir)}
    assert predictions(run(sft(dataset=[], **keys)).output_dir) == found


def test_drawn_answers_follow_the_seed(sft: Config, tmp_path: Path):
    def drawn(name: str, **keys) -> list[dict]:
        where = str(tmp_path / name)
        return predictions(run(sft(dataset=[], eval_dataset="chats", output_dir=where, **keys)).output_dir)

    assert drawn("a") == drawn("b")
    assert drawn("a") != drawn("c", seed=1)
    assert drawn("d", repetition_penalty=1.5) == drawn("e", repetition_penalty=1.5) != drawn("a")


@pytest.mark.parametrize(
    "keys, labels",
    [({"stage": "dpo", "eval_dataset": "held"}, "chosen"), ({"stage": "kto", "eval_dataset": "held_labels"}, "wanted"),
     ({"stage": "grpo", "eval_dataset": "chats"}, None)],
)  # fmt: skip
def test_every_stage_with_prompts_predicts(sft: Config, data_dir: Path, keys: dict, labels: str | None):
    found = predictions(run(sft(dataset=[], **keys)).output_dir)
    if labels is None:
        assert len(found) == 21 and all(line["label"] is None for line in found)
        return
    name = "held.jsonl" if labels == "chosen" else "held_labels.jsonl"
    rows = [json.loads(line) for line in (data_dir / name).read_text(encoding="utf-8").splitlines()]
    wanted = [r["chosen"] if labels == "chosen" else r["output"] if r["label"] else None for r in rows]
    assert [line["label"] for line in found] == wanted


def test_an_online_run_predicts_after_its_training(sft: Config, tmp_path: Path):
    (tmp_path / "rewards.py").write_text("def score(completions): return [float(len(c)) for c in completions]", "utf-8")
    keys = {"reward_funcs": f"{tmp_path}/rewards.py:score", "num_generations": 2, "max_steps": 1, "val_size": 3}
    result = run(sft(stage="grpo", do_train=True, **keys))
    assert len(predictions(result.output_dir)) == 3 and "eval_reward" in result.metrics


def test_evaluations_compare_generated_answers(sft: Config):
    keys = {"do_predict": False, "predict_with_generate": True, "do_train": True, "val_size": 5, "max_steps": 4}
    best = {
        "metric_for_best_model": "rouge-l",
        "load_best_model_at_end": True,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    result = run(sft(eval_strategy="steps", eval_steps=2, **keys, **best))
    rows = [row for row in read_metrics(result.output_dir) if "eval_loss" in row]
    assert len(rows) == 2 and {"eval_bleu-4", "eval_rouge-1", "eval_rouge-2", "eval_rouge-l"} <= rows[0].keys()
    assert not (result.output_dir / "generated_predictions.jsonl").exists()


def test_several_sets_have_measures_of_their_own(sft: Config):
    result = run(sft(dataset=[], eval_dataset="chats,knowledge", eval_on_each_dataset=True))
    assert {"predict_chats_rouge-l", "predict_knowledge_rouge-l"} <= result.metrics.keys()
    assert len(predictions(result.output_dir)) == 42


@needs_fork
def test_two_processes_write_what_one_writes(sft: Config, tmp_path: Path):
    one = run(sft(dataset=[], eval_dataset="chats")).output_dir
    together = sft(dataset=[], eval_dataset="chats", output_dir=str(tmp_path / "two"))
    assert run_ranks(lambda: run(together)) == [0, 0]
    assert predictions(tmp_path / "two") == predictions(one)


def test_a_chat_is_asked_for_its_last_answer():
    def parts(*runs: tuple[int, bool]):
        mask = np.concatenate([np.full(size, trained) for size, trained in runs])
        return Answer(np.arange(10, 10 + len(mask), dtype=np.int32), mask)

    prompt = np.array([1, 2], dtype=np.int32)
    asked, label = predicting._parts(Encoded("r", prompt, (parts((2, True), (3, False), (2, True), (1, False)),)))
    assert asked.tolist() == [1, 2, 10, 11, 12, 13, 14] and label is not None and label.tolist() == [15, 16]
    asked, label = predicting._parts(Encoded("r", prompt, (parts((2, True)),), (0.0,)))
    assert asked.tolist() == [1, 2] and label is None


def test_the_keys_of_llamafactory_s_example_are_taken():
    """examples/extras/nlg_eval/llama3_lora_predict.yaml of LLaMA-Factory 0.9."""
    keys = {
        "model_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct", "adapter_name_or_path": "saves/llama3-8b/lora/sft",
        "trust_remote_code": True, "stage": "sft", "do_predict": True, "finetuning_type": "lora",
        "eval_dataset": "identity,alpaca_en_demo", "template": "llama3", "cutoff_len": 2048, "max_samples": 50,
        "preprocessing_num_workers": 16, "dataloader_num_workers": 4, "output_dir": "saves/llama3-8b/lora/predict",
        "overwrite_output_dir": True, "report_to": "none", "per_device_eval_batch_size": 1,
        "predict_with_generate": True, "ddp_timeout": 180000000,
    }  # fmt: skip
    cfg = load_config(keys)
    assert (cfg.train.do_train, cfg.train.do_eval, cfg.train.do_predict) == (False, False, True)
    for more in ({"top_p": 0.9}, {"temperature": 0.5, "do_sample": True}, {"repetition_penalty": 1.1}):
        load_config({**keys, **more})


def test_what_cannot_be_predicted_is_refused(sft: Config, monkeypatch, tmp_path: Path):
    base = {"model_name_or_path": "m", "do_predict": True, "eval_dataset": "d"}
    for keys, words in (
        ({"stage": "rm"}, "trueup score"),
        ({"stage": "pt"}, "writes answers to prompts"),
        ({"stage": "sft", "train_on_prompt": True}, "where its answer begins"),
        ({"stage": "sft", "do_predict": False, "do_train": True, "predict_with_generate": True, "eval_dataset": [],
          "dataset": "d"}, "nothing is evaluated or predicted"),
        ({"stage": "dpo", "predict_with_generate": True}, "`predict_with_generate` has no effect with `stage: dpo`"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            load_config({**base, **keys})
    monkeypatch.setattr(similarity, "_installed", lambda name: False)
    with pytest.raises(ConfigError, match=r"trueup\[metrics\]"):
        run(sft(do_train=True, val_size=3))
    assert not (tmp_path / "out").exists()
