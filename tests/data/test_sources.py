"""Files of every type give the same rows; folders, patterns, hubs; and how datasets mix."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections import Counter
from dataclasses import replace
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trueup.config.load import load_config
from trueup.data.load import load_examples, load_examples_for
from trueup.data.mixing import mix, sample_indices
from trueup.data.registry import DatasetSpec
from trueup.data.sources import read_rows
from trueup.errors import ConfigError, DataError, ModelError

ROWS = [
    {"instruction": "Say “hello”", "output": "Hello,\nworld"},
    {"instruction": "你好吗？", "output": "很好 \u2028 谢谢"},
]


def rows_of(path, **spec):
    return read_rows(DatasetSpec("mine", "test", source=path, **spec))


def dump(row) -> str:
    return json.dumps(row, ensure_ascii=False)


TEXTS = {
    "array.json": json.dumps(ROWS, indent=2, ensure_ascii=False),
    "compact_array.json": json.dumps(ROWS),
    "lines.jsonl": "\n".join(map(dump, ROWS)),
    "lines.ndjson": "\n".join(map(dump, ROWS)) + "\n",
    "lines.json": "\n".join(map(dump, ROWS)) + "\n",
    "array.jsonl": json.dumps(ROWS),
    "objects.json": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "objects_on_a_line.json": " ".join(map(dump, ROWS)),
    "objects_with_commas.json": ",\n".join(map(dump, ROWS)),
    "table.csv": 'instruction,output\r\nSay “hello”,"Hello,\nworld"\r\n你好吗？,很好 \u2028 谢谢\r\n',
    "table.tsv": 'instruction\toutput\nSay “hello”\t"Hello,\nworld"\n\n你好吗？\t很好 \u2028 谢谢\n',
}


@pytest.mark.parametrize("name", TEXTS)
def test_every_way_of_writing_rows_gives_the_same_rows(tmp_path, name):
    (tmp_path / name).write_bytes(TEXTS[name].encode("utf-8"))
    assert list(rows_of(tmp_path / name)) == ROWS


@pytest.mark.parametrize("name", ["t.parquet", "file.arrow", "stream.arrow"])
def test_tables_give_the_same_rows(tmp_path, name):
    table, path = pa.Table.from_pylist(ROWS), tmp_path / name
    if name == "t.parquet":
        pq.write_table(table, path)
    else:
        new = pa.ipc.new_file if name == "file.arrow" else pa.ipc.new_stream
        with new(str(path), table.schema) as writer:
            writer.write_table(table)
    assert list(rows_of(path)) == ROWS


def test_what_datasets_saved_to_disk_is_read_in_order(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"text": str(i)} for i in range(30)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved", num_shards=3)
    assert list(rows_of(tmp_path / "saved")) == rows


def test_a_row_knows_its_file_and_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "0"}\n\n{"text": "1"}\n', encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('\n{"text": "2"}\n', encoding="utf-8")
    rows = rows_of(tmp_path)
    assert [row["text"] for row in rows] == ["0", "1", "2"]
    assert [rows.where(i).rpartition("/")[2] for i in range(3)] == [
        "a.jsonl:1",
        "a.jsonl:3",
        "b.jsonl:2",
    ]


def test_an_element_of_an_array_knows_its_line(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=2), encoding="utf-8")
    rows = rows_of(tmp_path / "a.json")
    assert [rows.where(i).rpartition(":")[2] for i in range(2)] == ["2", "6"]


def test_a_line_of_text_is_a_document(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n  two\r\nthree", encoding="utf-8", newline="")
    assert [row["text"] for row in rows_of(tmp_path / "a.txt")] == ["one", "  two", "three"]


def test_a_datasets_script_is_never_run(tmp_path, monkeypatch):
    """S9: a folder as old hub datasets have it, a script of its own name beside the rows."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "rows.jsonl").write_text(TEXTS["lines.jsonl"], encoding="utf-8")
    (tmp_path / "mine" / "mine.py").write_text("open('pwned', 'w').close()\n", encoding="utf-8")
    for source in (tmp_path / "mine", tmp_path / "mine" / "mine.py"):
        with contextlib.suppress(DataError):
            assert list(rows_of(source)) == ROWS
    assert not (tmp_path / "pwned").exists()


