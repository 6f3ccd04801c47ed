"""The page on LLaMA-Factory's keys: `python -m tests.config.llamafactory > docs/llamafactory.md`."""

from __future__ import annotations

import sys
from pathlib import Path

from trueup.config.names import REFUSED
from trueup.config.standing import standing

HERE = Path(__file__).parent

_HEAD = """# LLaMA-Factory's keys

What becomes of every key that LLaMA-Factory 0.9 knows. Made by `python -m tests.config.llamafactory` from the schema, \
from the list of its keys and from the list of tests; a test holds the page current, another that each named test \
exists, and a third that whatever is refused says why.

A key that *acts* does what it does there; the test named shows it. One that *holds anyway* is accepted, said to be \
idle where a reader would wonder, and asks for what happens in any case. One that is *refused* stops the run before it \
starts, with its line, the reason and what to do instead; at LLaMA-Factory's own default it asks for nothing and passes.
"""


def defaults() -> dict[str, str]:
    """Every key of LLaMA-Factory with its default, in its order."""
    return _pairs("llamafactory_keys.txt")


def proofs() -> dict[str, str]:
    """Key → the test that shows it acting, as pytest names it."""
    return _pairs("llamafactory_tests.txt")


def of_text(name: str) -> bool:
    """Whether a key is about text; those about images, video and sound are refused as a whole."""
    return name not in REFUSED or REFUSED[name].reason != "trueup trains on text only"


def page() -> str:
    """The whole page, as Markdown."""
    shown, tests = {name: standing(name) for name in defaults() if of_text(name)}, proofs()
    acting = [[f"`{n}`", s.words, f"`{tests.get(n, '')}`"] for n, s in shown.items() if s.state == "acts"]
    holding = [[f"`{n}`", s.words] for n, s in shown.items() if s.state == "holds anyway"]
    refused: dict[str, list[str]] = {}
    for name, found in shown.items():
        if found.state == "refused":
            refused.setdefault(found.words, []).append(f"`{name}`")
    others = ", ".join(f"`{name}`" for name in defaults() if not of_text(name))
    return "\n".join(
        [
            _HEAD,
            f"## {len(acting)} act\n",
            _table(["key", "here", "test"], acting),
            f"## {len(holding)} hold anyway\n",
            _table(["key", "why"], holding),
            f"## {sum(map(len, refused.values()))} are refused\n",
            _table(["keys", "why, and what instead"], [[", ".join(names), why] for why, names in refused.items()]),
            f"trueup trains on text only: {others}.\n",
        ]
    )


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def _pairs(file: str) -> dict[str, str]:
    lines = (HERE / file).read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


if __name__ == "__main__":
    sys.stdout.write(page())
