"""Examples → token ids and loss masks: what is trained, what is cut, what is dropped, all counted.

Lengths. A prompt is never cut: one that leaves no room for an answer drops its row. An answer that
does not fit is treated by `truncation`: `keep_start` (default) cuts its end, `keep_end` its
beginning, `drop` drops the row, `error` refuses the run. Documents lose nothing: they are cut into
consecutive pieces, each later piece opening with the last token of the one before, untrained, so
that every token is predicted once.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

import numpy as np

from trueup.data.chat_template import ChatTemplate, flatten
from trueup.data.counts import counted, number
from trueup.data.encoded import Answer, Block, Encoded, EncodedDataset
from trueup.data.examples import (
    Chat,
    Example,
    Feedback,
    Message,
    Messages,
    Pair,
    Prompt,
    Ranking,
    Text,
    texts_of,
)
from trueup.data.masks import by_weight, without_thoughts
from trueup.data.report import DataReport
from trueup.data.spans import Span
from trueup.data.turns import RowProblem
from trueup.data.workers import cores, in_order
from trueup.waiting import waiting

log = logging.getLogger("trueup")

Truncation = Literal["keep_start", "keep_end", "drop", "error"]
CHUNK = 1000
ROWS_WORTH_A_WORKER = 2000  # a process more costs some 50 ms
TOO_LONG, PROMPT_TOO_LONG = "too long", "prompt too long"


@dataclass(slots=True)
class Tally:
    """What happened to rows on their way to tokens, as plain JSON values."""

    dropped: list[tuple[str, str, str]] = field(default_factory=list)  # (row, reason, detail)
    truncated: list[tuple[str, str]] = field(default_factory=list)  # (row, the part that was cut)
    #: (row, tokens of each part before anything was cut)
    lengths: list[tuple[str, dict[str, int]]] = field(default_factory=list)
    #: rows of documents cut into pieces
    chunked: list[str] = field(default_factory=list)
    #: rows of chats that became one example for each answer
    split_turns: list[str] = field(default_factory=list)
    #: rows with control tokens written in their text
    control_tokens: list[str] = field(default_factory=list)
    #: rows with an answer that the template gave an empty thought
    empty_thoughts: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, list]:
        """Its own lists by name, not copies: `asdict` would visit every value."""
        return {kind.name: getattr(self, kind.name) for kind in fields(self)}

    def add(self, other: Tally) -> None:
        """What happened to further rows."""
        for kind in fields(self):
            getattr(self, kind.name).extend(getattr(other, kind.name))


@dataclass(frozen=True, slots=True)
class Policy:
    """How long an example may be, what becomes of one that is longer, and what is trained."""

    cutoff_len: int
    truncation: Truncation = "keep_start"
    train_on_prompt: bool = False
    mask_history: bool = False
    mask_thinking: bool = False


Shared = Pair | Ranking | Feedback | Prompt


@dataclass(slots=True)
class Draft:
    """An example as spans of text. Each sequence begins with the prompt's span."""

    example: Example
    sequences: list[list[Span]]


