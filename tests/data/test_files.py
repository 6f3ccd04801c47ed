"""Compressed files, several files, and files behind URLs give the rows that the plain file gives."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from trueup.data.load import load_examples
from trueup.data.registry import DatasetSpec, resolve_datasets
from trueup.data.sources import read_rows
from trueup.errors import DataError, ModelError

ROWS = [{"instruction": f"question {i}", "output": f"antwoord № {i}"} for i in range(50)]
TEXT = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def zstd(data: bytes) -> bytes:
    return pytest.importorskip("zstandard").ZstdCompressor().compress(data)


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": zstd,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def rows_of(source: Path, **spec) -> list[dict]:
    return list(read_rows(DatasetSpec("mine", "test", source=source, **spec)))


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.JSON", "rows.csv"])
def test_a_compressed_file_gives_the_same_rows(tmp_path, name, suffix):
    data = TEXT
    if name.endswith(".csv"):
        data = ("instruction,output\n" + "".join(f"{r['instruction']},{r['output']}\n" for r in ROWS)).encode()
    (tmp_path / f"{name}{suffix}").write_bytes(COMPRESS[suffix](data))
    assert rows_of(tmp_path / f"{name}{suffix}") == ROWS


@pytest.mark.parametrize("suffix", COMPRESS)
def test_several_frames_in_a_file_are_all_read(tmp_path, suffix):
    half = len(TEXT) // 2
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix](TEXT[:half]) + COMPRESS[suffix](TEXT[half:]))
    assert rows_of(path) == ROWS


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"none of these" + data])
def test_a_compressed_file_that_is_cut_or_none_is_refused(tmp_path, suffix, damage):
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes(damage(COMPRESS[suffix](TEXT * 400)))
    with pytest.raises(DataError, match="not a whole compressed file") as caught:
        rows_of(path)
    assert f"rows.jsonl{suffix}" in str(caught.value)


def test_a_missing_zstandard_is_named_with_the_extra(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl.zst").write_bytes(zstd(TEXT))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ModelError, match=r"zstandard.*\n?.*trueup\[files\]"):
        rows_of(tmp_path / "rows.jsonl.zst")


def test_a_compressed_file_is_named_without_its_endings_and_points_to_its_lines(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(TEXT + b'{"instruction": "q"\n'))
    (spec,) = resolve_datasets([str(path)], tmp_path)
    assert spec.name == "rows"
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz:51:20"):
        read_rows(spec)


def test_files_of_one_type_may_be_compressed_in_part(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(TEXT[: TEXT.index(b"\n") + 1])
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(TEXT))
    assert rows_of(tmp_path) == rows_of(tmp_path / "*") == ROWS[:1] + ROWS
    (tmp_path / "c.csv.gz").write_bytes(gzip.compress(b"a,b\n"))
    with pytest.raises(DataError, match=r"several types: \.csv, \.jsonl"):
        rows_of(tmp_path)


# ---- behind URLs ----


@pytest.fixture
def served(tmp_path) -> Iterator[str]:
    """A web server for a folder `web`, on this machine alone."""
    pytest.importorskip("aiohttp")
    (tmp_path / "web").mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *words) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "web")))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def url_rows(url: str) -> list[dict]:
    return list(read_rows(DatasetSpec("mine", "test", url=url)))


def test_a_file_behind_http_is_read_plain_and_compressed(tmp_path, served):
    (tmp_path / "web" / "rows.jsonl").write_bytes(TEXT)
    (tmp_path / "web" / "rows.jsonl.gz").write_bytes(gzip.compress(TEXT))
    assert url_rows(f"{served}/rows.jsonl") == url_rows(f"{served}/rows.jsonl.gz") == ROWS
    assert url_rows(f"{served}/rows.jsonl?download=true") == ROWS
    data = load_examples([f"{served}/rows.jsonl"], kind="chat", dataset_dir=tmp_path)
    assert len(data.train) == 50


def test_what_is_not_behind_a_url_is_said(served):
    with pytest.raises(DataError, match=r"nothing is there: http://127\.0\.0\.1:\d+/no\.jsonl"):
        url_rows(f"{served}/no.jsonl")
    with pytest.raises(DataError, match="cannot tell the type"):
        url_rows(f"{served}/page")


def test_a_server_that_does_not_answer_is_said():
    pytest.importorskip("aiohttp")
    with pytest.raises(ModelError, match=r"cannot reach http://127\.0\.0\.1:1/rows\.jsonl"):
        url_rows("http://127.0.0.1:1/rows.jsonl")


def test_a_folder_and_a_pattern_behind_a_url(tmp_path):
    for name, part in (("b.jsonl", ROWS[1:]), ("a.jsonl", ROWS[:1]), (".hidden.jsonl", ROWS), ("notes.md", [])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    assert url_rows(f"file://{tmp_path}") == url_rows(f"file://{tmp_path}/?.jsonl") == ROWS
    with pytest.raises(DataError, match="no data file there"):
        url_rows(f"file://{tmp_path}/x-*.jsonl")


@pytest.mark.parametrize("scheme", ["s3", "gs", "gcs"])
def test_a_cloud_whose_client_is_not_installed_names_the_extra(scheme, monkeypatch):
    for module in ("s3fs", "gcsfs"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModelError, match=r"trueup\[files\]"):
        url_rows(f"{scheme}://bucket/rows.jsonl")


def test_a_registered_cloud_file_is_read(tmp_path):
    import fsspec

    with fsspec.open("memory://cloud/sets/rows.jsonl.gz", "wb") as file:
        file.write(gzip.compress(TEXT))
    entry = {"mine": {"cloud_file_name": "memory://cloud/sets"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(entry), encoding="utf-8")
    data = load_examples(["mine"], kind="chat", dataset_dir=tmp_path)
    assert [example.row for example in data.train][:2] == ["mine:0", "mine:1"] and len(data.train) == 50
