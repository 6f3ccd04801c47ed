"""Every word in every language."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("nicegui")

from tests.conftest import ROOT  # noqa: E402
from trueup.web.pages import discover  # noqa: E402
from trueup.web.words import LANGUAGES, find, preferred, tables  # noqa: E402

PAGES = discover()
SOURCES = sorted((ROOT / "src" / "trueup" / "web").rglob("*.py"))


def blanks(text: str) -> set[str]:
    return set(re.findall(r"\{(\w*)\}", text))


@pytest.mark.parametrize("name", sorted(tables()))
def test_every_word_is_there_in_every_language_with_the_same_blanks(name: str):
    for key, entry in tables()[name].items():
        assert set(entry) == set(LANGUAGES), f"{name}.{key}"
        assert all(text.strip() for text in entry.values()), f"{name}.{key}"
        assert len({frozenset(blanks(text)) for text in entry.values()}) == 1, f"{name}.{key}: blanks differ"


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
