"""The data report: every row accounted for, readable in eighty columns, stable as JSON."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from rich.cells import cell_len

from trueup.data.balance import Sides, label_findings
from trueup.data.examples import Chat, Feedback, Message, Pair
from trueup.data.histogram import Histogram
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
    report.cutoff_len = 1024
    report.epoch_tokens = {"padded": 3000, "separate": 2000, "shared": 1500}
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

    from trueup.data.counts import percentile

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


# --- each dataset by itself -----------------------------------------------------------------------


def test_read_is_kept_plus_dropped_plus_merged_and_equal_pairs_are_counted():
    report = filled()
    for i, why in enumerate(("equal pair", "equal answers", "equal after truncation", "too long")):
        report.dropped(f"hh_harmless:{i + 200}", why)
    d = report.to_dict()["datasets"]["hh_harmless"]
    assert d["read"] == d["kept"] + d["merged"] + sum(rows["count"] for rows in d["dropped"].values())
    assert d["equal_pairs"] == 3 and d["truncated_rows"] == 5


def test_each_dataset_has_its_own_lengths_duplicates_and_sides():
    report = DataReport()
    report.compare_rows([pair("a:0"), pair("a:1"), pair("b:0", chosen="bad", rejected="good")])
    report.lengths("a:0", prompt=3, chosen=9, rejected=2, total=14)
    report.lengths("b:0", prompt=5, chosen=2, rejected=2, total=9)
    a, b = (report.to_dict()["datasets"][name] for name in "ab")
    assert (a["duplicates"]["rows"], b["duplicates"]["rows"]) == (["a:1"], [])
    assert (a["reversed_pairs"]["rows"], b["reversed_pairs"]["rows"]) == ([], ["b:0"])
    assert a["tokens"]["prompt"]["max"] == 3 and b["tokens"]["prompt"]["max"] == 5
    assert report.statistics()["prompt"] == {"p50": 4.0, "p95": pytest.approx(4.9), "max": 5, "mean": 4.0}
    assert a["sides"] == {"pairs": 1, "chosen_longer": 1.0, "equally_long": 0.0, "mean_ratio": 4.5}
    assert "4.5 times as long" in a["findings"][0] and not b["findings"]
    assert "a: chosen answers are 4.5 times as long" in " ".join(report.render().split())


def test_overlap_belongs_to_the_rows_that_evaluate():
    report = DataReport()
    report.compare_splits([pair("a:0")], [pair("held:3", chosen="other"), pair("held:4", prompt="another")])
    assert report.to_dict()["datasets"]["held"]["train_eval_overlap"]["rows"] == ["held:3"]
    assert report.overlap.count == 1


@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        ([(10, 10)] * 4, ""),
        ([(12, 10), (9, 10)], ""),
        ([(11, 10)] * 3 + [(9, 10)], "chosen answer is the longer one in 75%"),
        ([(9, 10)] * 9 + [(12, 10)], "rejected answer is the longer one in 90%"),
        ([(30, 10), (1, 2)], "chosen answers are 2.6 times as long"),
        ([(10, 30), (2, 1)], "rejected answers are 2.6 times as long"),
        ([], ""),
    ],
)
def test_sides_of_unequal_length_are_remarked(lengths, words: str):
    sides = Sides()
    for chosen, rejected in lengths:
        sides.add(chosen, rejected)
    found = list(sides.findings())
    assert (words in found[0]) if words else not found


def test_labels_out_of_balance_come_with_the_weights_that_balance_them():
    assert not list(label_findings({"desirable": 10, "undesirable": 10}))
    assert not list(label_findings({"desirable": 4, "undesirable": 3}))
    assert "kto_chosen_weight between 0.50 and 0.67" in next(label_findings({"desirable": 20, "undesirable": 10}))
    assert "needs both labels" in next(label_findings({"desirable": 20}))


def test_an_epoch_is_told_in_every_layout():
    report = filled()
    assert "an epoch: 1 500 tokens (2 000 without shared prompts, 3 000 padded)" in report.render()
    assert report.to_dict()["epoch_tokens"] == {"padded": 3000, "separate": 2000, "shared": 1500}
    assert DataReport().to_dict()["epoch_tokens"] is None


# --- the page -------------------------------------------------------------------------------------


def test_the_page_tells_all_of_it_and_fetches_nothing():
    page = filled().page()
    for words in (
        "1,500 rows",
        "empty chosen",
        "30",
        "times fewer tokens",
        "at most 1,024 tokens",
        "blank lines",
        "1,400",
    ):
        assert words in page
    assert page.count("<svg") == 3, "prompt, both sides in one, total"
    assert "http:" not in page and "https:" not in page and "src=" not in page and "url(" not in page
    assert "default-src 'none'" in page and "<script" not in page


def test_what_data_say_is_text_on_the_page():
    report = DataReport()
    name = '<i>"x"</i>'
    report.dataset(name).read = 2
    report.dropped(f"{name}:0", "<b>reason</b>", "<script>alert(1)</script>")
    report.compare_rows([pair(f"{name}:0"), pair(f"{name}:1")])
    report.lengths(f"{name}:1", **{"<u>part</u>": 3})
    report.note("<img src=x>")
    report.splits = {"<s>train": 1}
    page = report.page()
    for tag in ("<i>", "<b>reason", "<script", "<img", "<u>", "<s>", 'x"<'):
        assert tag not in page, tag


def test_an_empty_report_is_a_page():
    assert "nothing out of balance" in DataReport().page()


@pytest.mark.parametrize("lengths", [{0: 1}, {7: 3}, {1: 1, 2: 1}, dict.fromkeys(range(1000), 2), {3: 999, 100_000: 1}])
def test_a_histogram_holds_every_row(lengths: dict[int, int]):
    histogram = Histogram.of([lengths, {5: 4}])
    assert histogram.counts.sum(axis=1).tolist() == [sum(lengths.values()), 4]
    assert histogram.counts.shape[1] <= 41
    drawn = histogram.svg(["a", "b"], ["red", "blue"], limit=1)
    assert drawn.count("<path") == 2 and ("+</span>" in drawn) == (max(lengths) == 100_000)
