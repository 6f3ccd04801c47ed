"""The fault catalogue through the command line: exit code, what is said, and that nothing is written.

Messages are tested word by word beside the modules that make them; here, that a user meets them.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken

from tests.data.tiny_tokenizers import make_tokenizer
from tests.guides.conftest import (
    files,
    read_json,
    read_lines,
    read_yaml,
    register,
    save_model,
    sentences,
    succeed,
    trueup,
    write_json,
    write_lines,
)
from tests.recipes.conftest import CHATML
from trueup.data.report import number

MODEL = "Qwen/Qwen1.5-7B-Chat"
TRAIN = f"train --stage dpo --model_name_or_path {MODEL} --output_dir out"
SCREEN = 24  # lines


@pytest.fixture(autouse=True)
def here(work: Path) -> Path:
    """Every test works in a directory with models and nothing else."""
    return work


def pairs(count: int, **changes: Any) -> list[dict]:
    text = sentences(7)
    return [{"prompt": f"{i} {text(4)}", "chosen": text(5), "rejected": text(3), **changes} for i in range(count)]


def refuse(line: str, code: int, *said: str) -> str:
    """A line that must be refused: with this exit code and these words, on one screen, with nothing written."""
    before = files(Path.cwd().parent)
    result = trueup(line)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    assert files(Path.cwd().parent) == before
    error = result.stderr
    assert "error: " in error
    assert len(error.splitlines()) <= SCREEN, error
    for words in said:
        assert words in error, error
    return error


def refuse_data(content: str | bytes | list[dict], code: int, *said: str, options: str = "", name="rows.jsonl") -> str:
    """`train` and `check` on a file with this content are refused alike."""
    put(content, name)
    refuse(f"check --stage dpo --model_name_or_path {MODEL} --output_dir out --dataset {name} {options}", code, *said)
    return refuse(f"{TRAIN} --dataset {name} {options}", code, *said)


def put(content: str | bytes | list[dict], name: str = "rows.jsonl") -> Path:
    if isinstance(content, list):
        return write_json(name, content) if name.endswith(".json") else write_lines(name, content)
    data = content.encode() if isinstance(content, str) else content
    Path(name).write_bytes(data)
    return Path(name)


def as_lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def train(options: str = "", dataset: str = "rows.jsonl") -> Result:
    return succeed(f"{TRAIN} --dataset {dataset} --max_steps 1 {options}")


def report(name: str = "rows") -> dict:
    """A dataset's entry in the run's data_report.json, whose rows are all accounted for."""
    entry = read_json("out/data_report.json")["datasets"][name]
    assert entry["read"] == entry["kept"] + sum(rows["count"] for rows in entry["dropped"].values())
    return entry


# --- data ----------------------------------------------------------------------------------------


def test_d1_a_malformed_line():
    text = as_lines(pairs(16)) + '{"prompt": "q", "chosen": "never ends}\n' + as_lines(pairs(2))
    error = refuse_data(text, 3, "rows.jsonl:17:27: unterminated string")
    assert re.search(r"^ *\^$", error, re.MULTILINE)


def test_d1_many_malformed_lines_are_counted_on_one_screen():
    refuse_data(as_lines(pairs(1)) + '{"prompt": }\n' * 25, 3, "25 of 26 lines cannot be read")


def test_d2_an_array_that_is_cut_off():
    text = json.dumps(pairs(9), ensure_ascii=False)[:-30]
    size = number(len(text.encode()))
    refuse_data(text, 3, f"file ends inside element 8 (byte {size}); truncated download?", name="rows.json")


def test_d3_blank_lines_bom_and_crlf_are_accepted_and_noted_once():
    put(("\ufeff" + as_lines(pairs(3)).replace("\n", "\r\n") + "\r\n\r\n" + as_lines(pairs(2))).encode())
    result = train()
    assert report()["kept"] == 5
    notes = " ".join(read_json("out/data_report.json")["notes"])
    for word in ("byte order mark", "CRLF", "blank lines"):
        assert notes.count(word) == (result.stdout + result.stderr).count(word) == 1


@pytest.mark.parametrize(("encoding", "guess"), [("gb18030", "GB18030"), ("utf-16", "UTF-16")])
def test_d4_another_encoding(encoding: str, guess: str):
    rows = [
        {"prompt": "请介绍一下长江的长度和流经的省份。", "chosen": "长江全长约六千三百公里。", "rejected": "不知道。"}
    ]
    refuse_data(
        as_lines(rows * 20).encode(encoding), 3, "rows.jsonl", "not UTF-8", "offset", f"iconv -f {guess} -t UTF-8"
    )


def test_d5_a_renamed_column_gets_the_mapping():
    rows = [{"prompt": f"q{i}", "good": "a b", "bad": "c"} for i in range(3)]
    refuse_data(rows, 3, "found: prompt, good, bad", "did you mean `columns: {chosen: good, rejected: bad}`?")


def test_d5_a_column_named_in_the_registry_that_is_not_there():
    write_lines("data/rows.jsonl", pairs(3))
    register({"mine": {"file_name": "rows.jsonl", "type": "dpo", "columns": {"chosen": "good"}}})
    refuse(f"{TRAIN} --dataset mine", 3, "`good`", "found: prompt, chosen, rejected")


def test_d6_a_wrong_type_in_some_rows():
    rows = pairs(8)
    rows[2]["chosen"] = rows[5]["chosen"] = None
    refuse_data(rows, 3, "`chosen`", "null", "2 of 8 rows", "2, 5", "expected: text")


EMPTY = {"chosen": "empty chosen", "rejected": "empty rejected", "prompt": "empty prompt"}


def test_d7_empty_sides_are_dropped_counted_and_shown_by_default():
    put([*pairs(5), *({**pairs(1)[0], key: " \n"} for key in EMPTY)])
    result = train()
    dropped = report()["dropped"]
    assert {reason: rows["count"] for reason, rows in dropped.items()} == dict.fromkeys(EMPTY.values(), 1)
    assert dropped["empty chosen"]["rows"] == ["rows:5"]
    assert all(reason in result.stdout for reason in EMPTY.values())
    assert "3 of 8 rows are left out" in result.stderr


@pytest.mark.parametrize("key", EMPTY)
def test_d7_empty_sides_are_refused_on_request(key: str):
    rows = [*pairs(3), {**pairs(1)[0], key: ""}]
    refuse_data(rows, 3, f"{EMPTY[key]} in 1 of 4 rows: rows:3", options="--on_bad_rows error")


def test_d8_equal_sides_are_dropped_or_refused():
    rows = [*pairs(4), {"prompt": "q", "chosen": "same", "rejected": " same "}]
    refuse_data(rows, 3, "equal pair in 1 of 5 rows: rows:4", options="--on_bad_rows error")
    train()
    assert report()["dropped"]["equal pair"]["rows"] == ["rows:4"]


def test_d8_sides_that_part_beyond_the_cut_are_equal_too():
    long = "user " * 60
    put([*pairs(4), {"prompt": "q", "chosen": long + "yes", "rejected": long + "no"}])
    train("--cutoff_len 48")
    assert report()["dropped"]["equal after truncation"]["rows"] == ["rows:4"]


def long_rows() -> list[dict]:
    rows = pairs(6)
    rows[1]["chosen"] = "user " * 90
    rows[4]["rejected"] = "user " * 90 + "end"
    return rows


def test_d9_a_pair_and_its_reverse_are_said_with_both_rows():
    first, *rest = pairs(4)
    put([first, *rest, {**first, "chosen": first["rejected"], "rejected": first["chosen"]}])
    result = train()
    found = read_json("out/data_report.json")["reversed_pairs"]
    assert found["rows"] == ["rows:4"] and "rows:0" in found["excerpt"]
    assert "1 pair contradicts another row" in result.stderr


def test_d10_duplicates_are_said_and_kept_but_a_key_given_twice_is_refused():
    rows = pairs(4)
    put([*rows, rows[1]])
    result = train()
    assert report()["kept"] == 5
    assert read_json("out/data_report.json")["duplicates"]["rows"] == ["rows:4"]
    assert "1 row is an exact duplicate of earlier rows" in result.stderr
    shutil.rmtree("out")
    line = '{"prompt": "q", "chosen": "a", "chosen": "b", "rejected": "c"}\n'
    refuse_data(as_lines(rows) + line, 3, "rows.jsonl:5:32", 'key "chosen" is given twice')


def test_d11_overlap_is_said_and_with_strict_an_error():
    put(rows := pairs(6))
    put(rows[2:4], "held.jsonl")
    result = train("--eval_dataset held.jsonl")
    assert read_json("out/data_report.json")["train_eval_overlap"]["rows"] == ["held:0", "held:1"]
    assert "2 evaluation rows have a prompt that is also trained on" in result.stderr
    shutil.rmtree("out")
    refuse(f"{TRAIN} --dataset rows.jsonl --eval_dataset held.jsonl --strict", 2, "also trained on")


RANKED = {"prompt": "q", "responses": ["a b", "c", "d"], "scores": [1, 2, 3]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scores": [1, 2]}, "2 numbers for 3 answers"),
        ({"scores": [1, None, 2]}, "a list with null"),
        ({"scores": [1, 2, float("nan")]}, "a list with nan"),
        ({"scores": None, "rank": [1, 1, 2]}, "ranks [1, 1, 2]"),
    ],
)
def test_d12_scores_or_ranks_that_do_not_fit(change: dict, said: str):
    refuse_data([RANKED, {**RANKED, **change}], 3, said, "rows.jsonl:2")


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"scores": [2, 2, 2]}, "all answers tie"), ({"responses": ["a"], "scores": [1]}, "fewer than two answers")],
)
def test_d12_ties_and_single_answers_are_dropped_or_refused(change: dict, reason: str):
    rows = [*({**RANKED, "prompt": f"q {i}"} for i in range(4)), {**RANKED, **change}]
    refuse_data(rows, 3, f"{reason} in 1 of 5 rows: rows:4", options="--on_bad_rows error")
    train()
    assert report()["dropped"][reason]["rows"] == ["rows:4"]


KTO = f"train --stage kto --model_name_or_path {MODEL} --output_dir out --dataset rows.jsonl"


def labelled(*labels: Any) -> list[dict]:
    return [{"prompt": f"q {i}", "completion": f"a {i}", "label": label} for i, label in enumerate(labels)]


def test_d13_labels_that_are_no_booleans():
    put(labelled(True, 1, "true", "yes", False, 0, "No", "undesirable"))
    succeed(f"{KTO} --max_steps 1")
    assert report()["labels"] == {"desirable": 4, "undesirable": 4}
    shutil.rmtree("out")
    put(labelled(True, False, "maybe"))
    refuse(KTO, 3, "rows.jsonl:3", "`label`", "'maybe'", "true/false, 1/0, yes/no or desirable/undesirable")


def test_d14_one_class_is_refused_and_imbalance_said_with_weights():
    put(labelled(*[True] * 6))
    refuse(KTO, 3, "all 6 rows are wanted answers", "add rows of unwanted answers")
    put(labelled(*[True] * 9, False))
    result = succeed(f"{KTO} --max_steps 1")
    assert re.search(r"9 wanted and 1 unwanted answers weigh 9.00 to 1; .*kto_rejected_weight between", result.stderr)


@pytest.mark.parametrize("policy", ["keep_start", "keep_end"])
def test_d15_what_was_cut_is_counted_with_the_lengths(policy: str):
    put(long_rows())
    result = train(f"--cutoff_len 64 --truncation {policy}")
    entry = report()
    assert entry["kept"] == 6
    assert entry["truncated"]["chosen"]["rows"] == ["rows:1"]
    assert entry["truncated"]["rejected"]["rows"] == ["rows:4"]
    tokens = read_json("out/data_report.json")["tokens"]
    assert tokens["chosen"]["max"] > 64 > tokens["chosen"]["p50"]
    assert {"p50", "p95", "max"} <= tokens["rejected"].keys()
    assert "cut" in result.stdout


def test_d15_long_rows_are_dropped_or_refused_on_request():
    refuse_data(long_rows(), 3, "rows:1", "rows:4", "too long", "64", options="--cutoff_len 64 --truncation error")
    train("--cutoff_len 64 --truncation drop")
    assert report()["dropped"]["too long"]["rows"] == ["rows:1", "rows:4"]


@pytest.mark.parametrize("policy", ["keep_start", "keep_end", "drop"])
def test_d16_a_prompt_that_fills_the_length_drops_its_row(policy: str):
    rows = pairs(5)
    rows[2]["prompt"] = "user " * 90
    put(rows)
    train(f"--cutoff_len 64 --truncation {policy}")
    assert report()["dropped"]["prompt too long"]["rows"] == ["rows:2"]


@pytest.mark.parametrize("options", ["--truncation error", "--on_bad_rows error"])
def test_d16_or_is_refused(options: str):
    rows = pairs(5)
    rows[2]["prompt"] = "user " * 90
    refuse_data(rows, 3, "prompt too long", "rows:2", options=f"--cutoff_len 64 {options}")


def test_d17_a_row_whose_answer_is_cut_away_is_excluded_with_a_count():
    """A chat that ends in a question long after its answer: nothing of it is left to train."""
    put([{"instruction": row["prompt"], "output": row["chosen"]} for row in pairs(5)]
        + [{"instruction": "user " * 90, "output": "x"}])  # fmt: skip
    succeed(f"train --stage sft --model_name_or_path {MODEL} --output_dir out --dataset rows.jsonl --cutoff_len 64")
    assert report()["kept"] == 5
    assert all(row["loss"] > 0 for row in read_lines("out/metrics.jsonl") if "loss" in row)


def test_d18_no_rows_or_none_left_shows_the_arithmetic():
    refuse_data("", 3, "0 of 0 rows usable")
    rows = [{**pairs(1)[0], "chosen": ""}] * 7 + [{"prompt": "q", "chosen": "x", "rejected": "x"}] * 5
    refuse_data(rows, 3, "0 of 12 rows usable: 7 empty chosen, 5 equal pair")
    rows = [{**row, "prompt": "user " * 90} for row in pairs(4)]
    refuse_data(rows, 3, "0 of 4 rows usable: 4 prompt too long", options="--cutoff_len 64")


def test_d19_a_file_a_folder_and_a_pattern_that_are_not_there(here: Path):
    put(pairs(3), "train.jsonl")
    refuse(f"{TRAIN} --dataset trian.jsonl", 3, str(here / "trian.jsonl"), "did you mean", "train.jsonl")
    refuse(f"{TRAIN} --dataset ./sets/mine", 3, str(here / "sets/mine"))
    refuse(f"{TRAIN} --dataset part-*.jsonl", 3, "no file matches", "part-*.jsonl")
    register({"mine": {"file_name": "gone.json"}})
    refuse(f"{TRAIN} --dataset mine", 3, "dataset 'mine'", str(here / "data/gone.json"), "dataset_info.json:1")


def test_d20_an_unknown_name_and_a_bad_registry():
    register({"my_pairs": {"file_name": "rows.json"}})
    refuse(f"{TRAIN} --dataset my_pair", 2, "'my_pair' is not registered", "did you mean 'my_pairs'?", "dpo_en_demo",
           "dataset_info.json:1")  # fmt: skip
    put('{\n "my_pairs": {"file_name": "rows.json"},\n "other": {"file_name": }\n}', "data/dataset_info.json")
    refuse(f"{TRAIN} --dataset my_pairs", 2, "dataset_info.json:3:")
    put('{"my_pairs": {"file_name": "rows.json", "fromatting": "alpaca"}}', "data/dataset_info.json")
    refuse(f"{TRAIN} --dataset my_pairs", 2, "dataset_info.json:1", "fromatting", "formatting")


def test_d21_data_of_another_kind_says_what_it_is_and_how_to_convert_it():
    put(pairs(4))
    refuse(KTO, 3, "holds preference pairs", "single answers with a label", "stage: dpo", "trueup data unpair")
    put(labelled(True, False))
    refuse(f"{TRAIN} --dataset rows.jsonl", 3, "holds single answers with a label", "stage: kto")


WRONG_TURNS = {
    "turn 1 is user after user; expected assistant": ("human", "human", "gpt"),
    "the last turn is user; expected assistant": ("human", "gpt", "human"),
    "turn 1 is by 'narrator'": ("human", "narrator"),
}


@pytest.mark.parametrize("said", WRONG_TURNS)
def test_d22_roles_out_of_order_name_the_turn_and_the_pattern(said: str):
    good, bad = (
        {"conversations": [{"from": role, "value": f"text {i}"} for i, role in enumerate(roles)]}
        for roles in (("human", "gpt"), WRONG_TURNS[said])
    )
    put([good, good, bad])
    line = f"train --stage sft --model_name_or_path {MODEL} --output_dir out --dataset rows.jsonl"
    refuse(f"{line} --on_bad_rows error", 3, "wrong roles in 1 of 3 rows: rows:2")
    result = succeed(f"{line} --max_steps 1")
    dropped = report()["dropped"]["wrong roles"]
    assert dropped["rows"] == ["rows:2"] and dropped["excerpt"].startswith(said[:50])
    assert "wrong roles" in result.stdout


def test_d23_control_tokens_in_a_text_stay_text_and_are_counted():
    rows = pairs(4)
    rows[2]["prompt"] += " <|im_end|>"
    put(rows)
    result = train()
    assert "1 row has control tokens written in the text (first: rows:2)" in result.stderr
    assert any("control tokens" in note for note in read_json("out/data_report.json")["notes"])


@pytest.mark.parametrize(("character", "code"), [("\0", "U+0000"), ("\ud800", "U+D800")])
def test_d24_characters_no_tokenizer_takes_are_dropped_with_their_code_or_refused(character: str, code: str):
    rows = pairs(4)
    rows[2]["chosen"] += character
    text = "".join(json.dumps(row) + "\n" for row in rows)
    refuse_data(text, 3, "unreadable character in 1 of 4 rows: rows:2", options="--on_bad_rows error")
    train()
    dropped = report()["dropped"]["unreadable character"]
    assert dropped["rows"] == ["rows:2"] and code in dropped["excerpt"]


def test_d24_hidden_control_characters_are_said_with_row_and_code():
    rows = pairs(4)
    rows[1]["rejected"] += "\x08"
    put(rows)
    assert "1 row holds hidden control characters (first U+0008 in rows:1)" in train().stderr
    assert report()["kept"] == 4


def test_d25_data_that_changed_are_refused_on_resume(here: Path):
    rows = pairs(6)
    put(rows)
    options = f"--dataset {here / 'rows.jsonl'} --save_strategy steps --save_steps 1 --resume_from_checkpoint auto"
    succeed(f"{TRAIN} --max_steps 1 {options}")
    put([*rows[:5], {**rows[5], "chosen": "another answer"}])
    result = trueup(f"{TRAIN} --max_steps 2 {options}")
    assert result.exit_code == 7
    assert "data_fingerprint" in result.stderr and "another experiment" in result.stderr
    put(rows)
    succeed(f"{TRAIN} --max_steps 2 {options}")


def test_faults_of_several_datasets_are_reported_together():
    put('{"prompt": \n' + as_lines(pairs(1)), "a.jsonl")
    put([{"prompt": "q", "good": "a", "bad": "b"}], "b.jsonl")
    refuse(f"{TRAIN} --dataset a.jsonl,b.jsonl", 3, "a.jsonl:1:", "chosen: good")
    refuse(f"{TRAIN} --dataset a.jsonl,nowhere.jsonl,no_such_name", 2, "nowhere.jsonl", "no_such_name")


# --- config --------------------------------------------------------------------------------------


def config(text: str) -> str:
    start = f"model_name_or_path: {MODEL}\ndataset: dpo_en_demo\nstage: dpo\noutput_dir: out\n"
    Path("dpo.yaml").write_text(start + text, encoding="utf-8")
    return "train dpo.yaml"


def test_c1_an_unknown_key():
    refuse(config("leraning_rate: 1e-5\n"), 2, "dpo.yaml:5: unknown key 'leraning_rate'; did you mean 'learning_rate'?")
    refuse(f"{TRAIN} --dataset dpo_en_demo --leraning_rate 1e-5", 2, "--leraning_rate", "did you mean 'learning_rate'?")


@pytest.mark.parametrize("text", ["learning_rate: 5e-7", 'learning_rate: "5e-7"', "lr: 5e-7"])
def test_c2_numbers_that_yaml_reads_as_text_are_numbers(text: str):
    succeed(config(f"{text}\nmax_steps: '1'\n"))
    assert read_yaml("out/run.yaml")["learning_rate"] == 5e-7


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("learning_rate: no", "a number"),
        ("lora_rank: 2.5", "a whole number"),
        ("bf16: maybe", "true or false"),
        ("pref_loss: sigmoyd", "one of sigmoid"),
    ],
)
def test_c2_anything_else_names_key_value_and_what_was_expected(text: str, said: str):
    refuse(config(f"{text}\n"), 2, "dpo.yaml:5", said, text.split()[1])


BOMB = "k0: &k0 [x]\n" + "\n".join(f"k{n}: &k{n} [{', '.join([f'*k{n - 1}'] * 9)}]" for n in range(1, 30))


@pytest.mark.parametrize(
    ("text", "said"),
    [("seed: 1\nseed: 2\n", "dpo.yaml:6"), ("seed: 1\n\tdataset: d\n", "tab"), (BOMB, "aliases"),
     ("seed: !!python/object/apply:os.getcwd []\n", "tag")],
    ids=["duplicate key", "tab", "anchor bomb", "python tag"],
)  # fmt: skip
def test_c3_yaml_that_cannot_be_meant(text: str, said: str):
    refuse(config(text), 2, "dpo.yaml:", said)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--bf16 --fp16", ["`bf16`", "`fp16`", "drop one"]),
        ("--load_in_4bit True --finetuning_type full", ["`quantization_bit`", "finetuning_type", "drop"]),
        ("--resume_from_checkpoint auto --new_run", ["`resume_from_checkpoint`", "`new_run`", "drop one"]),
        ("--eval_dataset dpo_zh_demo --val_size 0.1", ["`eval_dataset`", "`val_size`", "drop one"]),
    ],
)
def test_c4_options_that_exclude_each_other(options: str, said: list[str]):
    refuse(f"{TRAIN} --dataset dpo_en_demo {options}", 2, *said)


def test_c4_max_steps_wins_over_epochs_and_says_so():
    put(pairs(6))
    result = train("--num_train_epochs 3")
    assert "`max_steps: 1` wins over `num_train_epochs`" in result.stderr
    assert read_json("out/status.json")["step"] == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--dataset dpo_en_demo --pref_beta 0", ["pref_beta", "greater than 0"]),
        ("--dataset dpo_en_demo --dpo_label_smoothing 0.5", ["dpo_label_smoothing", "less than 0.5"]),
        ("--dataset dpo_en_demo --lora_rank 0", ["lora_rank"]),
        ("--dataset dpo_en_demo --learning_rate -1e-5", ["learning_rate"]),
        ("", ["`dataset` is missing"]),
    ],
)
def test_c5_missing_or_out_of_range(options: str, said: list[str]):
    refuse(f"{TRAIN} {options}", 2, *said)


def test_c5_no_model():
    refuse("train --stage dpo --dataset dpo_en_demo --output_dir out", 2, "`model_name_or_path` is missing")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--simpo_gamma 0.5", "`simpo_gamma` has no effect with `pref_loss: sigmoid`"),
        ("--kto_chosen_weight 2.0", "`kto_chosen_weight` has no effect with `stage: dpo`"),
        ("--lora_rank 4 --finetuning_type full", "`lora_rank` has no effect with `finetuning_type: full`"),
        ("--freeze_trainable_layers 1", "`freeze_trainable_layers` has no effect with `finetuning_type: lora`"),
    ],
)
def test_c6_an_option_without_effect(options: str, said: str):
    refuse(f"{TRAIN} --dataset dpo_en_demo {options}", 2, said)


def test_two_and_more_problems_are_reported_together():
    line = config("leraning_rate: 1e-5\nlora_rank: eight\npref_beta: -1\nbf16: true\nfp16: true\nsimpo_gamma: 1.0\n")
    error = refuse(line, 2, "dpo.yaml:5", "dpo.yaml:6", "dpo.yaml:7", "`fp16`", "simpo_gamma")
    assert "error: 5 problems" in error


# --- template, tokenizer, adapter ----------------------------------------------------------------


def test_c8_without_a_template_the_default_is_used_and_said_once():
    put(pairs(4))
    result = succeed(
        "train --stage dpo --model_name_or_path ./Qwen2.5-7B --dataset rows.jsonl --output_dir out --max_steps 1"
    )
    assert result.stderr.count("template `default` is used") == 1


def test_a_template_that_is_none_names_those_that_are():
    refuse(f"{TRAIN} --dataset dpo_en_demo --template qwenn", 2, "qwenn", "qwen3", "chatml")


def model_with(directory: str, change: Callable) -> str:
    """A copy of the model whose tokenizer was changed."""
    save_model(Path(directory), "qwen2", "qwen", True)
    tokenizer = make_tokenizer("qwen")
    tokenizer.chat_template = CHATML
    change(tokenizer)
    tokenizer.save_pretrained(directory)
    return directory


def test_c9_no_padding_token_or_one_that_is_eos_changes_nothing():
    put(pairs(12))
    changes = {
        "own": lambda t: None,
        "none": lambda t: setattr(t, "pad_token", None),
        "eos": lambda t: setattr(t, "pad_token", t.eos_token),
    }
    losses = {}
    for name, change in changes.items():
        model = model_with(f"model-{name}", change)
        for stage, dataset in (("dpo", "rows.jsonl"), ("sft", "alpaca_en_demo")):
            out = f"out-{name}-{stage}"
            succeed(f"train --stage {stage} --model_name_or_path {model} --dataset {dataset} --output_dir {out} "
                    "--max_steps 3 --logging_steps 1 --learning_rate 1e-3")  # fmt: skip
            losses[name, stage] = [(row["loss"], row["num_tokens"]) for row in read_lines(f"{out}/metrics.jsonl")]
    for stage in ("dpo", "sft"):
        assert losses["own", stage] == losses["none", stage] == losses["eos", stage]


def test_c10_a_tokenizer_larger_than_the_embeddings():
    model = model_with("larger", lambda t: t.add_tokens([AddedToken(f"<new{i}>") for i in range(300)]))
    for verb in ("train", "check"):
        refuse(f"{verb} --stage dpo --model_name_or_path {model} --dataset dpo_en_demo --output_dir out", 6,
               "the tokenizer has", "embeddings only", "resize")  # fmt: skip
    refuse(f"{TRAIN} --dataset dpo_en_demo --add_tokens <a>,<b>", 6, "the tokenizer has", "add_tokens")


@pytest.fixture
def adapter() -> Path:
    """A LoRA adapter of MODEL, as a run saves it."""
    succeed(f"train --stage sft --model_name_or_path {MODEL} --dataset alpaca_en_demo --max_steps 1 --output_dir sft")
    return Path("sft")


def test_c11_an_adapter_of_another_base_lists_its_tensors(adapter: Path):
    save_model(Path("wider"), "qwen2", "qwen", True, hidden_size=64)
    line = "--stage dpo --model_name_or_path ./wider --adapter_name_or_path sft --dataset dpo_en_demo --output_dir out"
    refuse(
        f"train {line}",
        6,
        "does not fit this base model",
        "q_proj",
        "the adapter has",
        "the model wants",
        "more tensors",
    )
    refuse("chat --model_name_or_path ./wider --adapter_name_or_path sft", 6, "does not fit this base model")


def test_c11_an_adapter_of_another_architecture(adapter: Path):
    save_model(Path("deeper"), "qwen2", "qwen", True, num_hidden_layers=1)
    refuse("train --stage dpo --model_name_or_path ./deeper --adapter_name_or_path sft --dataset dpo_en_demo "
           "--output_dir out", 6, "no such module in the model", "layers.1")  # fmt: skip


def test_c11_tensors_missing_from_an_adapter_are_an_error(adapter: Path):
    weights = load_file(adapter / "adapter_model.safetensors")
    gone = next(name for name in weights if "layers.1" in name and "v_proj.lora_B" in name)
    save_file({name: tensor for name, tensor in weights.items() if name != gone}, adapter / "adapter_model.safetensors")
    refuse(f"{TRAIN} --adapter_name_or_path sft --dataset dpo_en_demo", 6, f"{gone}: missing from the adapter")


def test_paths_that_hold_no_model_or_adapter(adapter: Path, here: Path):
    put(pairs(3))
    line = f"{TRAIN} --dataset rows.jsonl --adapter_name_or_path"
    refuse(f"{line} ./nowhere/checkpoint-9", 6, f"adapter_name_or_path: no such directory: {here}/nowhere/checkpoint-9")
    refuse(f"{line} Qwen", 6, "adapter_name_or_path: Qwen holds no adapter", "adapter_config.json")
    refuse(f"{line} ./Qwen3-4B-Base", 6, "this is a whole model: give it as model_name_or_path")
    line = "train --stage dpo --output_dir out --dataset rows.jsonl --model_name_or_path"
    refuse(f"{line} ./nowhere", 6, f"model_name_or_path: no such directory: {here}/nowhere", "Qwen3-4B-Base")
    refuse(f"{line} ./Qwen", 6, f"cannot load the model in {here}/Qwen", "config.json")
    refuse(f"{line} builtin:nothing", 6, "builtin:nothing", "builtin:sql-tiny")


def test_targets_that_are_no_modules_are_refused_and_none_is_passed_over():
    line = f"--stage dpo --model_name_or_path {MODEL} --dataset dpo_en_demo --output_dir out"
    for verb in ("train", "check"):
        refuse(f"{verb} {line} --lora_target q_proj,query", 6, "lora_target: no module of the model is called 'query'",
               "gate_proj, k_proj")  # fmt: skip
    refuse(f"train {line} --lora_target '.*(q_proj'", 6, "lora_target", "is no regular expression")
    refuse(f"train {line} --lora_target 'layers[.]q_proj'", 6, "no module of the model matches")
    refuse(f"train {line} --additional_target embeddings", 6, "additional_target", "'embeddings'", "embed_tokens")
    succeed(f"train {line} --lora_target '.*layers[.]1[.].*_proj' --additional_target embed_tokens --max_steps 1")


def test_c14_a_reference_that_is_not_there_or_reads_other_tokens(here: Path):
    put(pairs(3))
    line = f"{TRAIN} --dataset rows.jsonl --ref_model"
    refuse(f"{line} ./nowhere", 6, f"ref_model: no such directory: {here}/nowhere")
    refuse(f"{line} ./Qwen3-4B-Base --ref_model_adapters ./nowhere", 6, "ref_model_adapters: no such directory")
    save_model(Path("fewer"), "qwen2", "qwen", True, vocab_size=100)
    refuse(f"{line} ./fewer", 6, "ref_model: ./fewer has embeddings for 100 tokens")


def test_an_evaluation_of_preferences_without_a_reference():
    put(pairs(3))
    refuse(f"{TRAIN} --do_train false --do_eval --eval_dataset rows.jsonl", 2, "ref_model", "none is named")


# --- arithmetic and the output directory ---------------------------------------------------------


def test_c13_a_batch_larger_than_the_data_shows_the_arithmetic():
    put(pairs(7))
    options = "--dataset rows.jsonl --per_device_train_batch_size 16 --dataloader_drop_last"
    for verb in (TRAIN, TRAIN.replace("train", "check", 1)):
        refuse(f"{verb} {options}", 2, "7 rows, 16 rows a step", "→ 0 steps with dataloader_drop_last")


def test_c13_a_share_that_leaves_nothing_to_train_on_or_nothing_to_evaluate():
    put(pairs(7))
    refuse(f"{TRAIN} --dataset rows.jsonl --val_size 7", 2, "holding out 7 of 7 usable rows leaves none to train on")
    put(pairs(1))
    refuse(f"{TRAIN} --dataset rows.jsonl --do_train --do_eval", 2, "holding out 1 of 1 usable rows")
    put(pairs(7))
    put([{**row, "prompt": "user " * 90} for row in pairs(3)], "held.jsonl")
    refuse(f"{TRAIN} --dataset rows.jsonl --eval_dataset held.jsonl --cutoff_len 64", 3, "0 of 3 rows usable")


def test_c13_a_held_out_row_that_turns_out_too_long_leaves_no_evaluation():
    rows = pairs(6)
    for row in rows[:5]:
        row["prompt"] = "user " * 90
    put(rows)
    line = f"{TRAIN} --dataset rows.jsonl --cutoff_len 64"
    for held_out in (1, 5):
        refuse(f"{line} --val_size {held_out} --eval_strategy epoch", 2, "rows")


def run_in_out() -> None:
    """A finished run in `out`, as another process left it."""
    train("--run_name first")
    write_json("out/status.json", {**read_json("out/status.json"), "pid": 1})


def test_c15_a_directory_with_a_run_is_refused_and_the_run_named():
    put(pairs(6))
    run_in_out()
    refuse(f"{TRAIN} --dataset rows.jsonl", 2, "output_dir: out contains", "step 1",
           "resume_from_checkpoint: auto", "new_run", "overwrite_output_dir")  # fmt: skip


def test_c15_a_directory_with_other_files_is_refused():
    put(pairs(6))
    Path("out").mkdir()
    Path("out/thesis.docx").write_text("mine")
    refuse(f"{TRAIN} --dataset rows.jsonl", 2, "output_dir: out contains", "thesis.docx", "an empty or new directory")
    Path("file").write_text("mine")
    refuse(f"{TRAIN} --dataset rows.jsonl --output_dir file", 2, "file is a file")
    refuse(f"check{TRAIN.removeprefix('train')} --dataset rows.jsonl", 2, "output_dir: out contains", "thesis.docx")


def test_c15_the_three_ways_out():
    put(pairs(6))
    run_in_out()
    first = Path("out/adapter_model.safetensors").read_bytes()
    succeed(f"{TRAIN} --dataset rows.jsonl --max_steps 3 --run_name first --resume")
    assert read_json("out/status.json")["step"] == 3
    resumed = Path("out/adapter_model.safetensors").read_bytes()
    assert resumed != first

    train("--new-run")
    assert Path("out-2/adapter_model.safetensors").is_file()
    assert Path("out/adapter_model.safetensors").read_bytes() == resumed

    train("--overwrite")
    aside = [path for path in Path().iterdir() if path.name.startswith("out") and path.name not in ("out", "out-2")]
    assert len(aside) == 1
    assert (aside[0] / "adapter_model.safetensors").read_bytes() == resumed
    assert Path("out/adapter_model.safetensors").read_bytes() == first
    shutil.rmtree(aside[0])
