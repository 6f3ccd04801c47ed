"""What a template writes around messages whose texts it does not look at.

Many chat templates copy texts and decide by roles alone. Rendered once with texts that cannot be
looked at (any question about them stops the rendering), such a template has shown what it writes
around any texts in these roles, and filling them in is the same as rendering anew, in a fraction of
the time. That holds because (a) such a text is an object without answers: comparing, measuring,
searching, splitting or converting it raises, and Python's C functions refuse it; (b) the one way
out, `str()`, is taken for output alone, because templates are held to the few constructs below.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from jinja2 import nodes

from trueup.data.examples import Json
from trueup.data.time_limit import OutOfTime

_HOLE = re.compile("\ufdd1([0-9]+)\ufdd2")  # noncharacters: no template writes them
_OPERATIONS = """
    eq ne lt le gt ge hash len bool iter next contains getitem getattr call format bytes reversed
    mul rmul mod rmod sub rsub truediv rtruediv floordiv rfloordiv pow rpow and rand or ror
    neg pos invert int float index complex round trunc
"""


class Looked(BaseException):
    """A template asked about a text. No filter's `except` is to hold this up."""


def _refuse(*_: Any) -> NoReturn:
    raise Looked


class Unseen:
    """A text to be copied and nothing else."""

    __slots__ = ("_text",)
    __class__ = property(lambda self: str)  # `is string` is true of every text  # type: ignore[assignment]

    def __init__(self, text: str) -> None:
        self._text = text

    def __str__(self) -> str:
        return self._text

    def __add__(self, other: Any) -> Unseen:
        return Unseen(self._text + _text_of(other))

    def __radd__(self, other: Any) -> Unseen:
        return Unseen(_text_of(other) + self._text)


for _name in _OPERATIONS.split():
    setattr(Unseen, f"__{_name}__", _refuse)


def _text_of(other: Any) -> str:
    if type(other) is str:
        return other
    return other._text if type(other) is Unseen else _refuse()


class Frame:
    """What stands around texts: fill them in and it is the conversation."""

    def __init__(self, text: str) -> None:
        self._parts = _HOLE.split(text)  # text, number, text, number, … text
        self._holes = [(place, int(self._parts[place])) for place in range(1, len(self._parts), 2)]

    def filled(self, messages: Sequence[Json]) -> str:
        parts = self._parts.copy()
        for place, number in self._holes:
            parts[place] = messages[number]["content"]
        return "".join(parts)


def frame(render: Callable[[list[Json]], str], roles: Sequence[str]) -> Frame | None:
    """What `render` writes around the texts of messages in these roles; None if it looks at them.

    `render` must run a template that `may_be_blind`. Raises OutOfTime where it has a time limit.
    """
    try:
        return Frame(render([{"role": role, "content": Unseen(f"\ufdd1{i}\ufdd2")} for i, role in enumerate(roles)]))
    except OutOfTime:
        raise
    except (Looked, Exception):  # rendering the real messages says what is the matter
        return None


# Everything else (macros, blocks that are captured, ~, join) would make a plain string of a text.
_NODES = {
    "Template", "Output", "TemplateData", "Const", "Name", "NSRef", "Getattr", "Getitem", "Slice", "Keyword", "Pair",
    "Dict", "List", "Tuple", "If", "For", "Assign", "Compare", "Operand", "And", "Or", "Not", "Add", "Sub", "Neg",
    "CondExpr", "Break", "Continue", "Test", "Filter", "Call", "Mod",
}  # fmt: skip
_FILTERS = {"trim", "length", "count", "upper", "lower", "title", "capitalize", "list", "first", "last", "default"}
_FILTERS |= {"tojson"}  # refuses an object it does not know
_TESTS = {"defined", "undefined", "none", "string", "mapping", "sequence", "iterable", "true", "false", "boolean"}
_FUNCTIONS = {"namespace", "raise_exception", "range"}


def may_be_blind(template: nodes.Template, source: str) -> bool:
    """Whether a template consists of nothing but constructs that cannot look at a text without being noticed."""
    return not re.search("[\ufdd1\ufdd2]", source) and all(map(_is_harmless, template.find_all(nodes.Node)))


def _is_harmless(node: nodes.Node) -> bool:
    match node:
        case nodes.Filter():
            return node.name in _FILTERS
        case nodes.Test():
            return node.name in _TESTS
        case nodes.Call(node=nodes.Name(name=name)):
            return name in _FUNCTIONS
        case nodes.Call():
            return isinstance(node.node, nodes.Getattr) and node.node.attr not in ("format", "format_map", "join")
        case nodes.Mod():  # of numbers: "%s" % text would be its str()
            return isinstance(node.right, nodes.Const) and isinstance(node.right.value, int)
    return type(node).__name__ in _NODES