def encode_examples(
    examples: Sequence[Example],
    template: ChatTemplate,
    policy: Policy,
    workers: int | None = None,
    chunk: int = CHUNK,
) -> tuple[EncodedDataset, Tally]:
    """Encode examples of any kinds; rows that cannot be used are only in the tally.

    Ids, order and tally are the same for any number of workers and any chunk.

    Args:
        workers: processes to share the work; None for as many as there are cores, if it is worth it.
        chunk: examples whose strings go to the tokenizer in one call.
    """
    if workers is None:
        workers = min(cores(), len(examples) // ROWS_WORTH_A_WORKER)

    def encoded(number: int) -> tuple[Block, Tally]:
        return encode_block(examples[number * chunk : (number + 1) * chunk], template, policy)

    blocks: list[Block] = []
    tally = Tally()
    with waiting("tokenising", len(examples), "rows") as tell:
        for block, part in in_order(encoded, -(-len(examples) // chunk), workers):
            blocks.append(block)
            tally.add(part)
            tell(min(len(blocks) * chunk, len(examples)))
    dataset = EncodedDataset.joined(blocks)
    say(tally, template, policy)
    return dataset, tally


def encode_block(examples: Sequence[Example], template: ChatTemplate, policy: Policy) -> tuple[Block, Tally]:
    """Encode examples here and now, in one call of the tokenizer and without a word to the user."""
    tally = Tally()
    return Block.of(_Encoder(template, policy, tally).chunk(examples)), tally


class _Encoder:
    """Spans for a chunk of examples, one tokenizer call, then ids: cut, checked and counted."""

    def __init__(self, template: ChatTemplate, policy: Policy, tally: Tally) -> None:
        self.template = template
        self.policy = policy
        self.tally = tally
        self.lead = np.asarray(template.plain_prefix, dtype=np.int32)

    def chunk(self, examples: Sequence[Example]) -> Iterator[Encoded]:
        drafts = [draft for example in examples if (draft := self._draft(example))]
        ids = self.template.spans.encode([spans for draft in drafts for spans in draft.sequences])
        cursor = 0
        for draft in drafts:
            count = len(draft.sequences)
            yield from self._finish(draft, ids[cursor : cursor + count])
            cursor += count

    def _draft(self, example: Example) -> Draft | None:
        try:
            self._look_at(example)
            sequences = self._sequences(example)
            if self.policy.mask_thinking and not isinstance(example, Text):
                sequences = [without_thoughts(spans) for spans in sequences]
            return Draft(example, sequences)
        except RowProblem as problem:
            self.tally.dropped.append((example.row, problem.reason, problem.detail))
            return None

    def _sequences(self, example: Example) -> list[list[Span]]:
        template = self.template
        if isinstance(example, Text):
            splits = template.split_special_tokens
            text = template.spans.protect(example.text) if splits else example.text
            return [[Span(text, trained=True)]]
        if example.tools and not template.supports_tools:
            raise RowProblem("the chat template has no tools", f"template {template.name}")
        if example.plain:
            return _plain_sequences(example, template)
        match example:
            case Chat():
                sequences = template.chat_spans(example.messages, example.tools, self.policy.mask_history)
                if len(sequences) > 1:
                    self.tally.split_turns.append(example.row)
                return by_weight(sequences, example.messages, self.policy.mask_history)
            case Prompt():
                text = template.prompt_text(example.messages, example.tools)
                return [[Span(text, trained=False)]]
            case Pair():
                prompt, answers = _share_turns(example.prompt, [example.chosen, example.rejected])
            case Ranking():
                prompt, answers = _share_turns(example.prompt, list(example.answers))
            case Feedback():
                prompt, answers = example.prompt, [example.answer]
        return template.answer_spans(prompt, answers, example.tools)

    def _finish(self, draft: Draft, ids: list[list[np.ndarray]]) -> Iterator[Encoded]:
        example = draft.example
        try:
            if isinstance(example, Text):
                yield from self._pieces(example, ids[0][0])
            elif isinstance(example, Chat):
                yield from self._chats(example, draft.sequences, ids)
            elif isinstance(example, Pair) and example.plain and not example.prompt:
                yield self._shared(example, *_common_prefix(*self._whole_texts(ids), self.template))
            else:
                prompt = self._opened(ids[0][0]) if example.plain else ids[0][0]
                answers = [flatten(spans[1:], tokens[1:]) for spans, tokens in zip(draft.sequences, ids, strict=True)]
                yield self._shared(example, prompt, [] if isinstance(example, Prompt) else answers)
        except RowProblem as problem:
            self.tally.dropped.append((example.row, problem.reason, problem.detail))

    # --- from ids to examples -----------------------------------------------------------

    def _pieces(self, example: Text, ids: np.ndarray) -> Iterator[Encoded]:
        document = self._opened(ids)
        eos = self.template.tokenizer.eos_token_id
        if eos is not None and (not len(document) or document[-1] != eos):
            document = np.append(document, np.int32(eos))
        limit = self.policy.cutoff_len
        self._measure(example.row, text=len(document))
        if len(document) < 2:
            raise RowProblem("nothing to train", "a document of one token")
        if len(document) > limit:
            self.tally.chunked.append(example.row)
        yield Encoded(example.row, document[:0], (_all_trained(document[:limit]),))
        for start in range(limit, len(document), limit - 1):
            piece = document[start : start + limit - 1]
            yield Encoded(example.row, document[start - 1 : start], (_all_trained(piece),))

    def _chats(self, example: Chat, sequences: list[list[Span]], ids: list[list[np.ndarray]]) -> list[Encoded]:
        """One example, or one for each answer; later ones beyond the limit are a cut tail."""
        flat = [flatten(spans, tokens) for spans, tokens in zip(sequences, ids, strict=True)]
        mask = flat[-1][1]
        first = int(mask.argmax())
        self._measure(example.row, prompt=first, answer=len(mask) - first)
        encoded: list[Encoded] = []
        for ids_T, mask_T in flat:
            try:
                encoded.append(self._chat(example, ids_T, mask_T))
            except RowProblem as problem:
                cuts = self.policy.truncation in ("keep_start", "keep_end")
                if not (encoded and cuts and problem.reason == PROMPT_TOO_LONG):
                    raise
                self.tally.truncated.append((example.row, "answer"))
                break
        return encoded

    def _chat(self, example: Chat, ids: np.ndarray, mask: np.ndarray) -> Encoded:
        if example.plain:
            before, ids = len(ids), self._opened(ids)
            mask = np.concatenate([np.zeros(len(ids) - before, bool), mask])
        first = int(mask.argmax()) if mask.any() else len(mask)
        cut, cut_mask = self._fit(example.row, "answer", first, ids[first:], mask[first:])
        if self.policy.train_on_prompt:
            whole = np.concatenate([ids[:first], cut])
            return Encoded(example.row, ids[:0], (_all_trained(whole),))
        return Encoded(example.row, ids[:first], (Answer(cut, cut_mask),))

    def _shared(self, example: Shared, prompt: np.ndarray, answers: list[tuple[np.ndarray, np.ndarray]]) -> Encoded:
        parts = ("chosen", "rejected") if len(answers) == 2 else ("answer",) * len(answers)
        self._measure_answers(example.row, len(prompt), [len(ids) for ids, _ in answers])
        self._check_prompt(len(prompt))
        if _all_equal(answers):
            raise RowProblem("equal answers", "they are the same tokens")
        fitted = [
            self._fit(example.row, part, len(prompt), ids, mask)
            for part, (ids, mask) in zip(parts, answers, strict=True)
        ]
        if _all_equal(fitted):
            raise RowProblem("equal after truncation", f"they part beyond cutoff_len {self.policy.cutoff_len}")
        return Encoded(example.row, prompt, tuple(Answer(*answer) for answer in fitted), _scores(example))

    def _fit(
        self, row: str, part: str, prompt_len: int, ids: np.ndarray, mask: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """An answer cut to its room. Raises RowProblem if nothing of it could be trained."""
        self._check_prompt(prompt_len)
        room = self.policy.cutoff_len - prompt_len
        if len(ids) > room:
            if self.policy.truncation in ("drop", "error"):
                raise RowProblem(TOO_LONG, f"{prompt_len + len(ids)} tokens, cutoff_len {self.policy.cutoff_len}")
            self.tally.truncated.append((row, part))
            kept = slice(-room, None) if self.policy.truncation == "keep_end" else slice(room)
            ids, mask = ids[kept], mask[kept]
        if not mask[0 if prompt_len else 1 :].any():  # nothing predicts a text's first token
            raise RowProblem("nothing to train", "no token of this row would be in the loss")
        return ids, mask

    def _measure(self, row: str, **parts: int) -> None:
        self.tally.lengths.append((row, {**parts, "total": sum(parts.values())}))

    def _measure_answers(self, row: str, prompt: int, sizes: list[int]) -> None:
        """Of many answers the first and the last: the best and the worst of a ranking."""
        names = {1: ("answer",), 2: ("chosen", "rejected")}.get(len(sizes), ("best", "worst"))
        ends = dict(zip(names, (sizes[0], sizes[-1]), strict=False)) if sizes else {}
        self.tally.lengths.append((row, {"prompt": prompt, **ends, "total": prompt + sum(sizes)}))

    def _check_prompt(self, length: int) -> None:
        if length >= self.policy.cutoff_len:
            raise RowProblem(PROMPT_TOO_LONG, f"{length} tokens, cutoff_len {self.policy.cutoff_len}")

    def _opened(self, ids: np.ndarray) -> np.ndarray:
        """Plain text as the tokenizer opens it (BOS), which its text may already do."""
        is_open = np.array_equal(ids[: len(self.lead)], self.lead)
        return ids if is_open else np.concatenate([self.lead, ids])

    def _whole_texts(self, ids: list[list[np.ndarray]]) -> list[np.ndarray]:
        return [self._opened(np.concatenate(tokens)) for tokens in ids]

    def _look_at(self, example: Example) -> None:
        """Count what a user should know of and the ids would not show."""
        if self.template.has_control_tokens(texts_of(example)):
            self.tally.control_tokens.append(example.row)
        answers = [] if isinstance(example, Text) or example.plain else _answers(example)
        empty = self.template.enable_thinking and self.template.ends.adds_empty_thought
        if empty and any("</think>" not in answer[-1].content for answer in answers):
            self.tally.empty_thoughts.append(example.row)


# --- helpers of single kinds ------------------------------------------------------------


def _plain_sequences(example: Chat | Pair | Ranking | Feedback | Prompt, template: ChatTemplate) -> list[list[Span]]:
    """Raw text, as TRL has it: string after string, EOS at the end, control tokens as written."""

    def text(messages: Sequence[Message]) -> str:
        return "".join(message.content for message in messages)

    def closed(messages: Sequence[Message]) -> str:
        content, eos = text(messages), template.tokenizer.eos_token or ""
        return content if eos and content.endswith(eos) else content + eos

    match example:
        case Prompt():
            return [[Span(text(example.messages), trained=False)]]
        case Chat():
            *before, last = example.messages
            spans = [Span(message.content, message.role == "assistant") for message in before]
            return [[*spans, Span(closed([last]), trained=True)]]
        case Pair():
            answers = [example.chosen, example.rejected]
        case Ranking():
            answers = list(example.answers)
        case Feedback():
            answers = [example.answer]
    return [[Span(text(example.prompt), trained=False), Span(closed(answer), trained=True)] for answer in answers]


def _share_turns(
    prompt: Sequence[Message], answers: list[Sequence[Message]]
) -> tuple[Sequence[Message], list[Sequence[Message]]]:
    """Move turns that all answers share into the prompt, up to where all go on to answer."""
    shared = 0
    for position, turns in enumerate(zip(*answers, strict=False)):
        if any(turn != turns[0] for turn in turns):
            break
        following = [answer[position + 1].role for answer in answers if len(answer) > position + 1]
        if len(following) == len(answers) and all(role == "assistant" for role in following):
            shared = position + 1
    return [*prompt, *answers[0][:shared]], [answer[shared:] for answer in answers]


def _common_prefix(
    chosen: np.ndarray, rejected: np.ndarray, template: ChatTemplate
) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """Two whole texts as prompt and answers: their common tokens, back to where a word ends."""
    shorter = min(len(chosen), len(rejected))
    differ = np.flatnonzero(chosen[:shorter] != rejected[:shorter])
    split = int(differ[0]) if len(differ) else shorter
    split = min(split, shorter - 1)  # the last token of either side, EOS, stays in the answer
    tokens = template.tokenizer.convert_ids_to_tokens
    special = set(template.tokenizer.all_special_ids)

    def opens_word(side: np.ndarray) -> bool:
        token = tokens(int(side[split]))
        text = template.tokenizer.decode([int(side[split])])
        # Chinese and its neighbours put no spaces between words.
        wide = "\ufffd" not in text and text[:1] >= "\u2e80"
        return token[0] in "Ġ▁Ċĉ \n\t" or token == "<0x0A>" or wide or int(side[split]) in special

    def closes_word() -> bool:
        token = tokens(int(chosen[split - 1]))
        return token[-1] in "Ċ\n" or token == "<0x0A>" or int(chosen[split - 1]) in special

    while split and not closes_word() and not (opens_word(chosen) and opens_word(rejected)):
        split -= 1
    answers = [(side[split:], np.ones(len(side) - split, bool)) for side in (chosen, rejected)]
    return chosen[:split], answers


def _all_trained(ids: np.ndarray) -> Answer:
    return Answer(ids, np.ones(len(ids), bool))


def _all_equal(answers: Sequence[tuple[np.ndarray, np.ndarray]]) -> bool:
    return len(answers) > 1 and all(np.array_equal(ids, answers[0][0]) for ids, _ in answers[1:])


def _scores(example: Example) -> tuple[float, ...]:
    if isinstance(example, Feedback):
        return (float(example.desirable),)
    if isinstance(example, Ranking):
        return tuple(example.scores or ()) if example.margin is None else (example.margin,)
    return ()


def _answers(example: Chat | Shared) -> list[Messages]:
    match example:
        case Chat():
            return [example.messages]
        case Pair():
            return [example.chosen, example.rejected]
        case Ranking():
            return list(example.answers)
        case Feedback():
            return [example.answer]
    return []


# --- telling ----------------------------------------------------------------------------


def tell(report: DataReport, tally: Tally) -> None:
    """Put what happened into the data report."""
    for row, reason, detail in tally.dropped:
        report.dropped(row, reason, detail)
    for row, part in tally.truncated:
        report.truncated(row, part)
    tell_lengths(report, tally)
    for rows, one, many, what in (
        (tally.chunked, "document was", "documents were", "cut into consecutive pieces; nothing is lost"),
        (tally.split_turns, "conversation", "conversations", "became one example per answer"),
        (tally.control_tokens, "row has", "rows have", "control tokens written in the text"),
        (tally.empty_thoughts, "row has", "rows have", "answers that were given an empty thought"),
    ):
        if rows:
            report.note(f"{counted(len(rows), one, many)} {what}, first {rows[0]}")


def tell_lengths(report: DataReport, tally: Tally) -> None:
    """Put the lengths into the data report and out of the tally: nobody asks for those of single rows again."""
    for row, parts in tally.lengths:
        report.lengths(row, **parts)
    tally.lengths = []


def say(tally: Tally, template: ChatTemplate, policy: Policy) -> None:
    """What a user should hear even if nobody looks at the report, a sentence each."""
    reasons = Counter(reason for _, reason, _ in tally.dropped)
    if reasons:
        log.warning(
            "%s left out while encoding (%s); on_bad_rows: error refuses them instead.",
            counted(sum(reasons.values()), "row is", "rows are"),
            ", ".join(f"{number(count)} {reason}" for reason, count in reasons.most_common()),
        )
    cut = len({row for row, _ in tally.truncated})
    if cut:
        loses = "its end, and with it the token that stops it"
        log.warning(
            "%s an answer cut at cutoff_len %d: it loses %s. Raise cutoff_len, or set truncation: drop.",
            counted(cut, "row has", "rows have"),
            policy.cutoff_len,
            "its beginning" if policy.truncation == "keep_end" else loses,
        )
    if tally.split_turns:
        log.warning(
            "%s became one example per answer, because the chat template rewrites "
            "earlier turns. mask_history: true trains only their last answer; preserve_thinking: "
            "true keeps them whole with templates that know it.",
            counted(len(tally.split_turns), "conversation", "conversations"),
        )
    if tally.control_tokens:
        log.warning(
            "%s control tokens written in the text (first: %s); in messages they %s (split_special_tokens).",
            counted(len(tally.control_tokens), "row has", "rows have"),
            tally.control_tokens[0],
            "stay text" if template.split_special_tokens else "act as control tokens",
        )
    if tally.empty_thoughts:
        log.warning(
            "%s answers without reasoning, to which the chat template adds an empty "
            "<think> block that is trained. enable_thinking: false moves it into the prompt, "
            "enable_thinking: null does so where nothing is thought.",
            counted(len(tally.empty_thoughts), "row has", "rows have"),
        )
