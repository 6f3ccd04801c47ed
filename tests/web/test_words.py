"""Every word in every language."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("nicegui")

from tests.conftest import ROOT  # noqa: E402
from trueup.config.schema import FIELDS  # noqa: E402
from trueup.data.balance import Sides, label_findings  # noqa: E402
from trueup.data.catalog import CATALOG  # noqa: E402
from trueup.web.pages import discover  # noqa: E402
from trueup.web.phrases import phrases, translated  # noqa: E402
from trueup.web.words import LANGUAGES, find, preferred, tables  # noqa: E402

PAGES = discover()
SOURCES = sorted((ROOT / "src" / "trueup" / "web").rglob("*.py"))


def blanks(text: str) -> set[str]:
    return set(re.findall(r"\{(\w*)\}", text))


@pytest.mark.parametrize("name", sorted(tables()))
def test_every_word_is_there_in_every_language_with_the_same_blanks(name: str):
    for key, entry in tables()[name].items():
        of_the_schema = {"en"} if name == "keys_help" and key in FIELDS else set()
        assert set(entry) | of_the_schema == set(LANGUAGES), f"{name}.{key}"
        assert all(text.strip() for text in entry.values()), f"{name}.{key}"
        assert len({frozenset(blanks(text)) for text in entry.values()}) == 1, f"{name}.{key}: blanks differ"


def test_nearly_every_key_has_help_in_every_language():
    """A new key appears with the schema's own help, which is English; ten of them are too many."""
    helps = tables()["keys_help"]
    assert set(helps) <= set(FIELDS)
    for language in set(LANGUAGES) - {"en"}:
        lacking = [key for key in FIELDS if language not in helps.get(key, {})]
        assert len(lacking) < 10, f"words/keys_help.json says nothing in {language} of {', '.join(lacking)}"


@pytest.mark.parametrize("language", sorted(set(LANGUAGES) - {"en"}))
def test_phrases_have_the_blanks_of_their_sentences(language: str):
    for sentence, phrase in phrases(language).items():
        names = sorted(re.findall(r"\{(\d+)\}", sentence), key=int)
        assert names == [str(number + 1) for number in range(len(names))], sentence
        assert blanks(phrase) == set(names), sentence


@pytest.mark.parametrize("known", sorted({known.about for known in CATALOG.values()}))
def test_the_catalogue_is_described_in_chinese(known: str):
    assert translated(known, "zh") != known


def test_what_the_program_says_is_translated_with_what_stands_in_its_blanks():
    assert (
        translated("prompt too long (512 tokens, cutoff_len 128)", "zh") == "提示过长（512 个词元，cutoff_len 为 128）"
    )
    assert translated("the BOS has run away", "zh") == "the BOS has run away"
    assert translated("too long", "en") == "too long"


def test_what_a_data_set_may_teach_by_accident_is_told_in_chinese():
    sides = [Sides(4, 3, 0, 400, 100), Sides(4, 1, 0, 100, 400), Sides(4, 4, 0, 110, 100), Sides(4, 0, 0, 100, 110)]
    said = [text for one in sides for text in one.findings()]
    said += [text for wanted in (0, 1, 9) for text in label_findings({"desirable": wanted, "undesirable": 3})]
    assert len(said) >= 6
    assert [text for text in said if translated(text, "zh") == text] == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_every_word_that_a_page_says_exists(path):
    for key in re.findall(r"""\b(?:view\.t|say)\(\s*"([\w.]+)\"""", path.read_text(encoding="utf-8")):
        if path.name != "__init__.py":
            assert find(key, "en") is not None, key


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.path)
def test_every_page_has_a_title(page):
    assert all(find(page.title, language) for language in LANGUAGES)


@pytest.mark.parametrize(
    ("header", "language"),
    [("zh-CN,zh;q=0.9,en;q=0.8", "zh"), ("en-GB", "en"), ("fr,zh;q=0.5", "zh"), ("fr", "en"), ("", "en")],
)
def test_the_browsers_language_is_taken_where_we_speak_it(header: str, language: str):
    assert preferred(header) == language
