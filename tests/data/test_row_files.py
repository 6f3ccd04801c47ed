"""Files read row by row give what they give when read at once, from any place, and say the same of faults."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.test_sources import TEXTS, dump
from trueup.data.files import DataFile, local
from trueup.data.mixing import STRATEGIES, Turns, mix
from trueup.data.row_files import RowFile
from trueup.errors import DataError

ROWS = [{"text": f"rij {i} “é”\n…", "more": "x" * (i % 7)} for i in range(700)]


def as_text(name: str) -> str:
    lines = [dump(row) for row in ROWS]
    cells = ["".join(f'"{value}"{end}' for value, end in zip(row.values(), ("\t", "\n"), strict=True)) for row in ROWS]
    return {
        "lines.jsonl": "\n".join(lines) + "\n",
        "array.json": json.dumps(ROWS, indent=1, ensure_ascii=False),
        "compact.json": json.dumps(ROWS),
        "objects.json": "\n".join(json.dumps(row, indent=1) for row in ROWS),
        "commas.json": ",\n".join(lines),
        "bom.json": "\ufeff" + json.dumps(ROWS, ensure_ascii=False),
        "cells.tsv": "text\tmore\n" + "".join(cells),
    }[name]


NAMES = ["lines.jsonl", "array.json", "compact.json", "objects.json", "commas.json", "bom.json", "cells.tsv"]


def rows_of(file: DataFile, place=None) -> list[dict]:
    return [row for row, _ in RowFile(file, place)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("packed", [False, True])
def test_a_file_gives_the_same_rows_from_any_place(tmp_path: Path, monkeypatch, name: str, packed: bool):
    monkeypatch.setattr("trueup.data.row_files._CHUNK", 1000)  # many windows, elements across them
    data = as_text(name).encode()
    path = tmp_path / (name + ".gz" * packed)
    path.write_bytes(gzip.compress(data) if packed else data)
    reader, places = RowFile(local(path)), []
    places.append(reader.place)
    for row, _ in reader:
        assert row == ROWS[len(places) - 1]
        places.append(json.loads(json.dumps(reader.place)))
    reader.close()
    assert len(places) == len(ROWS) + 1
    for taken in (0, 1, 2, 311, 699, 700):
        assert rows_of(local(path), places[taken]) == ROWS[taken:]


@pytest.mark.parametrize("name", ["t.parquet", "file.arrow", "stream.arrow"])
def test_a_table_gives_the_same_rows_from_any_place(tmp_path: Path, name: str):
    table, path = pa.Table.from_pylist(ROWS), tmp_path / name
    if name == "t.parquet":
        pq.write_table(table, path, row_group_size=300)
    else:
        new = pa.ipc.new_file if name == "file.arrow" else pa.ipc.new_stream
        with new(str(path), table.schema) as writer:
            for batch in table.to_batches(max_chunksize=90):
                writer.write_batch(batch)
    assert rows_of(local(path)) == ROWS
    for taken in (0, 1, 255, 256, 300, 301, 699, 700):
        assert rows_of(local(path), {"row": taken}) == ROWS[taken:]


@pytest.mark.parametrize("name", TEXTS)
def test_every_way_of_writing_rows_is_told_apart(tmp_path: Path, name: str):
    from tests.data.test_sources import ROWS

    (tmp_path / name).write_bytes(TEXTS[name].encode())
    assert rows_of(local(tmp_path / name)) == ROWS


def test_documents_are_lines(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\n\n two\r\nthree")
    assert list(RowFile(local(tmp_path / "a.txt"))) == [
        ({"text": "one"}, 1),
        ({"text": " two"}, 3),
        ({"text": "three"}, 4),
    ]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": "x\n', "a.jsonl:2:7: unterminated string"),
        ("a.jsonl", '{"a": 1}\n[1]\n', "a.jsonl:2: this line holds a list"),
        ("a.jsonl", '{"a": 1}\n{"a": 1, "a": 2}\n', 'key "a" is given twice'),
        ("a.json", '[{"a": 1}, 5, null]', "element 1 is a number"),
        ("a.json", '[{"a": 1},\n {"a": 2,}]', "a.json:2: expecting property name"),
        ("a.json", '[{"a": 1} {"a": 2}]', "expecting ',' or ']'"),
        ("a.json", '[{"a": 1}] x', "extra data"),
        ("a.json", '[{"a": 1}, {"a": "cut', "file ends inside element 1 (byte 21); truncated download?"),
        ("a.json", '[{"a": 1},', "file ends inside element 1"),
        ("a.json", "[", "file ends inside element 0"),
        ("a.csv", "a,b\n1,2\n3\n", "a.csv:3: 1 cells, but the header has 2"),
        ("a.csv", "a,a\n1,2\n", "column 'a' is there twice"),
        ("a.csv", 'a,b\n"1,2\n', "unexpected end of data"),
        ("a.parquet", "not parquet", "not a readable parquet file"),
        ("a.arrow", "not arrow", "not a readable arrow file"),
    ],
)
def test_the_first_fault_ends_the_reading_with_its_place(tmp_path: Path, name: str, text: str, words: str):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        rows_of(local(tmp_path / name))
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.csv"])
def test_another_encoding_is_said_with_its_byte(tmp_path: Path, name: str):
    good = {"a.jsonl": '{"a": "b"}\n', "a.json": '[{"a": "b"},\n', "a.txt": "b\n", "a.csv": "a\nb\n"}[name]
    (tmp_path / name).write_bytes(good.encode() * (name != "a.json") + good.encode() + "{“”}".encode("gb18030"))
    with pytest.raises(DataError) as caught:
        rows_of(local(tmp_path / name))
    assert "not UTF-8: byte 0xa1" in str(caught.value) and "iconv" in str(caught.value)
    (tmp_path / name).write_bytes(good.encode("utf-16"))
    with pytest.raises(DataError, match="it looks like UTF-16"):
        rows_of(local(tmp_path / name))


# ---- mixing, for datasets whose ends nobody knows ----


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("probs", [None, [0.6, 0.3, 0.1]])
@pytest.mark.parametrize("sizes", [[900, 2500, 300], [5, 0, 3], [1, 1, 1]])
def test_turns_begun_anywhere_are_those_of_the_whole_mix(strategy: str, probs, sizes: list[int]):
    whole = [d for d, _ in mix(sizes, strategy, probs, seed=7)]
    for begin in {0, 1, len(whole) // 2, len(whole) - 1}:
        turns, taken = Turns(3, strategy, probs, 7), [0, 0, 0]
        for d in (d for d, size in enumerate(sizes) if not size):
            turns.empty(d)
        order: list[int] = []
        while True:
            if len(order) == begin:  # as after a resume
                turns = Turns(3, strategy, probs, 7, turns.draws, turns.exhausted)
                for d in (d for d, size in enumerate(sizes) if not size):
                    turns.empty(d)
            d = turns.next()
            if d is None:
                break
            order.append(d)
            taken[d] += 1
            if taken[d] >= sizes[d]:
                turns.ended(d)
        assert order == whole
