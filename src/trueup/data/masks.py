"""What of the answers is left out of the loss: turns by their weight in the data, thoughts by a key."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from trueup.data.examples import Message
from trueup.data.spans import Span

_END_OF_THOUGHT = "</think>"


def by_weight(sequences: list[list[Span]], messages: Sequence[Message], last_only: bool) -> list[list[Span]]:
    """The spans of a conversation, of which only answers with weight 1 are trained.

    `sequences` is what `ChatTemplate.chat_spans` gave for all of them (`last_only`: with `mask_history`): one sequence
    of all answers, or one for each. Of the latter, those that would train nothing are left out, unless all would.
    """
    answers = [message.trained for message in messages if message.role == "assistant"]
    trained = iter(answers[-1:] if last_only else answers)
    weighed = [[Span(s.text, next(trained)) if s.trained else s for s in spans] for spans in sequences]
    return [spans for spans in weighed if any(span.trained for span in spans)] or weighed[-1:]


def without_thoughts(spans: Iterable[Span]) -> list[Span]:
    """The same text, of which thoughts are context and only what follows them is trained (`mask_thinking`)."""
    parted: list[Span] = []
    for span in spans:
        thought, end, answer = span.text.rpartition(_END_OF_THOUGHT)
        if not span.trained or not end:
            parted.append(span)
            continue
        said = answer.lstrip()
        parted += [Span(thought + end + answer[: len(answer) - len(said)], trained=False), Span(said, trained=True)]
    return parted
