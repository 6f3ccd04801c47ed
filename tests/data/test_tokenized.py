"""A second start finds the first one's tokens and report; any number of processes makes the same ones."""

from __future__ import annotations

import json
import logging
import os
import random

import pytest

from tests.data.tiny_tokenizers import make_tokenizer
from trueup import memory
from trueup.config.load import load_config
from trueup.data import digests, encode, tokenized
from trueup.data.encode import prepare
from trueup.data.encoder import Policy, encode_examples
from trueup.data.given import GivenRows
from trueup.data.load import load_examples_for
from trueup.data.report import DataReport
from trueup.data.templates import load_template
from trueup.errors import CorruptStateError, DataError


@pytest.fixture(name="rows")
def mixed_rows(tmp_path):
    """Pairs of all fates: kept, cut, dropped for each reason, twice, reversed, with control tokens."""
    draw = random.Random(0)
    rows = []
    for i in range(120):
        words = [f"word{draw.randrange(40)}" for _ in range(draw.randrange(1, 30))]
        rows.append({"prompt": f"question {i}?", "chosen": " ".join(words), "rejected": f"no, {i} 你好"})
    rows += [rows[3], {**rows[4], "chosen": rows[4]["rejected"], "rejected": rows[4]["chosen"]}]
    rows += [{"prompt": "long " * 200, "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "", "rejected": "b"}]
    rows += [
        {"prompt": "p", "chosen": "same", "rejected": "same"},
        {"prompt": "<|im_end|>", "chosen": "x", "rejected": "y"},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRUEUP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "_WORTH_BYTES", 0)
    return tmp_path / "cache" / "tokenized"


def config(rows, tmp_path, **options):
    base = {"model_name_or_path": "x", "stage": "dpo", "dataset": str(rows), "template": "chatml", "cutoff_len": 64}
    return load_config({**base, "val_size": 0.1, "output_dir": str(tmp_path / "out"), **options})


def everything(prepared):
    """What a run takes from its data, comparable."""
    sets = {"train": prepared.train, **prepared.eval}
    tokens = {name: (dataset.fingerprint, dataset.rows) for name, dataset in sets.items()}
    return tokens, prepared.report.to_dict(), prepared.report.render()


def forbid_reading(monkeypatch):
    def never(*_args, **_options):
        raise AssertionError("the data were read again")

    monkeypatch.setattr(encode, "load_examples_for", never)
    monkeypatch.setattr(encode, "encode_examples", never)


def test_any_number_of_workers_makes_the_same(rows, tmp_path):
    template = load_template(make_tokenizer("qwen"), "chatml")
    examples = load_examples_for(config(rows, tmp_path, val_size=0)).train
    results = [
        encode_examples(examples, template, Policy(64), workers, chunk)
        for workers, chunk in ((1, 1000), (2, 7), (3, 20), (8, 1), (None, 50))
    ]
    first, tally = results[0]
    assert tally.truncated and tally.dropped and tally.control_tokens
    for dataset, other in results[1:]:
        assert dataset.fingerprint == first.fingerprint and dataset.rows == first.rows
        assert other == tally


def test_the_number_of_workers_changes_nothing_of_a_run(rows, tmp_path):
    one, three = (
        prepare(config(rows, tmp_path, preprocessing_num_workers=n, overwrite_cache=True), make_tokenizer("chatml"))
        for n in (1, 3)
    )
    assert everything(one) == everything(three)


def test_a_second_start_reads_no_row_and_says_the_same(rows, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.WARNING, "trueup")
    first = prepare(config(rows, tmp_path), make_tokenizer("chatml"))
    said = [record.getMessage() for record in caplog.records]
    caplog.clear()
    forbid_reading(monkeypatch)
    caplog.set_level(logging.INFO, "trueup")
    again = prepare(config(rows, tmp_path), make_tokenizer("chatml"))
    assert everything(again) == everything(first)
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == said
    assert sum("tokens are read from the cache" in r.getMessage() for r in caplog.records) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"cutoff_len": 63}, {"truncation": "keep_end"}, {"template": "default"}, {"val_size": 0.2}, {"seed": 1},
        {"max_samples": 50}, {"default_system": "be brief"}, {"overwrite_cache": True},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_whatever_matters_makes_new_tokens(change, rows, tmp_path, monkeypatch):
    prepare(config(rows, tmp_path), make_tokenizer("chatml"))
    forbid_reading(monkeypatch)
    with pytest.raises(AssertionError, match="read again"):
        prepare(config(rows, tmp_path, **change), make_tokenizer("chatml"))


def test_each_key_that_decides_tokens_or_their_order_has_a_name_of_its_own(rows, tmp_path):
    """Keys are asked for their copy's name alone, which is quick: so all of them are, and of the registry's too."""
    entry = {"file_name": rows.name}
    entries = {"columns": {"prompt": "chosen"}, "num_samples": 7, "formatting": "trl", "tags": {"user_tag": "me"}}
    registry = {"plain": entry, **{key: entry | {key: value} for key, value in entries.items()}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(registry), encoding="utf-8")
    changes = [
        {"stage": "sft", "train_on_prompt": True}, {"stage": "sft", "mask_history": True}, {"stage": "sft"},
        {"stage": "sft", "mask_thinking": True}, {"cutoff_len": 63},
        {"truncation": "drop"}, {"enable_thinking": False}, {"enable_thinking": None},
        {"split_special_tokens": False}, {"default_system": "s"}, {"template": "qwen3"},
        {"template": "qwen3", "preserve_thinking": True}, {"stage": "kto"}, {"stage": "rm"}, {"seed": 1},
        {"data_seed": 2}, {"val_size": 0.2}, {"max_samples": 9}, {"dataset": f"{rows},{rows}"},
        {"dataset": f"{rows},{rows}", "mix_strategy": "interleave_under"},
        {"dataset": f"{rows},{rows}", "mix_strategy": "interleave_over"},
        {"dataset": f"{rows},{rows}", "mix_strategy": "interleave_over", "interleave_probs": "0.5,0.5"},
        {"val_size": 0.0}, {"val_size": 0.0, "eval_dataset": str(rows)},
        {"val_size": 0.0, "eval_dataset": str(rows), "eval_on_each_dataset": True},
        *({"dataset": name, "dataset_dir": str(tmp_path)} for name in registry),
    ]  # fmt: skip
    tokenizer, names = make_tokenizer("chatml"), {}
    for change in [{}, *changes]:
        cfg = config(rows, tmp_path, **change)
        copy, _ = encode._copy_of(cfg, encode.run_template(cfg, tokenizer), encode._policy(cfg), tokenizer)
        names.setdefault(copy.folder, []).append(change)
    assert not [alike for alike in names.values() if len(alike) > 1]


def test_what_does_not_matter_finds_the_copy(rows, tmp_path, monkeypatch):
    prepare(config(rows, tmp_path), make_tokenizer("chatml"))
    forbid_reading(monkeypatch)
    options = {"learning_rate": 1.0, "output_dir": str(tmp_path / "b"), "preprocessing_num_workers": 2}
    prepare(config(rows, tmp_path, **options), make_tokenizer("chatml"))


def test_other_bytes_or_another_tokenizer_make_new_tokens(rows, tmp_path, monkeypatch):
    prepare(config(rows, tmp_path), make_tokenizer("chatml"))
    forbid_reading(monkeypatch)
    with pytest.raises(AssertionError, match="read again"):
        prepare(config(rows, tmp_path), make_tokenizer("qwen"))
    rows.write_bytes(rows.read_bytes().replace(b"question 7?", b"question 7!"))
    with pytest.raises(AssertionError, match="read again"):
        prepare(config(rows, tmp_path), make_tokenizer("chatml"))


def test_bad_rows_are_refused_from_the_copy_too(rows, tmp_path, monkeypatch):
    prepare(config(rows, tmp_path), make_tokenizer("chatml"))
    forbid_reading(monkeypatch)
    with pytest.raises(DataError, match="equal pair"):
        prepare(config(rows, tmp_path, on_bad_rows="error"), make_tokenizer("chatml"))


@pytest.mark.parametrize("victim", ["about.json", "train/tokens.safetensors", "eval/index.json"])
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_a_damaged_copy_is_said_and_made_again(victim, how, rows, tmp_path, own_cache, caplog):
    first = prepare(config(rows, tmp_path), make_tokenizer("chatml"))
    (copy,) = own_cache.iterdir()
    path = copy / victim
    path.write_bytes(path.read_bytes()[:-20]) if how == "cut" else path.unlink()
    with caplog.at_level(logging.WARNING, "trueup"):
        again = prepare(config(rows, tmp_path), make_tokenizer("chatml"))
    assert everything(again) == everything(first)
    assert (victim, how) == ("about.json", "gone") or "cached tokens are made again" in caplog.text
    assert [path.name for path in own_cache.iterdir()] == [copy.name]


def test_a_damaged_copy_of_the_users_is_refused(rows, tmp_path):
    cfg = config(rows, tmp_path, tokenized_path=str(tmp_path / "mine"))
    prepare(cfg, make_tokenizer("chatml"))
    note = tmp_path / "mine" / "about.json"
    note.write_bytes(note.read_bytes()[:-20])
    with pytest.raises(CorruptStateError, match="overwrite_cache"):
        prepare(cfg, make_tokenizer("chatml"))


def test_small_data_are_not_cached(rows, tmp_path, monkeypatch, own_cache):
    monkeypatch.setattr(digests, "_WORTH_BYTES", 10**9)
    prepare(config(rows, tmp_path), make_tokenizer("chatml"))
    assert not own_cache.exists()


def test_a_cache_that_cannot_be_written_costs_time_only(rows, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("TRUEUP_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING, "trueup"):
        assert len(prepare(config(rows, tmp_path), make_tokenizer("chatml")).train)
    assert "could not be cached" in caplog.text


def test_the_copies_used_longest_ago_go_first(rows, tmp_path, monkeypatch, own_cache):
    for number, cutoff in enumerate((60, 61, 62)):
        prepare(config(rows, tmp_path, cutoff_len=cutoff), make_tokenizer("chatml"))
        for folder in own_cache.iterdir():
            if (folder / "about.json").stat().st_mtime > 1000:
                os.utime(folder / "about.json", (number, number))
    size = max(tokenized._size(folder) for folder in own_cache.iterdir())
    prepare(config(rows, tmp_path, cutoff_len=60), make_tokenizer("chatml"))  # used again: now the newest
    monkeypatch.setattr(tokenized, "_MOST_BYTES", int(2.5 * size))
    prepare(config(rows, tmp_path, cutoff_len=63), make_tokenizer("chatml"))
    left = {
        json.loads((f / "about.json").read_text(encoding="utf-8"))["facts"]["cutoff_len"] for f in own_cache.iterdir()
    }
    assert left == {60, 63}


def test_a_report_comes_back_as_it_was(rows, tmp_path):
    report = load_examples_for(config(rows, tmp_path)).report
    again = DataReport.restored(json.loads(json.dumps(report.state())))
    assert again.to_dict() == report.to_dict() and again.render() == report.render()
    assert list(again.warnings()) == list(report.warnings())
    kept = {"datasets", "splits", "cutoff_len", "epoch_tokens", "notes", "_dropped"}
    said_by_encoding = {"_said", "_truncated", "_measured", "_cut"}
    assert vars(report).keys() == kept | said_by_encoding, "a new attribute: keep it in `state`, or name it here"


# --- rows that are in no file of this machine ---------------------------------------------


def _given(rows, tmp_path):
    """A run on rows that a program hands over."""
    found = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    with memory.holding({"dataset": GivenRows(found)}):
        return prepare(config("memory:dataset", tmp_path), make_tokenizer("chatml"))


def _from_hub(rows, tmp_path):
    """A run on a hub's dataset, whose library is asked anew each time."""
    from datasets import Dataset

    found = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.load_dataset", lambda *_, **__: Dataset.from_list(found))
        patch.setattr("trueup.data.hubs.mind_the_hub", lambda: None)
        return prepare(config("somebody/pairs", tmp_path), make_tokenizer("chatml"))


def _forbid_tokenising(monkeypatch):
    def never(*_args, **_options):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(encode, "encode_examples", never)


@pytest.mark.parametrize("run", [_given, _from_hub])
def test_rows_of_a_program_or_a_hub_are_tokenised_once(run, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "_WORTH_ROWS", 0)
    first = run(rows, tmp_path)
    with monkeypatch.context() as patch:
        _forbid_tokenising(patch)
        assert everything(run(rows, tmp_path)) == everything(first)
        rows.write_bytes(rows.read_bytes().replace(b"question 7?", b"question 7!"))
        with pytest.raises(AssertionError, match="tokenised again"):
            run(rows, tmp_path)
    changed = run(rows, tmp_path)
    assert len(changed.train) == len(first.train) and everything(changed)[0] != everything(first)[0]


@pytest.mark.parametrize("run", [_given, _from_hub])
def test_few_rows_of_a_program_or_a_hub_are_not_cached(run, rows, tmp_path, own_cache):
    run(rows, tmp_path)
    assert not own_cache.exists()
