"""A process that turns rows into tokens for pages, which load no tokenizer: `python -m trueup.recipes.token_worker`.

A line of JSON in, {"dataset", "row", "words"}; a line of JSON out: the row as the trainer's own encoder has it, or
what is wrong. Without a "row" it is the report on all of them. Ends with its input, or when nobody has asked for a
while.
"""

from __future__ import annotations

import json
import os
import select
import sys
from dataclasses import asdict
from typing import Any, TextIO

from trueup.data.pieces import visible
from trueup.data.preview import Preview
from trueup.errors import UserError
from trueup.recipes.dataset_views import preview_datasets
from trueup.recipes.datasets import check_datasets

IDLE_SECONDS = 600.0


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    """One row's parts, each a list of [text, role, ids]; or the report; or problems."""
    names, words = [str(asked["dataset"])], list(asked["words"])
    try:
        if asked.get("row") is None:
            return {"ok": True, "result": check_datasets(names, None, words).to_dict()}
        shown = preview_datasets(names, None, words, row=str(asked["row"]))
    except UserError as error:
        return {"ok": False, "problems": [asdict(problem) for problem in error.problems]}
    return {"ok": True, **described(shown)}


def described(shown: Preview) -> dict[str, Any]:
    """The first row of a preview, and the settings it was made with."""
    row = shown.rows[0]
    parts = [
        {
            "name": part.name,
            "tokens": {role: part.count(role) for role in ("trained", "masked", "truncated")},
            "pieces": [
                [visible(piece.text), run.role, list(piece.ids)] for run in part.runs for piece in run.pieces
            ],
        }
        for part in row.parts
    ]  # fmt: skip
    lines = [[line, good] for line, good in shown.safety.lines()] if shown.safety else []
    told = {"row": row.row, "about": row.about, "dropped": row.dropped, "parts": parts}
    return {**told, "settings": shown.settings, "template": lines}


def main(questions: TextIO, answers: TextIO) -> None:
    """Answer until there are no more questions."""
    while select.select([questions], [], [], IDLE_SECONDS)[0]:
        line = questions.readline()
        if not line:
            return
        answers.write(json.dumps(answer(json.loads(line)), ensure_ascii=False) + "\n")
        answers.flush()


if __name__ == "__main__":
    ours = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    main(sys.stdin, ours)
