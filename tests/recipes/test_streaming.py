"""`streaming: true`: whole runs on rows that are read while they train."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.recipes.conftest import pairs
from tests.recipes.test_runs import assert_same_bits, metrics
from trueup.config.schema import RunConfig, dump_yaml
from trueup.errors import ConfigError, CorruptStateError, DataError
from trueup.recipes.check import check
from trueup.recipes.offline import run

Config = Callable[..., RunConfig]
STREAM = {"streaming": True, "buffer_size": 8, "max_steps": 7, "num_train_epochs": 3, "logging_steps": 2}
SAVING = {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
STAGES = {
    "dpo": {"stage": "dpo"},
    "sft": {"stage": "sft", "dataset": "chats"},
    "pt": {"stage": "pt", "dataset": "texts", "packing": True, "cutoff_len": 24},
    "kto": {"stage": "kto", "dataset": "labels"},
    "rm": {"stage": "rm", "dataset": "pairs"},
    "tokens": {"stage": "dpo", "batch_tokens": 96},
    "mixed": {"stage": "dpo", "dataset": "pairs,held,pairs", "mix_strategy": "interleave_over",
              "interleave_probs": "0.5,0.3,0.2"},
    "knowledge": {"stage": "dpo", "dataset": "pairs,knowledge", "knowledge_weight": 0.5},
}  # fmt: skip


def report_of(directory: Path) -> dict:
    report = json.loads((directory / "data_report.json").read_text(encoding="utf-8"))
    for entry in report["datasets"].values():
        assert entry["read"] == entry["kept"] + sum(rows["count"] for rows in entry["dropped"].values())
    return report


def drop_later(directory: Path, step: int) -> None:
    for checkpoint in directory.glob("checkpoint-*"):
        if int(checkpoint.name.split("-")[1]) > step:
            shutil.rmtree(checkpoint)


@pytest.mark.parametrize("name", STAGES)
def test_a_streamed_run_resumed_anywhere_ends_with_the_same_bits(config: Config, tmp_path: Path, name: str) -> None:
    """Steps within a buffer, across two, and into the second pass through the data."""
    keys = {**STREAM, **SAVING, **STAGES[name], "lora_dropout": 0.1}
    if "packing" not in keys:
        keys |= {"eval_strategy": "steps", "eval_steps": 3, "val_size": 3}
    whole = tmp_path / "whole"
    run(config(**keys, output_dir=str(whole)))
    assert [row["step"] for row in metrics(whole) if "loss" in row] == [2, 4, 6, 7]
    for k in (1, 2, 5):
        again = tmp_path / f"resumed-{k}"
        shutil.copytree(whole, again)
        drop_later(again, k)
        run(config(**keys, output_dir=str(again), resume_from_checkpoint="auto"))
        assert_same_bits(whole / "checkpoint-7", again / "checkpoint-7")
        assert metrics(whole) == metrics(again)
        assert report_of(whole) == report_of(again)


def test_a_killed_run_goes_on_to_the_bit(config: Config, tmp_path: Path) -> None:
    keys = {**STREAM, **SAVING, "max_steps": 30}
    run(config(**keys, output_dir=str(tmp_path / "whole")))
    killed = config(**keys, output_dir=str(tmp_path / "killed"), resume_from_checkpoint="auto")
    path = tmp_path / "killed.yaml"
    path.write_text(dump_yaml(killed), encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-m", "trueup", "train", str(path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    while not (tmp_path / "killed" / "checkpoint-3" / "manifest.json").exists():
        assert process.poll() is None, process.communicate()[0].decode()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()  # type: ignore[union-attr]
    run(killed)
    assert_same_bits(tmp_path / "whole" / "checkpoint-30", tmp_path / "killed" / "checkpoint-30")
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "killed")


def test_in_order_a_stream_trains_as_the_whole_does(config: Config, tmp_path: Path) -> None:
    """One buffer or many: without shuffling the rows come as they lie, so the steps are those of an ordinary run."""
    keys = {"disable_shuffling": True, "precompute_ref_log_probs": False, "max_steps": 5, "dataset": "pairs,held",
            "mix_strategy": "interleave_once", "per_device_train_batch_size": 4, "logging_steps": 1}  # fmt: skip
    run(config(**keys, output_dir=str(tmp_path / "whole")))
    for size in (3, 100):
        output = tmp_path / f"stream-{size}"
        run(config(**keys, streaming=True, buffer_size=size, output_dir=str(output)))
        mine, other = metrics(output), metrics(tmp_path / "whole")
        assert [row["loss"] for row in mine] == [row["loss"] for row in other]
        assert_same_bits(tmp_path / "whole", output)


def test_two_processes_equal_one_on_a_stream(config: Config, tmp_path: Path) -> None:
    keys = {**STREAM, "buffer_size": 5, "learning_rate": 1e-4, "val_size": 3, "eval_strategy": "steps", "eval_steps": 4}
    run(
        config(
            **keys, **{k: v for k, v in SAVING.items() if "size" in k or "acc" in k}, output_dir=str(tmp_path / "one")
        )
    )
    two = config(**keys, per_device_train_batch_size=2, output_dir=str(tmp_path / "two"))
    path = tmp_path / "two.yaml"
    path.write_text(dump_yaml(two), encoding="utf-8")
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29517", "-m", "trueup",
         "train", str(path)],
        check=True, capture_output=True, env=None,
    )  # fmt: skip
    mine, other = metrics(tmp_path / "two"), metrics(tmp_path / "one")
    for a, b in zip(mine, other, strict=True):
        for key in a.keys() & {"loss", "eval_loss"}:
            assert a[key] == pytest.approx(b[key], rel=1e-5)
    assert report_of(tmp_path / "two") == report_of(tmp_path / "one")


def test_the_report_counts_what_has_been_read_at_each_checkpoint(
    config: Config, data_dir: Path, tmp_path: Path
) -> None:
    rows = pairs(21)
    rows[3]["chosen"] = rows[12]["rejected"] = ""
    (data_dir / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    keys = {**STREAM, **SAVING, "val_size": 2, "eval_strategy": "steps", "eval_steps": 7}
    run(config(**keys, output_dir=str(tmp_path / "out")))
    report = report_of(tmp_path / "out")
    entry = report["datasets"]["pairs"]
    assert (entry["read"], entry["kept"]) == (21, 19)
    assert entry["dropped"]["empty chosen"]["rows"] == ["pairs:3"]
    assert entry["dropped"]["empty rejected"]["rows"] == ["pairs:12"]
    assert report["splits"] == {"train": 17, "eval": 2}
    run(config(**{**keys, "max_steps": 1}, output_dir=str(tmp_path / "short")))
    assert report_of(tmp_path / "short")["datasets"]["pairs"]["read"] == 10  # held out, and a buffer


def test_bad_rows_in_a_later_buffer_stop_the_run_if_asked_to(config: Config, data_dir: Path, tmp_path: Path) -> None:
    rows = pairs(21)
    rows[17]["chosen"] = ""
    (data_dir / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(DataError, match=r"empty chosen in 1 of \d+ rows: pairs:17"):
        run(config(**STREAM, **SAVING, on_bad_rows="error", output_dir=str(tmp_path / "out")))
    assert (tmp_path / "out" / "checkpoint-2" / "manifest.json").exists()


def test_a_fault_far_into_the_data_keeps_the_last_checkpoint(
    config: Config, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trueup.data.buffers.PEEKED", 5)
    lines = [json.dumps(row) for row in pairs(21)]
    lines[18] = lines[18][:-3]
    (data_dir / "pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(DataError, match=r"pairs\.jsonl:19:\d+: unterminated string"):
        run(config(**STREAM, **SAVING, output_dir=str(tmp_path / "out")))
    assert (tmp_path / "out" / "checkpoint-2" / "manifest.json").exists()


def test_data_that_changed_are_refused_on_resume(config: Config, data_dir: Path, tmp_path: Path, monkeypatch) -> None:
    """By their names, sizes and edges; what these do not show is seen when the rows are read again."""
    keys = {**STREAM, **SAVING, "output_dir": str(tmp_path / "out")}
    run(config(**{**keys, "max_steps": 2}))
    path = data_dir / "pairs.jsonl"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("sun", "SUN", 1), encoding="utf-8")
    with pytest.raises(CorruptStateError, match="data_fingerprint"):
        run(config(**keys, resume_from_checkpoint="auto"))
    with pytest.raises(CorruptStateError, match="the data have changed since the checkpoint"):
        run(config(**keys, resume_from_checkpoint="auto", allow_changed="data_fingerprint"))
    path.write_text(text, encoding="utf-8")
    run(config(**keys, resume_from_checkpoint="auto"))


def test_check_tells_of_the_first_buffer(config: Config) -> None:
    shown = check(config(**STREAM)).render()
    assert "7 in all, of 28 rows read while training" in shown
    assert "streamed: rows are counted as far as they have been read" in shown.replace("\n", " ")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"max_steps": -1}, "set max_steps"),
        ({"val_size": 0.1}, "hold out a number of rows"),
        ({"eval_strategy": "steps"}, "set val_size to a number of rows"),
        ({"precompute_ref_log_probs": True}, "drop precompute_ref_log_probs"),
        ({"tokenized_path": "tokens"}, "drop one of the two"),
        ({"stage": "grpo", "reward_funcs": "length"}, "drop streaming"),
    ],
)
def test_what_a_stream_cannot_do_is_refused(config: Config, keys: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config(**{**STREAM, **keys})


def test_holding_out_all_rows_is_refused(config: Config) -> None:
    with pytest.raises(ConfigError, match="leaves none to train on"):
        check(config(**{**STREAM, "val_size": 21}))


def test_a_tied_ranking_is_left_out_once(config: Config, data_dir: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"q {i}", "responses": ["red", "blue"], "scores": [1, i % 5]} for i in range(20)]
    (data_dir / "ranked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    keys = {**STREAM, **SAVING, "stage": "rm", "dataset": str(data_dir / "ranked.jsonl"), "max_steps": 12}
    run(config(**keys, output_dir=str(tmp_path / "out")))
    report = report_of(tmp_path / "out")
    assert report["datasets"]["ranked"]["dropped"]["all answers tie"]["count"] == 4
    assert report["splits"]["train"] == 16


def test_an_evaluation_alone_takes_the_rows_that_training_holds_out(config: Config, tmp_path: Path) -> None:
    keys = {**STREAM, "stage": "sft", "dataset": "chats", "val_size": 3}
    run(config(**keys, eval_strategy="steps", eval_steps=7, eval_on_start=True, output_dir=str(tmp_path / "out")))
    run(config(**keys, do_train=False, do_eval=True, output_dir=str(tmp_path / "alone")))
    alone = json.loads((tmp_path / "alone" / "eval_results.json").read_text("utf-8"))
    assert alone["eval_loss"] == pytest.approx(metrics(tmp_path / "out")[0]["eval_loss"], rel=1e-6)
