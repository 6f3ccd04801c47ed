"""The text the built-in model is made from: chats in which requests are answered with SQL.

Pre-training shows both styles in equal parts, as the web has shown them to real models; supervised
fine-tuning settles on the bare one but for a trace. A preference method can only shift what a model
can already do.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from trueup.builtin.sql.tasks import Task, stream_tasks

Chat = list[dict[str, str]]

PT_CHATS, PT_SEED, PT_FORMATTED = 40_000, 1, 0.5
SFT_CHATS, SFT_SEED, SFT_FORMATTED = 13_000, 2, 0.03

_SYSTEM = (
    "You are a helpful assistant.",
    "You write SQL.",
    "Answer with one SQL query.",
    "你是一个乐于助人的助手。",
    "请用一条 SQL 语句回答。",
)


def make_chats(count: int, seed: int, formatted_share: float) -> list[Chat]:
    """Chats of one to three turns, each in one style; some with a system message."""
    return list(islice(_stream_chats(seed, formatted_share), count))


def _stream_chats(seed: int, formatted_share: float) -> Iterator[Chat]:
    rng = random.Random(seed)
    tasks = stream_tasks(seed, "train")
    while True:
        formatted = rng.random() < formatted_share
        chat: Chat = []
        if rng.random() < 0.1:
            chat.append({"role": "system", "content": rng.choice(_SYSTEM)})
        for task in islice(tasks, rng.choices((1, 2, 3), (85, 10, 5))[0]):
            chat += _turn(task.request, _answer(task, formatted))
        yield chat


def _answer(task: Task, formatted: bool) -> str:
    return task.formatted if formatted else task.bare


def _turn(request: str, answer: str) -> Chat:
    return [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]


def write_jsonl(rows: list[dict[str, object]], path: Path) -> None:
    """One JSON object a line."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
