"""What the program itself says (help, reasons, warnings, problems) in the reader's language.

The program speaks English. `words/phrases/<language>/` has its sentences with {1}, {2} … for what changes in them: of
data, of the config's checks, of a run. A sentence that none of them fits stays as it is.
"""

from __future__ import annotations

import json
import re
from functools import cache, lru_cache
from pathlib import Path

_FOLDER = Path(__file__).parent / "words" / "phrases"
_BLANK = re.compile(r"\{(\d+)\}")
_DETAILED = "{1} ({2})"  # a reason, and what is the matter with this row
_REASON = re.compile(r"(.+?) \((.+)\)", re.DOTALL)
_LINE = re.compile(r"(\s*)(error: |stopped: |expected: |fix: )?(.*)")
_LONGEST = 2000  # characters of a sentence


@cache
def phrases(language: str) -> dict[str, str]:
    """Sentences of a language by the program's own."""
    files = sorted((_FOLDER / language).glob("*.json"))
    return {key: text for file in files for key, text in json.loads(file.read_text(encoding="utf-8")).items()}


def translated_lines(text: str, language: str) -> str:
    """What a process left as its last words: `error: where: what`, and beneath it `expected: …` and `fix: …`."""
    return "\n".join(_translated_line(*_LINE.fullmatch(line).groups(""), language) for line in text.splitlines())  # type: ignore[union-attr]


def _translated_line(indent: str, label: str, said: str, language: str) -> str:
    ends = [0, *(colon.end() for colon in re.finditer(": ", said))]
    known = (said[:end] + words for end in ends if (words := translated(said[end:], language)) != said[end:])
    return indent + translated(label, language) + next(known, said)


@lru_cache(maxsize=4096)
def translated(text: str, language: str) -> str:
    """A sentence of the program in `language`, what stands in its blanks as well; as it is where no phrase fits."""
    known = phrases(language)
    if text in known or not known or len(text) > _LONGEST:
        return known.get(text, text)
    if (reason := _REASON.fullmatch(text)) and reason[1] in known:
        return _filled(known[_DETAILED], ["1", "2"], reason, language)
    for pattern, blanks, phrase in _patterns(language):
        if match := pattern.fullmatch(text):
            return _filled(phrase, blanks, match, language)
    said, newline, excerpt = text.partition("\n")
    return translated(said, language) + newline + excerpt if newline else text


def _filled(phrase: str, blanks: list[str], match: re.Match[str], language: str) -> str:
    """Names between ticks stay as they are: a column may be called `text`."""
    values = dict(zip(blanks, match.groups(), strict=True))

    def fill(blank: re.Match[str]) -> str:
        ticked = phrase[blank.start() - 1 : blank.start()] == "`"
        return values[blank[1]] if ticked else translated(values[blank[1]], language)

    return _BLANK.sub(fill, phrase)


@cache
def _patterns(language: str) -> list[tuple[re.Pattern[str], list[str], str]]:
    """(what a sentence looks like, its blanks in their order, the phrase), those with the most words first."""
    with_blanks = [one for one in phrases(language).items() if _BLANK.search(one[0]) and one[0] != _DETAILED]
    longest_first = sorted(with_blanks, key=lambda one: len(_BLANK.sub("", one[0])), reverse=True)
    return [(_pattern(sentence), _BLANK.findall(sentence), phrase) for sentence, phrase in longest_first]


def _pattern(sentence: str) -> re.Pattern[str]:
    fixed = [re.escape(part) for part in _BLANK.split(sentence)[::2]]
    return re.compile("(.+?)".join(fixed), re.DOTALL)