def test_a_folder_is_read_in_order_without_hidden_files_and_registry(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl", ".hidden.jsonl"):
        (tmp_path / name).write_text(dump({"text": name}), encoding="utf-8")
    (tmp_path / "dataset_info.json").write_text("{}", encoding="utf-8")
    (tmp_path / "README.md").write_text("read me", encoding="utf-8")
    assert [row["text"] for row in rows_of(tmp_path)] == ["a.jsonl", "b.jsonl", "sub/c.jsonl"]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (("a.jsonl", "b.csv"), "files of several types: .csv, .jsonl"),
        (("a.md",), "no data file"),
        ((), "no data file"),
    ],
)
def test_a_folder_of_no_or_several_types_is_refused(tmp_path, files, words):
    for name in files:
        (tmp_path / name).write_text("x", encoding="utf-8")
    with pytest.raises(DataError, match=words):
        rows_of(tmp_path)


def test_a_file_of_unknown_type_is_refused(tmp_path):
    (tmp_path / "a.xlsx").write_text("x", encoding="utf-8")
    with pytest.raises(DataError, match="cannot tell the type"):
        rows_of(tmp_path / "a.xlsx")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.jsonl", '{"a": 1}\n[1]\n"x"', "a.jsonl:2: this line holds a list"),
        ("a.json", '[{"a": 1}, 5, null]', "element 1 is a number"),
        ("a.json", '[{"a": 1},\n {"a": 2,}]', "a.json:2:10: expecting property name"),
        ("a.json", '[{"a": 1} {"a": 2}]', "expecting ',' or ']'"),
        ("a.json", '[{"a": 1}] x', "extra data"),
        ("a.json", '{"a": 1}\n{"a": 2} x\n', "extra data"),
        ("a.csv", "a,b\n1,2\n3\n4,5,6\n", "a.csv:3: 1 cells, but the header has 2"),
        ("a.csv", "a,a\n1,2\n", "column 'a' is there twice"),
        ("a.csv", 'a,b\n"1,2\n', "unexpected end of data"),
        ("a.parquet", "not parquet", "not a readable parquet file"),
        ("a.arrow", "not arrow", "not a readable arrow file"),
    ],
)
def test_broken_files_are_refused_with_their_place(tmp_path, name, text, words):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        rows_of(tmp_path / name)
    assert words in str(caught.value)


def test_deeply_nested_json_is_a_fault_and_no_crash(tmp_path):
    (tmp_path / "a.jsonl").write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(DataError, match="nested too deeply|cut|ends inside"):
        rows_of(tmp_path / "a.jsonl")


def test_a_url_is_fetched_through_fsspec(tmp_path):
    import fsspec

    with fsspec.open("memory://bucket/a.jsonl", "wb") as file:
        file.write(dump(ROWS[0]).encode("utf-8"))
    rows = read_rows(DatasetSpec("mine", "test", url="memory://bucket/a.jsonl"))
    assert list(rows) == ROWS[:1] and rows.where(0) == "memory://bucket/a.jsonl:1"


