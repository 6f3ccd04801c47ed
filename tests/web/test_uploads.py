"""What a browser sends and asks for: names, sizes, lines, windows of rows, bars of a download. Without a browser."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

pytest.importorskip("nicegui")

from starlette.datastructures import Headers  # noqa: E402

from trueup.data.registry import registered  # noqa: E402
from trueup.errors import ConfigError  # noqa: E402
from trueup.inference.server.settings import Settings  # noqa: E402
from trueup.web import fetches, guard, rows, uploads  # noqa: E402
from trueup.web.rows import SeenRow  # noqa: E402
from trueup.web.texts import differences  # noqa: E402
from trueup.web.workspace import Workspace  # noqa: E402


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("pairs.jsonl", "pairs.jsonl"), ("C:\\x\\my pairs.JSONL", "my_pairs.jsonl"), ("../../etc/x.csv", "x.csv"),
        ("数据 1.json", "数据_1.json"), ("--x.json", "x.json"), ("<b>.txt", "b.txt"), ("a\0b.json", "a_b.json"),
        ("a" * 400 + ".json", "a" * 100 + ".json"), ("\u202etxt.json", "txt.json"),
        ("archive.zip", ""), ("rows.jsonl.gz", ""), ("code.py", ""), ("dataset_info.json", ""), (".json", ""),
        ("x/dataset_info.JSON", ""), ("", ""), ("data", ""),
    ],
)  # fmt: skip
def test_names_of_files_are_plain_and_of_data(given: str, kept: str):
    if kept:
        assert uploads.safe_name(given) == kept
        return
    with pytest.raises(ConfigError):
        uploads.safe_name(given)


def arrive(place: Workspace, name: str, content: bytes) -> str:
    staged = uploads.stage(place)
    staged.write_bytes(content)
    return uploads.take(place, staged, name)


def test_a_file_never_takes_the_place_of_another(tmp_path: Path):
    place = Workspace(tmp_path)
    names = [arrive(place, "x.jsonl", b'{"text": "a"}\n') for _ in range(3)] + [arrive(place, "x.csv", b"text\na\n")]
    assert names == ["x", "x-2", "x-3", "x-4"] and set(registered(tmp_path / "data")) == set(names)
    assert arrive(place, "dpo_en_demo.json", b"[]") == "dpo_en_demo-2"  # a bundled sample's name is taken, too
    uploads.remove(place, "x", tmp_path / "data/x.jsonl")
    assert "x" not in registered(tmp_path / "data") and list((tmp_path / ".trueup/trash").glob("*-x.jsonl"))
    assert not list((tmp_path / ".trueup/staged").iterdir())


def test_a_line_is_mended_only_as_it_was_seen(tmp_path: Path):
    place = Workspace(tmp_path)
    arrive(place, "x.jsonl", b'{"a": 1}\n{"a": \n{"a": 3}\n')
    path = tmp_path / "data/x.jsonl"
    assert uploads.line_of(path, 2) == '{"a": ' and uploads.line_of(path, 9) is None
    with pytest.raises(ConfigError, match="has changed"):
        uploads.mend(place, path, 2, "other", "{}")
    with pytest.raises(ConfigError, match="one object"):
        uploads.mend(place, path, 2, '{"a": ', "{}\n{}")
    uploads.mend(place, path, 2, '{"a": ', '{"a": 2}')
    uploads.mend(place, path, 1, '{"a": 1}', "")
    assert path.read_text() == '{"a": 2}\n{"a": 3}\n'
    assert len(list((tmp_path / ".trueup/trash").glob("*x.jsonl"))) == 2


def test_an_upload_that_breaks_off_or_is_too_large_leaves_nothing(studio):
    """S23. A broken one over a real socket; the size by the guard's own count."""
    host = urlsplit(studio.url).netloc
    head = (
        f"POST /_nicegui/client/x/upload/1 HTTP/1.1\r\nhost: {host}\r\norigin: {studio.url}\r\n"
        "content-type: multipart/form-data; boundary=b\r\ncontent-length: 900000\r\n\r\n"
        '--b\r\ncontent-disposition: form-data; name="f"; filename="torn.jsonl"\r\n\r\n{"a": '
    )
    with socket.create_connection(tuple(host.split(":"))) as open_socket:  # type: ignore[arg-type]
        open_socket.sendall(head.encode())
    time.sleep(0.2)
    assert not [path for path in studio.root.rglob("*torn*")]
    assert uploads.MOST_BYTES <= guard.UPLOAD_BYTES


