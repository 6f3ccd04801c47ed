"""A conversation as a file: Markdown to read, or the rows that a training reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from trueup.data.examples import Message
from trueup.data.write import write_text
from trueup.inference.thoughts import split

#: (name, model, conversation)
Voice = tuple[str, str, Sequence[Message]]


def save(path: Path, voices: Sequence[Voice], settings: dict[str, str]) -> None:
    """Write `.md`, `.txt`, `.json` or `.jsonl`; JSON lines hold a conversation each, as `messages`.

    Raises:
        ValueError: another ending. ResourceError: it cannot be written.
    """
    writer = {".md": _markdown, ".txt": _markdown, ".json": _json, ".jsonl": _lines}.get(path.suffix.lower())
    if writer is None:
        raise ValueError(f"{path}: the name should end in .md, .txt, .json or .jsonl")
    write_text(path, writer(voices, settings))


def _markdown(voices: Sequence[Voice], settings: dict[str, str]) -> str:
    parts = ["# Conversation", ", ".join(f"{name} {value}" for name, value in settings.items() if value != "none")]
    for name, model, messages in voices:
        parts.append(f"## {name}" + (f" ({model})" if model else ""))
        for message in messages:
            thought, said = split(message.content)
            parts.append(f"**{message.role}**")
            if thought:
                parts.append("\n".join(f"> {line}" for line in thought.splitlines()))
            parts.append(said)
    return "\n\n".join(parts) + "\n"


def _rows(voices: Sequence[Voice]) -> list[dict]:
    return [
        {"messages": [message.to_dict() for message in messages], "name": name, "model": model}
        for name, model, messages in voices
    ]  # fmt: skip


def _json(voices: Sequence[Voice], settings: dict[str, str]) -> str:
    return json.dumps({"conversations": _rows(voices), "settings": settings}, ensure_ascii=False, indent=2) + "\n"


def _lines(voices: Sequence[Voice], settings: dict[str, str]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in _rows(voices))
