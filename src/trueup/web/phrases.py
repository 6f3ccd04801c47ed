"""What the program itself says (help, reasons, warnings, problems) in the reader's language.

The program speaks English. `words/phrases/<language>/` has its sentences with {1}, {2} … for what changes in them: of
data, of the config's checks, of a run. A sentence that none of them fits stays as it is.
"""

from __future__ import annotations

import json
import re
from functools import cache, lru_cache
from itertools import islice
from pathlib import Path

_FOLDER = Path(__file__).parent / "words" / "phrases"
_BLANK = re.compile(r"\{(\d+)\}")
_DETAILED = "{1} ({2})"  # a reason, and what is the matter with this row
_LINE = re.compile(r"(\s*)(error: |stopped: |expected: |fix: )?(.*)")
_LONGEST = 2000  # characters of a sentence
_PLACES = 4  # words with a colon that may stand before what is wrong: a file, a key, a row


@cache
def phrases(language: str) -> dict[str, str]:
    """Sentences of a language by the program's own."""
    files = sorted((_FOLDER / language).glob("*.json"))
    return {key: text for file in files for key, text in json.loads(file.read_text(encoding="utf-8")).items()}


def translated_lines(text: str, language: str) -> str:
    """What a process left as its last words: `error: where: what`, and beneath it `expected: …` and `fix: …`."""
    return "\n".join(_translated_line(*_LINE.fullmatch(line).groups(""), language) for line in text.splitlines())  # type: ignore[union-attr]


def _translated_line(indent: str, label: str, said: str, language: str) -> str:
    """The first places of a line alone: an excerpt of data may have hundreds of colons."""
    ends = [0, *(colon.end() for colon in islice(re.finditer(": ", said), _PLACES))]
    known = (said[:end] + words for end in ends if (words := translated(said[end:], language)) != said[end:])
    return indent + translated(label, language) + next(known, said)


@lru_cache(maxsize=4096)
def translated(text: str, language: str) -> str:
    """A sentence of the program in `language`, what stands in its blanks as well; as it is where no phrase fits."""
    known = phrases(language)
    if text in known or not known or len(text) > _LONGEST:
        return known.get(text, text)
    if (values := _in_blanks(_fixed(_DETAILED), text)) and values[0] in known:
        return _filled(known[_DETAILED], ["1", "2"], values, language)
    for fixed, blanks, phrase in _sentences(language):
        if values := _in_blanks(fixed, text):
            return _filled(phrase, blanks, values, language)
    said, newline, excerpt = text.partition("\n")
    return translated(said, language) + newline + excerpt if newline else text


def _in_blanks(fixed: list[str], text: str) -> list[str] | None:
    """What stands between the fixed parts of a sentence, a character at least and else as little as can be; None if
    `text` is another sentence. One walk through the text: a regular expression may try every place for every blank.
    """
    first, *between, last = fixed
    if not text.startswith(first) or not text.endswith(last):
        return None
    start, end, values = len(first), len(text) - len(last), []
    for part in between:
        found = text.find(part, start + 1, end - 1)
        if found < 0:
            return None
        values.append(text[start:found])
        start = found + len(part)
    return [*values, text[start:end]] if start < end else None


def _filled(phrase: str, blanks: list[str], found: list[str], language: str) -> str:
    """Names between ticks stay as they are: a column may be called `text`."""
    values = dict(zip(blanks, found, strict=True))

    def fill(blank: re.Match[str]) -> str:
        ticked = phrase[blank.start() - 1 : blank.start()] == "`"
        return values[blank[1]] if ticked else translated(values[blank[1]], language)

    return _BLANK.sub(fill, phrase)


@cache
def _sentences(language: str) -> list[tuple[list[str], list[str], str]]:
    """(the fixed parts of a sentence, its blanks in their order, the phrase), those with the most words first."""
    with_blanks = [one for one in phrases(language).items() if _BLANK.search(one[0]) and one[0] != _DETAILED]
    longest_first = sorted(with_blanks, key=lambda one: len(_BLANK.sub("", one[0])), reverse=True)
    return [(_fixed(sentence), _BLANK.findall(sentence), phrase) for sentence, phrase in longest_first]


def _fixed(sentence: str) -> list[str]:
    return _BLANK.split(sentence)[::2]
