"""The data report: every row accounted for, readable in eighty columns, stable as JSON."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from rich.cells import cell_len

from trueup.data.examples import Chat, Feedback, Message, Pair
from trueup.data.report import DataReport, fingerprint, prompt_fingerprint, shorten
from trueup.errors import DataError


def messages(*texts) -> tuple[Message, ...]:
    return tuple(Message("assistant" if i % 2 else "user", t) for i, t in enumerate(texts))


def pair(row, prompt="q", chosen="good", rejected="bad") -> Pair:
    return Pair(messages(prompt), (Message("assistant", chosen),), (Message("assistant", rejected),), row)


def filled() -> DataReport:
    report = DataReport()
    for name, read in (
        ("hh_harmless", 1500),
        ("一个名字很长很长的数据集_with_a_very_long_name", 12),
    ):
        report.dataset(name).read = report.dataset(name).available = read
    for i in range(30):
        report.dropped(f"hh_harmless:{i}", "empty chosen", "Human: " + "谢谢 " * 40)
    report.dropped("hh_harmless:99", "wrong roles", "turn 3 is user after user")
    for i in range(5):
        report.truncated(f"hh_harmless:{i + 100}", "chosen", "a long answer " * 20)
    for i in range(100):
        report.lengths(f"hh_harmless:{i}", prompt=i, chosen=2 * i, rejected=i, total=4 * i)
    report.splits = {"train": 1400, "eval": 81}
    report.note("hh_harmless: 2 blank lines left out")
    return report


def test_read_is_kept_plus_dropped():
    report = filled()
    entry = report.to_dict()["datasets"]["hh_harmless"]
    assert entry["read"] == entry["kept"] + sum(d["count"] for d in entry["dropped"].values())
    assert entry["kept"] == 1469


def test_saying_it_twice_of_one_row_counts_once():
    report = filled()
    before = json.dumps(report.to_dict())
    report.dropped("hh_harmless:3", "too long")
    report.truncated("hh_harmless:100", "chosen")
    report.lengths("hh_harmless:5", prompt=1_000_000)
    report.note("hh_harmless: 2 blank lines left out")
    assert json.dumps(report.to_dict()) == before


def test_it_fits_eighty_columns_and_shows_what_matters():
    text = filled().render()
    assert max(cell_len(line) for line in text.splitlines()) <= 80
    for words in ("1 500", "1 469", "empty chosen", "0, 1, 2, 3 …", "p95", "train 1 400", "blank"):
        assert words in text


def test_colour_only_on_request():
    assert "\x1b[" not in filled().render()
    assert "\x1b[" in filled().render(color=True)


def test_markup_and_control_characters_in_data_are_only_text():
    report = DataReport()
    report.dataset("a").read = 2
    report.dropped("a:0", "empty chosen", "[bold red]x[/] \x1b[31m\x07\n\tafter")
    text = report.render()
    assert "[bold red]x[/]" in text and "\x1b" not in text and "\x07" not in text


def test_to_dict_is_json_and_stable():
    assert json.dumps(filled().to_dict(), allow_nan=False) == json.dumps(filled().to_dict())
    stats = filled().to_dict()["tokens"]["chosen"]
    assert stats == {"p50": 99.0, "p95": pytest.approx(188.1), "max": 198, "mean": 99.0}


def test_an_empty_report_renders():
    assert DataReport().render()
    assert DataReport().to_dict()["datasets"] == {}


def test_row_ids_are_kept_up_to_a_limit_and_counted_beyond():
    entry = filled().to_dict()["datasets"]["hh_harmless"]["dropped"]["empty chosen"]
    assert entry["count"] == 30 and len(entry["rows"]) == 20


def test_rows_are_compared_without_the_space_around_them():
    assert fingerprint(pair("a:0")) == fingerprint(pair("b:7", prompt=" q\n"))
    assert fingerprint(pair("a:0")) != fingerprint(pair("a:0", chosen="good bad", rejected=""))
    chat = Chat(messages("q", "good"), "c:0")
    assert prompt_fingerprint(pair("a:0")) == prompt_fingerprint(chat)


def test_labels_are_counted():
    report = DataReport()
    rows = [Feedback(messages("q"), messages("x")[:1], i < 3, f"k:{i}") for i in range(4)]
    report.compare_rows(rows)
    assert report.to_dict()["datasets"]["k"]["labels"] == {"desirable": 3, "undesirable": 1}


def test_every_unusable_dataset_is_named_with_its_arithmetic():
    report = DataReport()
    for name in ("a", "b"):
        report.dataset(name).read = 1
        report.dropped(f"{name}:0", "too long", "Once upon a time")
    with pytest.raises(DataError) as caught:
        report.require_usable()
    assert [p.what for p in caught.value.problems] == [
        f"dataset {name!r}: 0 of 1 rows usable: 1 too long" for name in ("a", "b")
    ]
    assert "a:0: Once upon a time" in str(caught.value)


def test_shorten_gives_one_printable_line():
    assert shorten("a\n\tb " * 50, 20) == "a b a b a b a b a b…"
    assert len(shorten("x" * 100_000)) == 60


def test_percentiles_of_counts_are_those_of_the_numbers():
    import numpy as np

    from trueup.data.report import percentile

    random = np.random.default_rng(0)
    for size in (1, 2, 3, 10, 997):
        numbers = random.integers(0, 40, size).tolist()
        for share in (0, 0.5, 0.95, 1):
            assert percentile(Counter(numbers), share) == pytest.approx(np.percentile(numbers, 100 * share), abs=1e-9)


def test_rows_may_be_forgotten_and_the_counts_kept():
    report = DataReport()
    report.dataset("a").read = 3
    report.dropped("a:0", "empty")
    for part in ("prompt", "answer"):
        report.truncated("a:1", part)
    report.lengths("a:1", total=7)
    before = report.to_dict()
    report.forget_rows()
    assert report.to_dict() == before == DataReport.restored(report.state()).to_dict()
    assert report.dataset("a").cut == 1
