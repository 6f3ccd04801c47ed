"""Reward models: what must not change a step, what is saved, what other programs make of it, what is learnt."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from peft import AutoPeftModelForSequenceClassification, PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.recipes.conftest import pairs
from tests.recipes.test_equivalence import assert_same_step, perturb, step
from tests.recipes.test_runs import assert_same_bits, metrics
from trueup.cli import main, next_commands
from trueup.config.load import load_config
from trueup.config.schema import RunConfig
from trueup.data.encode import prepare
from trueup.errors import ConfigError, DataError, ModelError
from trueup.models.load import load_policy, load_tokenizer
from trueup.models.reward import RewardModel, load_reward_model
from trueup.recipes.batches import plan_batches
from trueup.recipes.check import check
from trueup.recipes.program import OfflineProgram
from trueup.recipes.reward import teachable
from trueup.recipes.run import run
from trueup.recipes.scoring import score
from trueup.training.backend import Single

Config = Callable[..., RunConfig]
FULL = {"finetuning_type": "full", "lora_rank": None}


@pytest.fixture
def rm(config: Config, data_dir: Path) -> Config:
    """The config of a reward model; `rankings`, `scores` and `labels` are there as data, too."""
    rows = [
        {"instruction": r["instruction"], "output": [r["chosen"], r["rejected"], r["chosen"] + " one"][: 2 + i % 2],
         "scores": [3, 1, i % 3][: 2 + i % 2]}
        for i, r in enumerate(pairs(21))
    ]  # fmt: skip
    scores = [
        {"instruction": r["instruction"], "output": r["chosen"], "score": 0.1 * i} for i, r in enumerate(pairs(9))
    ]
    for name, content in {"rankings": rows, "scores": scores}.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        (data_dir / f"{name}.jsonl").write_text(text, encoding="utf-8")
    registry = json.loads((data_dir / "dataset_info.json").read_text(encoding="utf-8"))
    registry |= {"rankings": {"file_name": "rankings.jsonl"}, "scores": {"file_name": "scores.jsonl"}}
    (data_dir / "dataset_info.json").write_text(json.dumps(registry), encoding="utf-8")
    return lambda **keys: config(**{"stage": "rm", **keys})


def program_of(cfg: RunConfig) -> OfflineProgram:
    tokenizer = load_tokenizer(cfg.model)
    prepared = teachable(cfg, prepare(cfg, tokenizer))
    plan, _ = plan_batches(cfg, prepared.train.lengths)
    loaded = load_policy(cfg.model, cfg.tuning, cfg.train, tokenizer, kind=RewardModel)
    return OfflineProgram(cfg, loaded, tokenizer, prepared, plan, None, Single("cpu"))


def one_step(cfg: RunConfig):
    program = program_of(cfg)
    perturb(program)
    return step(program)


KINDS = {
    "pairs": {},
    "centred": {"center_rewards_coefficient": 0.01},
    "rankings": {"dataset": "rankings", "score_margin": 0.1},
    "order": {"dataset": "rankings", "reward_loss": "plackett_luce"},
    "scores": {"dataset": "scores", "reward_loss": "pointwise"},
    "labels": {"dataset": "scores", "reward_loss": "binary"},
}


# --- values and equivalences ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tuning", [{}, FULL, {"finetuning_type": "freeze", "lora_rank": None}],
                         ids=["lora", "full", "freeze"])  # fmt: skip
def test_with_a_head_of_zeros_the_loss_is_ln_2(rm: Config, tuning: dict) -> None:
    program = program_of(rm(**tuning))
    assert any("score" in name for name in program.trainable)
    for name, parameter in program.trainable.items():
        if "score" in name:
            parameter.data.zero_()
    loss, told, _ = step(program)
    assert loss == pytest.approx(math.log(2), abs=1e-7)
    assert (told["accuracy"], told["margin"], told["mean_reward"]) == (0.5, 0.0, 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_batch_8x1_equals_1x8(rm: Config, kind: str) -> None:
    whole = one_step(rm(per_device_train_batch_size=8, **KINDS[kind]))
    pieces = one_step(rm(per_device_train_batch_size=1, gradient_accumulation_steps=8, **KINDS[kind]))
    assert_same_step(pieces, whole, tolerance=3e-6)
    assert pieces[1] == pytest.approx(whole[1], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("tuning", [{}, FULL], ids=["lora", "full"])
def test_shared_equals_unshared(rm: Config, tuning: dict) -> None:
    program = program_of(rm(dataset="rankings", **tuning))
    perturb(program)
    assert program.policy.shared
    shared = step(program)
    program.policy.shared = False
    program.policy.base.set_attn_implementation(program.policy.plain_attention)
    assert_same_step(shared, step(program), tolerance=5e-6)


def test_two_processes_train_as_one(rm: Config, tmp_path: Path) -> None:
    outputs = []
    for processes in (1, 2):
        output = tmp_path / f"world{processes}"
        cfg = rm(per_device_train_batch_size=4 // processes, max_steps=3, dataset="rankings", output_dir=str(output))
        path = tmp_path / f"world{processes}.json"
        path.write_text(json.dumps(cfg.resolved()), encoding="utf-8")
        subprocess.run(
            [sys.executable, "-m", "trueup", "train", str(path)], check=True, capture_output=True, timeout=500,
            env={**os.environ, "NPROC_PER_NODE": str(processes), "FORCE_TORCHRUN": str(processes - 1),
                 "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        outputs.append(output)
    for a, b in zip(*map(metrics, outputs), strict=True):
        for name in ("loss", "accuracy", "margin", "mean_reward", "min_reward", "grad_norm"):
            assert a.get(name) == pytest.approx(b.get(name), rel=1e-5, abs=1e-6), name


# --- files ----------------------------------------------------------------------------------------------------


def plain_scores(model, tokenizer, rows: list[dict]) -> list[float]:
    """Scores of whole conversations in one padded batch, as a user of transformers computes them."""
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row[side]}],
            tokenize=False,
        ).rstrip("\n")
        for row in rows
        for side in ("chosen", "rejected")
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.no_grad():
        return model(**batch).logits[:, 0].tolist()


@pytest.mark.parametrize("tuning", [{}, FULL, {"lora_rank": 2, "adapter_name_or_path": "{sft}"}],
                         ids=["lora", "full", "lora over an sft adapter"])  # fmt: skip
def test_plain_transformers_gives_the_scores_that_were_trained(
    rm: Config, config: Config, tiny_dir: Path, tmp_path: Path, tuning: dict
) -> None:
    if "adapter_name_or_path" in tuning:
        run(config(stage="sft", dataset="chats", max_steps=3, output_dir=str(tmp_path / "sft")))
        tuning = {**tuning, "adapter_name_or_path": str(tmp_path / "sft")}
    output = tmp_path / "rm"
    run(rm(max_steps=4, output_dir=str(output), **tuning))
    tokenizer = AutoTokenizer.from_pretrained(output)
    if (output / "adapter_config.json").is_file():
        base = AutoModelForSequenceClassification.from_pretrained(
            tiny_dir, num_labels=1, pad_token_id=tokenizer.pad_token_id
        )
        model = PeftModel.from_pretrained(base, output)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(output)
    assert model.config.pad_token_id == tokenizer.pad_token_id is not None and model.config.num_labels == 1
    expected = plain_scores(model.eval(), tokenizer, pairs(6, seed=1))

    data = tmp_path / "data" / "held.jsonl"
    inference = load_config({"model_name_or_path": str(output), "dataset": str(data), "device": "cpu", "bf16": False},
                            verb="infer")  # fmt: skip
    done, lines = score(inference, tmp_path / "scores.jsonl")
    actual = [reward for line in lines for reward in line["rewards"]]
    assert actual == pytest.approx(expected, abs=1e-5)
    assert done.rows == 6 and done.answers == 12 and 0 <= (done.accuracy or 0) <= 1
    written = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
    assert written == lines and written[0]["row"] == "held:0"
    with pytest.raises(ConfigError, match="exists already"):
        score(inference, tmp_path / "scores.jsonl")


def test_an_adapter_loads_through_pefts_auto_class(rm: Config, tmp_path: Path) -> None:
    run(rm(max_steps=2))
    model = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "out", num_labels=1)
    assert model.config.num_labels == 1
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))
    assert saved["task_type"] == "SEQ_CLS" and saved["modules_to_save"] == ["score"]
    assert "score" not in saved["target_modules"]


def test_scores_of_token_ids_share_prompts_and_batches_without_a_difference(rm: Config, tmp_path: Path) -> None:
    run(rm(max_steps=2, **FULL))
    section = rm().model
    model = load_reward_model(section, str(tmp_path / "out"))
    prompts = [[5, 6, 7, 8], [5, 6, 7, 8], [9, 4], [5, 6, 7, 8], []]
    answers = [[11, 12], [13], [14, 15, 2], [16, 17, 18], [21, 22, 23]]
    together, alone = model(prompts, answers), model(prompts, answers, batch_tokens=1)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert len(model([], [])) == 0


def test_a_row_is_read_where_transformers_reads_it(rm: Config, tmp_path: Path) -> None:
    """Padding with the token that ends answers, transformers reads the token before it; so do we."""
    run(rm(max_steps=2, **FULL))
    model = load_reward_model(rm().model, str(tmp_path / "out"))
    model.pad_with(2)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", pad_token_id=2)
    ids = torch.tensor([[5, 6, 7, 11, 12, 2], [5, 6, 7, 13, 2, 2]])
    with torch.no_grad():
        expected = plain(input_ids=ids, attention_mask=torch.tensor([[1] * 6, [1] * 5 + [0]])).logits[:, 0]
    torch.testing.assert_close(model([[5, 6, 7]] * 2, [[11, 12, 2], [13, 2]]), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tuning", [{}, FULL], ids=["lora", "full"])
def test_resume_is_exact(rm: Config, tmp_path: Path, tuning: dict) -> None:
    keys = {"save_strategy": "steps", "save_steps": 3, "lora_dropout": 0.0 if tuning else 0.1, **tuning}
    if tuning:
        keys.pop("lora_dropout")
    run(rm(max_steps=6, output_dir=str(tmp_path / "whole"), **keys))
    run(rm(max_steps=6, output_dir=str(tmp_path / "parts"), **keys))
    for name in ("checkpoint-6",):
        assert_same_bits(tmp_path / "whole" / name, tmp_path / "parts" / name)
    run(rm(max_steps=6, output_dir=str(tmp_path / "parts"),
           resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"), **keys))  # fmt: skip
    assert_same_bits(tmp_path / "whole" / "checkpoint-6", tmp_path / "parts" / "checkpoint-6")
    assert metrics(tmp_path / "whole")[-1] == metrics(tmp_path / "parts")[-1]


def test_a_reward_model_is_continued(rm: Config, tmp_path: Path) -> None:
    run(rm(max_steps=3))
    program = program_of(rm(adapter_name_or_path=str(tmp_path / "out")))
    assert program.adapters is not None and program.adapters.continued
    last, first = metrics(tmp_path / "out")[-1], step(program)[0]
    assert first < math.log(2) or last["loss"] > first / 2  # it goes on from where the run left off
    whole = program_of(rm(model_name_or_path=str(tmp_path / "out"), **FULL))  # merged, head and all
    assert step(whole)[0] == pytest.approx(first, rel=1e-5)


def test_the_verb_prints_lines_and_a_summary(rm: Config, data_dir: Path, tmp_path: Path) -> None:
    run(rm(max_steps=1))
    words = ["score", "--model_name_or_path", str(tmp_path / "out"), "--dataset", str(data_dir / "scores.jsonl"),
             "--device", "cpu", "--bf16", "false"]  # fmt: skip
    printed = CliRunner().invoke(main, [*words, "--output", "-"])
    rows = [json.loads(line) for line in printed.stdout.splitlines()]
    assert printed.exit_code == 0 and len(rows) == 9 and rows[3]["scores"] == [pytest.approx(0.3)]
    told = CliRunner().invoke(main, [*words, "--output", str(tmp_path / "scores.jsonl"), "--json"])
    result = json.loads(told.stdout)["result"]
    assert result["rows"] == result["answers"] == 9 and result["accuracy"] is None
    following = next_commands(rm(), tmp_path / "out")
    assert following[0].startswith(f"trueup score --model_name_or_path {tmp_path / 'out'} --dataset pairs")


# --- what is refused, what is left out ------------------------------------------------------------------------


def test_a_language_model_is_no_reward_model(rm: Config, config: Config, tiny_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no reward model"):
        load_reward_model(rm().model, str(tiny_dir))
    run(config(stage="sft", dataset="chats", max_steps=1))
    with pytest.raises(ModelError, match="no reward model"):
        load_reward_model(rm().model, str(tmp_path / "out"))
    with pytest.raises(ModelError, match="no reward model"):
        run(rm(do_train=False, do_eval=True, dataset=None, eval_dataset="held", output_dir=str(tmp_path / "eval")))


def test_a_classifier_of_several_classes_is_refused(rm: Config, tiny_dir: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_dir, num_labels=3)
    model.save_pretrained(tmp_path / "three")
    AutoTokenizer.from_pretrained(tiny_dir).save_pretrained(tmp_path / "three")
    with pytest.raises(ModelError, match="3 labels"):
        load_reward_model(rm().model, str(tmp_path / "three"))


def test_rows_of_ties_are_left_out_and_counted(rm: Config, data_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = data_dir / "ties.jsonl"
    rows = [{"instruction": "sun", "output": ["red", "blue"], "scores": s} for s in ([1, 1], [2, 1])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    cfg = rm(dataset=str(path))
    prepared = teachable(cfg, prepare(cfg, load_tokenizer(cfg.model)))
    assert prepared.train.rows == ["ties:1"] and "all answers tie" in prepared.report.datasets["ties"].dropped
    assert "1 row is left out" in caplog.text


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"reward_loss": "pointwise"}, "have no score"),
        ({"reward_loss": "binary", "dataset": "rankings"}, "outside 0"),
        ({"score_margin": 1.0}, "gives no scores"),
    ],
)
def test_data_without_what_the_loss_needs_is_refused(rm: Config, keys: dict, message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        check(rm(**keys))


def test_keys_that_a_loss_does_not_read_are_refused(rm: Config) -> None:
    for keys in ({"reward_loss": "binary", "score_margin": 1.0}, {"stage": "dpo", "reward_loss": "binary"}):
        with pytest.raises(ConfigError, match="has no effect"):
            rm(dataset="scores", **keys)


def test_check_estimates_a_reward_model(rm: Config) -> None:
    report = check(rm(metric_for_best_model="accuracy", load_best_model_at_end=True, eval_dataset="held",
                      eval_strategy="epoch", save_strategy="epoch"))  # fmt: skip
    assert report.estimate.head == 0 and report.estimate.trainable > 0


# --- learning -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tuning", [{"learning_rate": 1e-3}, {**FULL, "learning_rate": 1e-4}], ids=["lora", "full"])
def test_the_built_in_pairs_are_learnt(rm: Config, tuning: dict) -> None:
    keys = {
        "model_name_or_path": "builtin:sql-tiny", "dataset": "sql_pairs_demo", "max_samples": 128,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 8, "eval_dataset": "sql_heldout_demo", "center_rewards_coefficient": 0.01,
        "logging_steps": 4,
    }  # fmt: skip
    result = run(rm(**{**keys, **tuning}))
    assert result.metrics["eval_accuracy"] >= 0.95
    assert abs(result.metrics["eval_mean_reward"]) < 1.0