def test_the_first_rows_are_read_without_those_behind_them(tmp_path):
    (tmp_path / "a.jsonl").write_text(f"{dump(ROWS[0])}\n{dump(ROWS[1])}\n{{broken", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text("not read", encoding="utf-8")
    spec = DatasetSpec("mine", "test", source=tmp_path)
    rows = read_rows(spec, first=2)
    assert list(rows) == ROWS and rows.where(1) == f"{rows.labels[0]}:2"
    with pytest.raises(DataError, match="b.jsonl:1") as caught:  # a fault among them: all are told
        read_rows(spec, first=3)
    assert len(caught.value.problems) == 2


# ---- hubs ----


def hub_spec(hub="huggingface") -> DatasetSpec:
    return DatasetSpec("mine", "test", hub_id="owner/name", hub=hub, subset="en", split="test")


class Loaded:
    def to_list(self):
        return ROWS

    def to_hf_dataset(self):
        return self


@pytest.mark.parametrize(
    ("hub", "module", "owner", "function", "subset_key"),
    [
        ("huggingface", "datasets", None, "load_dataset", "name"),
        ("modelscope", "modelscope", "MsDataset", "load", "subset_name"),
    ],
)
def test_each_hub_is_asked_through_its_own_library(monkeypatch, hub, module, owner, function, subset_key):
    asked = {}

    def load(*args, **options):
        asked.update(options)
        return Loaded()

    fake = ModuleType(module)
    place = type(owner, (), {function: staticmethod(load)}) if owner else load
    setattr(fake, owner or function, place)
    monkeypatch.setitem(sys.modules, module, fake)
    rows = read_rows(hub_spec(hub), token="secret")
    assert list(rows) == ROWS
    assert (asked[subset_key], asked["split"], asked["token"]) == ("en", "test", "secret")


def test_a_dataset_on_modelers_is_fetched_and_read_like_local_files(monkeypatch, tmp_path):
    (tmp_path / "test.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS), encoding="utf-8")
    fake = ModuleType("openmind_hub")
    fake.snapshot_download = lambda name, **options: str(tmp_path)
    monkeypatch.setitem(sys.modules, "openmind_hub", fake)
    spec = replace(hub_spec("modelers"), subset=None)
    assert list(read_rows(spec, token="secret")) == ROWS


@pytest.mark.parametrize(("hub", "module"), [("modelscope", "modelscope"), ("modelers", "openmind_hub")])
def test_a_missing_hub_library_is_named(monkeypatch, hub, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModelError, match=r"pip install 'trueup\[hubs\]'"):
        read_rows(hub_spec(hub))


class GatedRepoError(Exception):
    pass


class DatasetNotFoundError(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (ConnectionError("no route"), ModelError, "cannot be reached"),
        (GatedRepoError("Access is restricted"), ModelError, "hf_hub_token"),
        (DatasetNotFoundError("doesn't exist"), ModelError, "not found"),
        (ValueError('Unknown split "test". Should be one of'), DataError, "set `split`"),
    ],
)
def test_c17_a_hub_that_does_not_answer_is_said_in_clear_words(monkeypatch, error, kind, words):
    def load(*args, **options):
        raise error

    fake = ModuleType("datasets")
    fake.load_dataset = load
    monkeypatch.setitem(sys.modules, "datasets", fake)
    with pytest.raises(kind) as caught:
        read_rows(hub_spec(), token="hf_secret")
    assert words in str(caught.value) and "owner/name" in str(caught.value)
    assert "hf_secret" not in str(caught.value)


def test_a_local_folder_named_like_a_hub_id_is_used(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "a.jsonl").write_text(dump(ROWS[0]), encoding="utf-8")
    assert list(read_rows(hub_spec())) == ROWS[:1]


# ---- mixing ----


def test_concat_is_one_after_another():
    assert mix([2, 1]) == [(0, 0), (0, 1), (1, 0)]


def test_interleave_under_stops_with_the_shortest():
    assert mix([4, 2], "interleave_under") == [(0, 0), (1, 0), (0, 1), (1, 1)]


def test_interleave_over_repeats_the_short_one():
    assert mix([3, 1], "interleave_over") == [(0, 0), (1, 0), (0, 1), (1, 0), (0, 2), (1, 0)]


def test_interleave_once_uses_each_row_once():
    order = mix([3, 1], "interleave_once")
    assert order == [(0, 0), (1, 0), (0, 1), (0, 2)]


@pytest.mark.parametrize("strategy", ["interleave_under", "interleave_over", "interleave_once"])
def test_mixing_by_probability_is_deterministic_and_follows_the_weights(strategy):
    sizes, probs = [900, 900], [0.75, 0.25]
    order = mix(sizes, strategy, probs, seed=7)
    assert order == mix(sizes, strategy, probs, seed=7)
    assert order != mix(sizes, strategy, probs, seed=8)
    share = Counter(d for d, _ in order[:800])[0] / 800
    assert 0.7 < share < 0.8
    if strategy == "interleave_once":
        assert len(set(order)) == len(order) == 1800
    if strategy == "interleave_over":
        assert set(order) == {(d, i) for d in range(2) for i in range(900)}


@pytest.mark.parametrize("probs", [[0.5], [0.5, 0.0], [1.0, float("nan")], [1, -1]])
def test_bad_probabilities_are_refused(probs):
    with pytest.raises(ConfigError, match="interleave_probs"):
        mix([3, 3], "interleave_under", probs)


def test_num_samples_draws_under_and_over():
    assert len(set(sample_indices(10, 4, seed=1).tolist())) == 4
    over = sample_indices(10, 25, seed=1).tolist()
    assert len(over) == 25 and set(over) == set(range(10))
    assert over == sample_indices(10, 25, seed=1).tolist()


def write(tmp_path, name, count):
    rows = [{"text": f"{name} {i}"} for i in range(count)]
    path = tmp_path / f"{name}.jsonl"
    path.write_text("\n".join(map(dump, rows)), encoding="utf-8")
    return str(path)


def test_a_dataset_listed_twice_counts_twice(tmp_path, caplog):
    path = write(tmp_path, "a", 3)
    data = load_examples([path, path], kind="text")
    assert len(data.train) == 6
    assert data.report.datasets["a"].read == 3 and not data.report.duplicates.count


def test_max_samples_takes_the_first_rows_of_each_dataset(tmp_path):
    paths = [write(tmp_path, "a", 5), write(tmp_path, "b", 2)]
    data = load_examples(paths, kind="text", max_samples=3)
    assert [e.row for e in data.train] == ["a:0", "a:1", "a:2", "b:0", "b:1"]
    assert (data.report.datasets["a"].available, data.report.datasets["a"].read) == (5, 3)


@pytest.mark.parametrize(("val_size", "count"), [(0.2, 2), (1, 1), (3, 3), (0.001, 1)])
def test_val_size_holds_out_a_share_or_a_number(tmp_path, val_size, count):
    path = write(tmp_path, "a", 10)
    data = load_examples([path, path], kind="text", val_size=val_size)
    held_out = {e.row for e in data.eval["eval"]}
    assert len(held_out) == count
    assert not held_out & {e.row for e in data.train}
    assert len(data.train) == 2 * (10 - count)


def test_evaluation_without_data_holds_out_five_percent_said_once(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "trueup"):
        data = load_examples([write(tmp_path, "a", 40)], kind="text", eval_wanted=True)
    assert len(data.eval["eval"]) == 2 and len(data.train) == 38
    assert caplog.text.count("held out") == 1


@pytest.mark.parametrize("options", [{"val_size": 10}, {"val_size": 11}])
def test_c13_holding_out_everything_is_refused_with_the_arithmetic(tmp_path, options):
    with pytest.raises(ConfigError, match="of 10 usable rows leaves none"):
        load_examples([write(tmp_path, "a", 10)], kind="text", **options)


def test_val_size_beside_eval_dataset_is_refused(tmp_path):
    path = write(tmp_path, "a", 10)
    with pytest.raises(ConfigError, match="drop one of the two"):
        load_examples([path], kind="text", eval_dataset=[path], val_size=0.1)


def test_evaluation_sets_are_one_or_each_by_name(tmp_path):
    paths = [write(tmp_path, name, 3) for name in ("a", "b", "c")]
    one = load_examples(paths[:1], kind="text", eval_dataset=paths[1:])
    assert {k: len(v) for k, v in one.eval.items()} == {"eval": 6}
    each = load_examples(paths[:1], kind="text", eval_dataset=paths[1:], eval_on_each_dataset=True)
    assert {k: len(v) for k, v in each.eval.items()} == {"eval_b": 3, "eval_c": 3}


def test_a_configuration_says_it_all(tmp_path):
    write(tmp_path, "a", 10)
    write(tmp_path, "b", 4)
    entry = {"mine": {"file_name": "a.jsonl", "type": "pretrain"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(entry), encoding="utf-8")
    cfg = load_config(
        {
            "stage": "pt",
            "model_name_or_path": "builtin:sql-tiny",
            "output_dir": str(tmp_path / "out"),
            "dataset": f"mine,{tmp_path / 'b.jsonl'}",
            "dataset_dir": str(tmp_path),
            "max_samples": 8,
            "val_size": 0.25,
            "mix_strategy": "interleave_under",
        }
    )
    data = load_examples_for(cfg)
    assert len(data.eval["eval"]) == 3
    assert [e.row.partition(":")[0] for e in data.train[:4]] == ["mine", "b", "mine", "b"]
