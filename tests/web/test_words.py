"""Every word in every language."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

pytest.importorskip("nicegui")

from tests.conftest import ROOT  # noqa: E402
from trueup.config import evaluating, exporting, rules  # noqa: E402
from trueup.config.explain import REASONS, alternative  # noqa: E402
from trueup.config.methods import LATER, NOT_ACTING_YET  # noqa: E402
from trueup.config.schema import FIELDS  # noqa: E402
from trueup.data.balance import Sides, label_findings  # noqa: E402
from trueup.data.catalog import CATALOG  # noqa: E402
from trueup.web.pages import discover  # noqa: E402
from trueup.web.phrases import phrases, translated, translated_lines  # noqa: E402
from trueup.web.words import LANGUAGES, find, preferred, tables  # noqa: E402

PAGES = discover()
SOURCES = sorted((ROOT / "src" / "trueup" / "web").rglob("*.py"))
CONFIG = ROOT / "src" / "trueup" / "config"
#: what the checker of the forms is made of; other verbs' own tables are met on no page.
CHECKERS = [CONFIG / f"{name}.py" for name in ("checks", "load", "read", "verbs")]


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
    assert phrases(language)
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


def test_a_name_between_ticks_stays_as_it_is():
    assert translated("`text` and `a b`", "zh") == "`text` 与 `a b`"


def test_an_excerpt_below_a_sentence_stays_as_it_is():
    assert translated("expecting an object\n    text\n    ^", "zh") == "此处应有一个对象\n    text\n    ^"


def test_what_a_data_set_may_teach_by_accident_is_told_in_chinese():
    sides = [Sides(4, 3, 0, 400, 100), Sides(4, 1, 0, 100, 400), Sides(4, 4, 0, 110, 100), Sides(4, 0, 0, 100, 110)]
    said = [text for one in sides for text in one.findings()]
    said += [text for wanted in (0, 1, 9) for text in label_findings({"desirable": wanted, "undesirable": 3})]
    assert len(said) >= 6
    assert [text for text in said if translated(text, "zh") == text] == []


def sentences(node: ast.expr | None) -> Iterator[str]:
    """What an expression says, an x in each of its blanks; nothing of one that says it by other means."""
    if isinstance(node, ast.IfExp):
        yield from sentences(node.body)
        yield from sentences(node.orelse)
    elif isinstance(node, ast.JoinedStr):
        yield "".join(part.value if isinstance(part, ast.Constant) else "x" for part in node.values)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield re.sub(r"%[sd]", "x", node.value)


_PARTS = ("what", "where", "expected", "fix")
_NAMED = {"Problem": _PARTS, "ConfigError": _PARTS, "_Refusal": ("line", "what", "fix")}  # with what each is given


def said_in(path) -> Iterator[str]:
    """The sentences of a module's problems and notices."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in _NAMED:
            given = dict(zip(_NAMED[ast.unparse(node.func)], node.args, strict=False))
            given |= {word.arg: word.value for word in node.keywords}
            for part in ("what", "expected", "fix"):
                yield from sentences(given.get(part))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("log.info", "log.warning"):
            yield from (text for text in sentences(node.args[0]) if text != "x")


@pytest.mark.parametrize("path", CHECKERS, ids=lambda path: path.stem)
def test_what_the_forms_checker_says_is_told_in_chinese(path):
    found = list(said_in(path))
    assert found
    lacking = [text for text in found if translated(text, "zh") == text]
    assert not lacking, "words/phrases/zh/config.json lacks\n" + "\n".join(lacking)


def test_what_cannot_be_meant_together_is_told_in_chinese():
    broken = [*rules.RULES, *evaluating.RULES, *exporting.RULES]
    said = [text for rule in broken for text in (rule.what, rule.fix)]
    said += [*map(alternative, LATER.values()), *filter(None, NOT_ACTING_YET.values()), *REASONS.values()]
    lacking = [text for text in said if translated(text, "zh") == text]
    assert not lacking, "words/phrases/zh/config.json lacks\n" + "\n".join(lacking)


def test_the_last_words_of_a_process_are_told_line_by_line():
    said = "error: dataset: no such file or folder: /a\n    expected: a number\n    fix: drop it\nTraceback: x"
    told = "错误：dataset: 没有这个文件或文件夹：/a\n    应为：数字\n    解决办法：请去掉\nTraceback: x"
    assert translated_lines(said, "zh") == told
    assert translated_lines(said, "en") == said


def test_a_line_of_data_costs_no_more_than_a_sentence():
    line = "ValueError: " + ", ".join(f"'column {n}': 'of {n}: (x)'" for n in range(1000))
    assert len(line) > 20_000
    lines = [line, line[-1900:]]  # one that is longer than any sentence, and one that is not
    tried = translated.cache_info().misses
    assert translated_lines("\n".join(lines), "zh") == "\n".join(lines)
    assert translated.cache_info().misses - tried < 20


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
