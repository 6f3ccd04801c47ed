"""Streams give the rows that reading at once gives, from any place, from any source; every row is accounted for."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.data.test_files import served  # noqa: F401  (a fixture)
from tests.data.test_formats import REAL
from tests.data.tiny_tokenizers import make_tokenizer
from trueup.config.load import load_config
from trueup.config.schema import RunConfig
from trueup.data.encode import Prepared, prepare
from trueup.data.load import load_examples_for
from trueup.data.registry import DatasetSpec
from trueup.data.streams import MixedStream, RowStream, Source
from trueup.errors import ConfigError, DataError

ROWS = [{"instruction": f"q {i}", "output": f"a {i}"} for i in range(30)]


def write(path: Path, rows: list[dict]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def config(tmp_path: Path, **keys) -> RunConfig:
    base = {"model_name_or_path": "builtin:sql-tiny", "stage": "sft", "output_dir": str(tmp_path / "out"),
            "dataset_dir": str(tmp_path), "template": "qwen"}  # fmt: skip
    stream = {"streaming": True, "max_steps": 5, "buffer_size": 7}
    return load_config({**base, **stream, **keys})


@pytest.fixture
def streamed(tmp_path: Path) -> Iterator:
    """Prepares streams, and closes them in the end."""
    opened: list[Prepared] = []

    def make(**keys) -> Prepared:
        opened.append(prepare(config(tmp_path, **keys), make_tokenizer("qwen")))
        return opened[-1]

    yield make
    for prepared in opened:
        if prepared.stream:
            prepared.stream.close()


def first_pass(prepared: Prepared) -> list[str]:
    """The rows of one pass through the data."""
    stream, rows = prepared.stream, []
    assert stream is not None
    while stream.state()["begins"]["place"]["pass"] == 0:
        rows += stream.dataset.rows
        stream.advance()
    return rows


def source(**spec) -> Source:
    return Source.of(DatasetSpec("mine", "test", **spec))


def all_rows(stream: RowStream) -> list[dict]:
    rows = []
    while not stream.ended:
        rows.append(stream.take()[1])
    return rows


def assert_goes_on_from_anywhere(origin: Source, rows: list[dict]) -> None:
    stream, places = RowStream(origin), []
    while not stream.ended:
        places.append(json.loads(json.dumps(stream.place)))
        assert stream.take()[:2] == (len(places) - 1, rows[len(places) - 1])
    places.append(stream.place)
    assert len(places) == len(rows) + 1
    for taken in (0, 1, len(rows) // 2, len(rows) - 1, len(rows)):
        assert all_rows(RowStream(origin, places[taken])) == rows[taken:]


def test_files_of_a_folder_are_one_stream(tmp_path: Path):
    folder = tmp_path / "parts"
    folder.mkdir()
    for number, rows in enumerate((ROWS[:10], [], ROWS[10:11], ROWS[11:])):
        write(folder / f"{number}.jsonl{'.gz' * (number % 2)}", rows)
    assert_goes_on_from_anywhere(source(source=folder), ROWS)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_a_file_behind_http_is_streamed(tmp_path: Path, served: str, name: str):  # noqa: F811
    write(tmp_path / "web" / name, ROWS)
    assert_goes_on_from_anywhere(source(url=f"{served}/{name}"), ROWS)


def test_a_file_behind_a_url_is_streamed(tmp_path: Path):
    write(tmp_path / "rows.jsonl", ROWS)
    assert_goes_on_from_anywhere(source(url=f"file://{tmp_path}/rows.jsonl"), ROWS)


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_a_hub_is_streamed_through_its_library(tmp_path: Path, monkeypatch, kind: str):
    import datasets

    folder, parts = tmp_path / "parts", [ROWS[:10], ROWS[10:]]
    folder.mkdir()
    files = []
    for number, rows in enumerate(parts):
        files.append(str(folder / f"{number}.{kind}"))
        datasets.Dataset.from_list(rows).to_parquet(files[-1]) if kind == "parquet" else write(Path(files[-1]), rows)
    asked = {}
    here = partial(datasets.load_dataset, kind, data_files=files, cache_dir=str(tmp_path / "cache"))

    def load(hub_id, **options):
        asked.update(options, hub_id=hub_id)
        return here(split=options["split"], streaming=options["streaming"])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert_goes_on_from_anywhere(Source.of(DatasetSpec("mine", "test", hub_id="owner/name"), token="secret"), ROWS)
    assert (asked["hub_id"], asked["token"], asked["streaming"]) == ("owner/name", "secret", True)


def test_draws_and_joined_subsets_cannot_be_streamed(tmp_path: Path):
    with pytest.raises(ConfigError, match="num_samples"):
        source(source=write(tmp_path / "a.jsonl", ROWS), num_samples=3)
    with pytest.raises(ConfigError, match="several subsets"):
        RowStream(source(hub_id="owner/name", subset="a+b"))


@pytest.mark.parametrize("strategy", ["concat", "interleave_under", "interleave_over", "interleave_once"])
@pytest.mark.parametrize("probs", ["", "0.5,0.3,0.2"])
def test_a_stream_mixes_as_the_whole_does(tmp_path: Path, streamed, strategy: str, probs: str):
    paths = [str(write(tmp_path / f"{name}.jsonl", ROWS[:count])) for name, count in (("a", 30), ("b", 4))]
    keys = {"dataset": ",".join([*paths, paths[1]]), "mix_strategy": strategy, "interleave_probs": probs}
    keys = keys if probs and strategy != "concat" else {k: v for k, v in keys.items() if k != "interleave_probs"}
    whole = [e.row for e in load_examples_for(config(tmp_path, **keys, streaming=False)).train]
    prepared = streamed(**keys)
    assert first_pass(prepared) == whole
    report = prepared.report.to_dict()
    assert report["datasets"]["b"]["read"] == 4 == report["datasets"]["b"]["kept"]  # listed twice, still four rows
    assert report["splits"]["train"] == len(whole)


def test_a_mixed_stream_goes_on_from_anywhere(tmp_path: Path):
    sources = [
        source(source=write(tmp_path / f"{n}.jsonl", ROWS[:count])) for n, count in (("a", 9), ("b", 2), ("c", 5))
    ]
    mix = "interleave_over", [0.5, 0.2, 0.3], 3
    stream = MixedStream(sources, [None] * 3, *mix)
    order, places = [], []
    for _ in range(3):
        rows = stream.one_pass()
        while True:
            places.append((len(order), json.loads(json.dumps(stream.place))))
            row = next(rows, None)
            if row is None:
                break
            order.append(row[:2])
    for taken, place in places[:: len(places) // 12]:
        again = MixedStream(sources, [None] * 3, *mix, place)
        rest = [row[:2] for _ in range(3 - place["pass"]) for row in again.one_pass()]
        assert rest == order[taken:]


def test_held_out_rows_come_first_and_are_not_trained_on(tmp_path: Path, streamed):
    a = write(tmp_path / "a.jsonl", [{"instruction": "", "output": "x"}, *ROWS])
    b = write(tmp_path / "b.jsonl", ROWS)
    prepared = streamed(dataset=f"{a},{b},{a}", val_size=5, eval_on_each_dataset=True)
    assert prepared.eval["eval_a"].rows == ["a:1", "a:2", "a:3"] and prepared.eval["eval_b"].rows == ["b:0", "b:1"]
    assert Counter(first_pass(prepared)) == Counter(
        {**{f"a:{i}": 2 for i in range(4, 31)}, **{f"b:{i}": 1 for i in range(2, 30)}}
    )
    entry = prepared.report.to_dict()["datasets"]["a"]
    assert (entry["read"], entry["kept"], entry["dropped"]["empty prompt"]["rows"]) == (31, 30, ["a:0"])


def test_an_evaluation_set_is_read_at_once(tmp_path: Path, streamed):
    a, b = write(tmp_path / "a.jsonl", ROWS), write(tmp_path / "b.jsonl", ROWS[:3])
    prepared = streamed(dataset=str(a), eval_dataset=str(b))
    assert prepared.eval["eval"].rows == ["b:0", "b:1", "b:2"]
    assert set(prepared.report.datasets) == {"a", "b"} and prepared.report.splits == {"train": 7, "eval": 3}


def test_max_samples_ends_each_dataset(tmp_path: Path, streamed):
    paths = [str(write(tmp_path / f"{name}.jsonl", ROWS[:count])) for name, count in (("a", 30), ("b", 4))]
    assert Counter(row[0] for row in first_pass(streamed(dataset=",".join(paths), max_samples=6))) == {"a": 6, "b": 4}


def test_no_usable_row_shows_the_arithmetic(tmp_path: Path, streamed):
    with pytest.raises(DataError, match="0 of 30 rows usable: 30 empty answer"):
        streamed(dataset=str(write(tmp_path / "a.jsonl", [{**row, "output": ""} for row in ROWS])))
    with pytest.raises(DataError, match="0 of 0 rows usable"):
        streamed(dataset=str(write(tmp_path / "b.jsonl", [])))


def test_a_column_that_comes_late_is_said(tmp_path: Path, streamed, monkeypatch, caplog):
    monkeypatch.setattr("trueup.data.buffers.PEEKED", 5)
    rows = [*ROWS[:20], {**ROWS[20], "system": "Be brief.", "remark": "no role"}, *ROWS[21:]]
    prepared = streamed(dataset=str(write(tmp_path / "a.jsonl", rows)))
    first_pass(prepared)
    assert any("column `system` comes up only in row a:20" in note for note in prepared.report.notes)
    assert "remark" not in " ".join(prepared.report.notes)


def test_a_wrong_type_names_row_and_line(tmp_path: Path, streamed):
    rows = [*ROWS[:20], {"instruction": 5, "output": "a"}, *ROWS[21:]]
    prepared = streamed(dataset=str(write(tmp_path / "a.jsonl", rows)))
    with pytest.raises(DataError, match=r"column `instruction` holds .* \(row 20\)") as caught:
        first_pass(prepared)
    assert "a.jsonl:21" in str(caught.value)


def test_lengths_are_counted_without_keeping_a_row(tmp_path: Path, streamed):
    prepared = streamed(dataset=str(write(tmp_path / "a.jsonl", ROWS)))
    first_pass(prepared)
    whole = prepare(config(tmp_path, dataset=str(tmp_path / "a.jsonl"), streaming=False), make_tokenizer("qwen"))
    assert prepared.report.statistics() == whole.report.statistics()
    assert not prepared.report._dropped and not prepared.report._measured


STAGE_OF = {"pair": "dpo", "feedback": "kto", "chat": "sft", "text": "pt"}


@pytest.mark.parametrize("name", REAL)
def test_real_sets_are_streamed_whole(streamed, real_data: Path, name: str):
    kind, kept = REAL[name]
    prepared = streamed(
        dataset=name, dataset_dir=str(real_data), stage=STAGE_OF[kind], buffer_size=400, cutoff_len=50_000
    )
    assert len(set(first_pass(prepared))) == kept == prepared.report.datasets[name].kept


sides = st.sampled_from(["", " ", "yes", "no", "c\0", "word " * 40, "\ud800"])
shapes = st.lists(st.fixed_dictionaries({"instruction": sides, "output": sides}), min_size=1, max_size=25)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(shapes, st.integers(1, 9), st.sampled_from(["keep_start", "keep_end", "drop"]), st.integers(16, 60))
@example([{"instruction": "yes", "output": "yes"}] * 2, 1, "keep_start", 58)
def test_whatever_the_rows_a_stream_reports_as_the_whole_does(tmp_path: Path, rows, size, truncation, cutoff):
    path = write(tmp_path / "rows.jsonl", rows)
    keys = {"dataset": str(path), "cutoff_len": cutoff, "truncation": truncation}
    try:
        whole = prepare(config(tmp_path, **keys, streaming=False, overwrite_cache=True), make_tokenizer("qwen"))
    except (DataError, ConfigError):
        with pytest.raises(DataError):
            prepare(config(tmp_path, **keys, buffer_size=size), make_tokenizer("qwen"))
        return
    prepared = prepare(config(tmp_path, **keys, buffer_size=size), make_tokenizer("qwen"))
    assert prepared.stream is not None
    try:
        assert first_pass(prepared) == whole.train.rows
        mine, other = (p.report.to_dict() for p in (prepared, whole))
        for report in (mine, other):  # a stream does not look for duplicates, and says so
            report["datasets"]["rows"] |= {"duplicates": None, "findings": None}
        assert (mine["datasets"], mine["tokens"]) == (other["datasets"], other["tokens"])
        entry = mine["datasets"]["rows"]
        assert entry["read"] == len(rows) == entry["kept"] + sum(d["count"] for d in entry["dropped"].values())
    finally:
        prepared.stream.close()
