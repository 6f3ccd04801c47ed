"""Whether a chat template does what training needs, tried on a conversation of two questions.

Four things go wrong in practice: the template is not the one a server will use; the token that ends
an answer is never trained; a BOS or EOS stands there twice; earlier turns are rewritten, so that no
sequence shows all answers.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from trueup.data.chat_template import ChatTemplate, flatten
from trueup.data.examples import Message
from trueup.data.rendering import Renderer, TemplateRefusal
from trueup.data.template_probe import ANSWER, QUESTION

_TALK = (
    Message("user", QUESTION["content"]),
    Message("assistant", ANSWER["content"]),
    Message("user", "secondquestion"),
    Message("assistant", "secondanswer"),
)


@dataclass(frozen=True, slots=True)
class Safety:
    """What a template makes of the probe.

    difference: lines of a diff from the tokenizer's own template to this one; empty if they agree.
    own: "same", "different", "none" (the tokenizer has none), "refuses" (it cannot render the probe), "is used".
    rewrites: earlier turns change as a conversation grows, so each answer is an example of its own.
    """

    template: str
    own: str
    difference: tuple[str, ...]
    stop: str
    stop_trained: bool
    bos_doubled: bool
    eos_doubled: bool
    rewrites: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"difference": list(self.difference)}

    def warnings(self) -> Iterator[str]:
        """What is wrong with the tokens, a sentence each; the difference is told elsewhere."""
        if not self.stop_trained:
            yield (
                f"Template {self.template}: the token that ends an answer ({self.stop!r}) is not trained, so the model "
                "will not learn to stop. Close the {% generation %} block behind it, or choose another template."
            )
        for doubled, name in ((self.bos_doubled, "BOS"), (self.eos_doubled, "EOS")):
            if doubled:
                yield (
                    f"Template {self.template} writes {name} twice in a row, which the model has not seen. Remove one "
                    "from the template, or choose another."
                )

    def lines(self) -> Iterator[tuple[str, bool]]:
        """The findings in words, each with whether it is as it should be; the difference belongs below the last."""
        words = {
            "same": "renders the probe as the tokenizer's own does",
            "different": "renders the probe otherwise than the tokenizer's own, which a server would use:",
            "none": "the tokenizer has none of its own to compare with",
            "refuses": "the tokenizer's own cannot render the probe",
            "is used": "the tokenizer's own",
        }
        yield f"stop token {self.stop!r} trained: {_yes(self.stop_trained)}", self.stop_trained
        yield f"BOS doubled: {_yes(self.bos_doubled)}", not self.bos_doubled
        yield f"EOS doubled: {_yes(self.eos_doubled)}", not self.eos_doubled
        if self.rewrites:
            yield "earlier turns are rewritten: a conversation becomes one example for each answer", True
        yield f"template {self.template}: {words[self.own]}", self.own != "different"


def examine(template: ChatTemplate, own: str | None) -> Safety:
    """Try a template; `own` is the text of the tokenizer's own, if it has one."""
    sequences = _sequences(template)
    encoded = [flatten(*pair) for pair in zip(sequences, template.spans.encode(sequences), strict=True)]
    compared, difference = _compare(template, own)
    tokenizer = template.tokenizer
    closing = {*template.stop_ids, tokenizer.eos_token_id} - {None}
    return Safety(
        template=template.name,
        own=compared,
        difference=difference,
        stop=template.ends.stops[0] if template.ends.stops else "",
        stop_trained=all(_ends_with(ids, mask, template.stop_ids) for ids, mask in encoded),
        bos_doubled=any(_doubled(ids[:2], {tokenizer.bos_token_id} - {None}) for ids, _ in encoded),
        eos_doubled=any(_doubled(ids, closing) for ids, _ in encoded),
        rewrites=len(sequences) > 1,
    )


def _sequences(template: ChatTemplate) -> list:
    try:
        return template.chat_spans(_TALK)
    except TemplateRefusal:  # of one question only
        return template.chat_spans(_TALK[:2])


def _ends_with(ids: np.ndarray, mask: np.ndarray, stops: tuple[int, ...]) -> bool:
    """Whether the last trained token is a stop token. Some formats close no earlier answer (Baichuan 2)."""
    return bool(mask.any()) and int(ids[mask][-1]) in stops


def _doubled(ids: np.ndarray, tokens: set[int]) -> bool:
    same = ids[1:] == ids[:-1]
    return any(int(token) in tokens for token in ids[1:][same])


def _compare(template: ChatTemplate, own: str | None) -> tuple[str, tuple[str, ...]]:
    if own is None:
        return "none", ()
    if template.renderer.source == own:
        return "is used", ()
    talk = [message.to_dict() for message in _TALK]
    try:
        ours = template.renderer.text(talk, thinking=template.enable_thinking)
        theirs = Renderer(own, template.renderer.variables).text(talk, thinking=template.enable_thinking)
    except TemplateRefusal:
        return "refuses", ()
    if ours == theirs:
        return "same", ()
    before, after = (text.splitlines(keepends=True) for text in (theirs, ours))
    lines = list(difflib.unified_diff(before, after, "the tokenizer's own", template.name, n=1))
    headers = [line.rstrip("\n") for line in lines[:2]]
    return "different", (*headers, *(line.replace("\n", "↵") for line in lines[2:]))


def _yes(value: bool) -> str:
    return "yes" if value else "no"
