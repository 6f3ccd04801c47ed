"""Bad data: what, where, what was expected and the way out, with the promised exit code."""

from __future__ import annotations

import json
import logging

import pytest

from trueup.data.load import load_examples
from trueup.errors import ConfigError, DataError, UserError

GOOD = {"prompt": "Why?", "chosen": "Because of this.", "rejected": "No idea."}


def pairs(count: int, **changes) -> list[dict]:
    return [{"prompt": f"q{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(count)]


def jsonl(rows) -> str:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"


def load(tmp_path, content, name="train.jsonl", kind="pair", **options):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content, encoding="utf-8")
    return load_examples([str(path)], kind=kind, dataset_dir=tmp_path, **options)


def refuse(tmp_path, content, *, exit_code=3, **options) -> str:
    with pytest.raises(UserError) as caught:
        load(tmp_path, content, **options)
    assert caught.value.exit_code == exit_code
    return str(caught.value)


def test_d1_a_malformed_line_is_shown_with_a_caret(tmp_path):
    text = jsonl(pairs(3)) + '{"prompt": "q", "chosen": "never ends}\n' + jsonl(pairs(1))
    message = refuse(tmp_path, text)
    assert "train.jsonl:4:27: unterminated string" in message
    line, caret = message.splitlines()[1:3]
    assert line[caret.index("^") :].startswith('"never ends')


def test_d1_the_first_ten_are_listed_and_all_are_counted(tmp_path):
    message = refuse(tmp_path, jsonl(pairs(1)) + '{"prompt": }\n' * 25)
    assert message.count("expecting value") == 10
    assert "25 of 26 lines cannot be read" in message


def test_d1_a_caret_stands_under_wide_characters(tmp_path):
    message = refuse(tmp_path, jsonl(pairs(1)) + '{"prompt": "为什么？" "chosen": 1}\n')
    line, caret = message.splitlines()[1:3]
    assert caret.index("^") == line.index(' "chosen') + 1 + 4  # four characters of two cells


def test_d2_an_array_cut_off_names_the_element_and_the_byte(tmp_path):
    text = json.dumps(pairs(9))[:-30]
    message = refuse(tmp_path, text, name="train.json")
    assert f"file ends inside element 8 (byte {len(text)}); truncated download?" in message


@pytest.mark.parametrize("cut", ["[", '[{"prompt": "a"}', '[{"prompt": tr', '[{"prompt": "a"},'])
def test_d2_wherever_the_cut_is(tmp_path, cut):
    assert "file ends inside element" in refuse(tmp_path, cut, name="train.json")


def test_d3_blank_lines_bom_and_crlf_are_accepted_and_noted(tmp_path, caplog):
    text = "\ufeff" + jsonl(pairs(2)).replace("\n", "\r\n") + "\r\n\r\n" + jsonl(pairs(1))
    with caplog.at_level(logging.INFO, "trueup"):
        data = load(tmp_path, text.encode("utf-8"))
    assert len(data.train) == 3
    assert [e.row for e in data.train] == ["train:0", "train:1", "train:2"]
    notes = " ".join(data.report.notes)
    assert "byte order mark" in notes and "CRLF" in notes and "2 blank lines" in notes


@pytest.mark.parametrize(("encoding", "guess"), [("gb18030", "GB18030"), ("utf-16", "UTF-16")])
def test_d4_another_encoding_is_guessed_and_the_conversion_shown(tmp_path, encoding, guess):
    rows = [
        {
            "prompt": "请介绍一下长江的长度和流经的省份。",
            "chosen": "长江全长约六千三百公里。",
            "rejected": "不知道。",
        }
    ] * 20
    message = refuse(tmp_path, jsonl(rows).encode(encoding))
    assert "not UTF-8" in message and "offset" in message
    assert f'iconv -f {guess} -t UTF-8 "' in message and "train.utf8.jsonl" in message


def test_d5_a_renamed_column_gets_the_mapping_to_write(tmp_path):
    rows = [{"prompt": f"q{i}", "good": "a", "bad": "b"} for i in range(3)]
    message = refuse(tmp_path, jsonl(rows))
    assert "no column `chosen` and `rejected`; found: prompt, good, bad" in message
    assert "did you mean `columns: {chosen: good, rejected: bad}`?" in message
    assert 'dataset_info.json: "train": {"file_name": "' in message  # it is in no registry yet


def test_d5_a_registered_dataset_gets_the_place_of_its_entry(tmp_path):
    (tmp_path / "rows.json").write_text('[{"question": "q", "x": "a", "y": "b"}]', encoding="utf-8")
    (tmp_path / "dataset_info.json").write_text('{"mine": {"file_name": "rows.json"}}', encoding="utf-8")
    with pytest.raises(DataError) as caught:
        load_examples(["mine"], kind="pair", dataset_dir=tmp_path)
    assert "into its entry, " in str(caught.value) and "dataset_info.json:1" in str(caught.value)


def test_d5_one_row_without_the_key_is_named(tmp_path):
    rows = pairs(5)
    del rows[3]["chosen"]
    message = refuse(tmp_path, jsonl(rows))
    assert "train.jsonl:4" in message and "`chosen`" in message and "row 3" in message


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (5, "a number"),
        (None, "null"),
        (float("nan"), "NaN"),
        (True, "true/false"),
        ([1, 2], "a list of numbers"),
    ],
)
def test_d6_a_wrong_type_is_refused_with_rows_and_both_types(tmp_path, value, found):
    rows = pairs(6)
    rows[2]["chosen"] = rows[4]["chosen"] = value
    message = refuse(tmp_path, jsonl(rows))
    assert (
        found in message
        and "2, 4" in message
        and "expected: text" in message.replace("a list of turns (objects)", "text")
    )
    assert "2 of 6 rows" in message


