"""Rows in, examples out."""

from trueup.data.examples import (
    Chat,
    Example,
    Feedback,
    Kind,
    Message,
    Messages,
    Pair,
    Prompt,
    Ranking,
    Text,
    Tools,
)

__all__ = [
    "Chat",
    "Example",
    "Feedback",
    "Kind",
    "Message",
    "Messages",
    "Pair",
    "Prompt",
    "Ranking",
    "Text",
    "Tools",
]