def test_an_upload_ends_where_it_is_too_large(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(guard, "UPLOAD_BYTES", 3 * 2**20)
    parts = iter([{"type": "http.request", "body": b"x" * 2**20, "more_body": True}] * 10)

    async def receive() -> Any:
        return next(parts)

    headers = Headers({"content-type": "multipart/form-data; boundary=b"})
    bounded = guard.StudioGuard(None, Settings(port=0))._bounded({}, headers, receive)  # type: ignore[arg-type]
    found = []
    for _ in range(5):
        with pytest.raises(StopIteration) as ended:  # nothing in it waits
            bounded().send(None)
        found.append(ended.value.value["type"])
    assert found == ["http.request"] * 3 + ["http.disconnect"] * 2


def test_rows_far_into_a_file_are_read_from_noted_places(tmp_path: Path):
    place = Workspace(tmp_path)
    content = "".join(json.dumps({"prompt": f"q{n}", "chosen": "a", "rejected": "b"}) + "\n" for n in range(3000))
    arrive(place, "long.jsonl", content.encode())
    table = rows.open_table(rows.spec_of(tmp_path, "long"))
    window = table.window(2995, 10)
    assert [row.index for row in window.rows] == [2995, 2996, 2997, 2998, 2999] and not window.more
    assert window.rows[0].line == 2996 and window.rows[0].excerpt == "q2995"
    assert len(table._places) == 6 or len(table._places) == 7
    assert [row.excerpt for row in table.window(1500, 2).rows] == ["q1500", "q1501"] and table.window(0, 5).more
    assert table is rows.open_table(rows.spec_of(tmp_path, "long"))


def test_a_fault_in_a_file_is_told_with_the_rows_before_it(tmp_path: Path):
    place = Workspace(tmp_path)
    arrive(place, "torn.jsonl", b'{"prompt": "q", "chosen": "a", "rejected": "b"}\n{"prompt": \n')
    table = rows.open_table(rows.spec_of(tmp_path, "torn"))
    window = table.window(0, 10)
    assert len(window.rows) == 1 and table.kind == "pair"
    assert table.problems and table.problems[0].where and ":2" in table.problems[0].where


def test_only_names_of_the_registry_are_datasets(tmp_path: Path):
    (tmp_path / "secret.jsonl").write_text("{}")
    for name in ("secret.jsonl", str(tmp_path / "secret.jsonl"), "../secret.jsonl", "a/b", "https://x.example/a.jsonl"):
        with pytest.raises(ConfigError, match="no dataset"):
            rows.spec_of(tmp_path, name)


def test_bars_of_a_download_are_read():
    log = "Downloading data:   0%|     | 0.00/27.1M [00:00<?]\rDownloading data:  45%|██▌  | 12.2M/27.1M [00:03<00:04]"
    assert fetches.progress(log) == (0.45, "Downloading data 12.2M/27.1M")
    assert fetches.progress("nothing") == (None, "")


def test_sets_outside_the_catalogue_are_not_fetched(tmp_path: Path):
    for name in ("../x", "owner/name", "--help", ""):
        with pytest.raises(ConfigError):
            fetches.start(Workspace(tmp_path), name)
    assert not (tmp_path / ".trueup").exists()


def test_differences_give_both_texts_back():
    one, other = "SELECT a FROM t WHERE x = 1;\n我喜欢猫。", "SELECT b FROM t;\n我喜欢狗。"
    first, second = differences(one, other)
    assert "".join(piece[0] for piece in first) == one and "".join(piece[0] for piece in second) == other
    assert ("猫", "removed") in first and ("狗", "added") in second
    assert {piece[1] for piece in differences("same", "same")[0]} == {"same"}


def test_a_row_that_is_left_out_is_known_by_its_words():
    raw = {"conversations": [{"from": "human", "value": "hi"}], "chosen": {"role": "assistant", "content": ""}, "n": 3}
    assert SeenRow(0, raw, problem="empty chosen").excerpt == "hi · 3"


def test_a_line_that_is_no_text_is_not_mended_in_a_browser(tmp_path: Path):
    file = tmp_path / "bytes.jsonl"
    file.write_bytes(b'{"a": 1}\n\xff\xfe\x00\n')
    assert [uploads.line_of(file, number) for number in (1, 2)] == ['{"a": 1}', None]