def test_d6_null_in_an_optional_column_is_absence(tmp_path):
    data = load(tmp_path, jsonl([{**GOOD, "system": None, "input": None}]))
    assert [m.content for m in data.train[0].prompt] == ["Why?"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"chosen": ""}, "empty chosen"),
        ({"rejected": " \n"}, "empty rejected"),
        ({"prompt": ""}, "empty prompt"),
        ({"rejected": " Because of this. "}, "equal pair"),
        ({"chosen": "a\0b"}, "unreadable character"),
        ({"chosen": "\ud800"}, "unreadable character"),
    ],
)
def test_d7_d8_rows_that_teach_nothing_are_dropped_counted_and_shown(tmp_path, change, reason):
    text = "\n".join(json.dumps(row) for row in [GOOD, GOOD | change, *pairs(2)])
    data = load(tmp_path, text)
    [dataset] = data.report.datasets.values()
    assert len(data.train) == dataset.kept == 3 and dataset.read == 4
    assert dataset.dropped[reason].ids == ["train:1"]
    assert reason in data.report.render()
    message = refuse(tmp_path, text, on_bad_rows="error")
    assert f"{reason} in 1 of 4 rows: train:1" in message


def test_d9_reversed_pairs_are_counted_with_both_rows(tmp_path, caplog):
    mirror = GOOD | {"chosen": GOOD["rejected"], "rejected": GOOD["chosen"]}
    data = load(tmp_path, jsonl([GOOD, *pairs(2), mirror]))
    assert data.report.reversed_pairs.ids == ["train:3"]
    assert "train:0" in data.report.reversed_pairs.excerpt
    assert "contradict" in caplog.text


def test_d10_duplicate_rows_are_counted_and_kept(tmp_path, caplog):
    data = load(tmp_path, jsonl([GOOD, *pairs(2), GOOD]))
    assert len(data.train) == 4 and data.report.duplicates.ids == ["train:3"]
    assert "duplicate" in caplog.text


def test_d10_an_id_that_stands_twice_is_counted_with_both_rows(tmp_path, caplog):
    rows = [row | {"id": own} for row, own in zip(pairs(5), ("a", "b", "a", None, None), strict=True)]
    data = load(tmp_path, jsonl(rows))
    assert len(data.train) == 5 and not data.report.duplicates.count
    assert data.report.repeated_ids.ids == ["train:2"] and data.report.repeated_ids.excerpt == "a, as train:0"
    assert "1 row has the id of an earlier row: train:2" in caplog.text
    assert "row has the id of an earlier row" in data.report.render()


@pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
def test_d10_a_key_given_twice_is_an_error(tmp_path, name):
    line = '{"prompt": "q", "chosen": "a", "chosen": "b", "rejected": "c"}'
    text = f"[\n{line}\n]" if name == "train.json" else jsonl(pairs(1)) + line
    message = refuse(tmp_path, text, name=name)
    assert 'key "chosen" is given twice' in message and f"{name}:2:32" in message


def test_d11_overlap_of_training_and_evaluation_is_counted(tmp_path, caplog):
    (tmp_path / "eval.jsonl").write_text(jsonl([GOOD, *pairs(1)]), encoding="utf-8")
    data = load(tmp_path, jsonl(pairs(3)), eval_dataset=[str(tmp_path / "eval.jsonl")])
    assert data.report.overlap.ids == ["eval:1"]
    assert "also trained on" in caplog.text


RANKED = {"prompt": "q", "responses": ["a", "b", "c"]}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({**RANKED, "scores": [1, 2]}, "2 numbers for 3 answers"),
        ({**RANKED, "scores": [1, float("nan"), 2]}, "a list with nan"),
        ({**RANKED, "scores": [1, "2", 3]}, "a list with text"),
        ({**RANKED, "rank": [1, 1, 2]}, "ranks [1, 1, 2]"),
        ({**RANKED, "rank": [1, 2, 4]}, "a permutation"),
    ],
)
def test_d12_scores_and_ranks_that_do_not_fit_are_refused(tmp_path, row, words):
    assert words in refuse(tmp_path, jsonl([{**RANKED, **{k: [1, 2, 3] for k in row if k in ("scores", "rank")}}, row]))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "q", "responses": ["a"], "scores": [1]}, "fewer than two answers"),
        ({**RANKED, "scores": [2, 2, 2]}, "all answers tie"),
    ],
)
def test_d12_rankings_that_rank_nothing_are_dropped(tmp_path, row, reason):
    data = load(tmp_path, jsonl([{**RANKED, "scores": [1, 2, 3]}, row]))
    assert data.report.datasets["train"].dropped[reason].ids == ["train:1"]


@pytest.mark.parametrize(
    ("label", "desirable"),
    [(True, True), (1, True), (0, False), ("true", True), ("No", False), (" YES ", True)],
)
def test_d13_labels_map_without_loss(tmp_path, label, desirable):
    data = load(tmp_path, jsonl([{"prompt": "q", "completion": "a", "label": label}]), kind="feedback")
    assert data.train[0].desirable is desirable


@pytest.mark.parametrize("label", [2, -1, "maybe", "", None, 0.5, [True]])
def test_d13_any_other_label_is_refused_with_its_row(tmp_path, label):
    rows = [{"prompt": "q", "completion": "a", "label": v} for v in (True, label)]
    message = refuse(tmp_path, jsonl(rows), kind="feedback")
    assert "`label`" in message and "train.jsonl:2" in message and "(row 1)" in message


def test_d18_nothing_usable_shows_the_arithmetic(tmp_path):
    rows = [GOOD | {"chosen": ""}] * 1150 + [GOOD | {"chosen": "x", "rejected": "x"}] * 50
    message = refuse(tmp_path, jsonl(rows))
    assert "0 of 1 200 rows usable: 1 150 empty chosen, 50 equal pair" in message


@pytest.mark.parametrize("name", ["train.json", "train.jsonl", "train.csv", "train.txt"])
def test_d18_an_empty_file(tmp_path, name):
    assert "0 of 0 rows usable" in refuse(tmp_path, "", name=name, kind="chat")


