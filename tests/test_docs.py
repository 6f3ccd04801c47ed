"""What the source cites is in the docs."""

from __future__ import annotations

import re

from tests.conftest import ROOT


def test_every_fault_number_that_is_cited_has_a_row():
    rows = set(re.findall(r"^\| ([DCT]\d+) \|", (ROOT / "docs/errors.md").read_text(encoding="utf-8"), re.M))
    cited: set[str] = set()
    for folder in ("src", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            cited |= set(re.findall(r"\b[DCT]\d{1,2}\b", text))
            cited |= {number.upper() for number in re.findall(r"def test_([dct]\d{1,2})_", text)}
    assert cited and cited <= rows