def test_d19_a_missing_file_names_what_is_there(tmp_path):
    (tmp_path / "train.jsonl").write_text(jsonl([GOOD]), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        load_examples([str(tmp_path / "trian.jsonl")], kind="pair")
    assert str(tmp_path / "trian.jsonl") in str(caught.value)
    assert f"did you mean {tmp_path / 'train.jsonl'}?" in str(caught.value)


def test_d19_a_pattern_without_a_match(tmp_path):
    with pytest.raises(DataError, match="no file matches .*part"):
        load_examples([str(tmp_path / "part-*.jsonl")], kind="pair")


def test_d19_a_registered_file_that_is_gone(tmp_path):
    (tmp_path / "dataset_info.json").write_text('{"mine": {"file_name": "a.json"}}', encoding="utf-8")
    with pytest.raises(DataError, match="dataset 'mine'.*no such file or folder") as caught:
        load_examples(["mine"], kind="pair", dataset_dir=tmp_path)
    assert "dataset_info.json:1" in str(caught.value)


def test_d20_an_unknown_name_lists_the_known_ones(tmp_path):
    (tmp_path / "dataset_info.json").write_text('{\n "my_pairs": {"file_name": "a.json"}}', encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_examples(["my_pair"], kind="pair", dataset_dir=tmp_path)
    message = str(caught.value)
    assert "dataset 'my_pair' is not registered" in message and "did you mean 'my_pairs'?" in message
    assert "dataset_info.json:2" in message and "dpo_en_demo" in message


def test_d20_our_own_samples_are_not_where_a_typo_is_mended(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'dpo_en_demo'") as caught:
        load_examples(["dpo_en_dem"], kind="pair", dataset_dir=tmp_path)
    assert "builtin" not in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "kind", "words"),
    [
        (pairs(2), "feedback", "make two labelled answers of each pair: `trueup data unpair`"),
        (pairs(2), "chat", "stage: dpo"),
        ([{"text": "a document"}], "chat", "stage: pt"),
        ([{"instruction": "a", "output": "b"}], "pair", "stage: sft"),
        ([{"instruction": "a", "output": "b"}], "text", 'columns: {"text"'),
        ([{"prompt": "a", "completion": "b", "label": True}], "pair", "stage: kto"),
    ],
)
def test_d21_data_of_another_kind_says_where_it_fits(tmp_path, rows, kind, words):
    # A labelled answer is an answer, too: only its label makes it feedback.
    assert words in refuse(tmp_path, jsonl(rows), kind=kind)


def turns(*roles) -> list[dict]:
    return [{"from": role, "value": f"text {i}"} for i, role in enumerate(roles)]


@pytest.mark.parametrize(
    ("roles", "detail"),
    [
        (("human", "human", "gpt"), "turn 1 is user after user; expected assistant"),
        (("human", "gpt", "human"), "the last turn is user; expected assistant"),
        (("gpt", "human", "gpt"), "turn 0 is assistant at the start; expected system or user"),
        (("human", "gpt", "gpt"), "turn 2 is assistant after assistant; expected user or tool"),
        (("human", "system", "gpt"), "turn 1 is system after user"),
        (("human", "narrator"), "turn 1 is by 'narrator'"),
        (("system",), "the last turn is system"),
    ],
)
def test_d22_wrong_roles_name_the_turn_and_the_pattern(tmp_path, roles, detail):
    rows = [{"conversations": turns("human", "gpt")}, {"conversations": turns(*roles)}]
    data = load(tmp_path, jsonl(rows), kind="chat")
    dropped = data.report.datasets["train"].dropped["wrong roles"]
    assert dropped.ids == ["train:1"] and dropped.excerpt.startswith(detail[:50])


def test_faults_of_several_datasets_are_reported_together(tmp_path):
    (tmp_path / "a.jsonl").write_text("{broken\n" + jsonl([GOOD]), encoding="utf-8")
    (tmp_path / "b.csv").write_text("prompt,chosen,rejected\na,b\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        load_examples([str(tmp_path / "a.jsonl"), str(tmp_path / "b.csv")], kind="pair")
    assert "a.jsonl:1:2" in str(caught.value) and "b.csv:2" in str(caught.value)


def test_nothing_is_written_next_to_the_data(tmp_path):
    load(tmp_path, jsonl(pairs(3)))
    assert [p.name for p in tmp_path.iterdir()] == ["train.jsonl"]
