"""The workloads: real text, cut and written so that every tool trains on the same token sequences.

    a  the first rows of dpo_en_demo: long and short, single and many turns
    b  short prompts and long answers, as in UltraFeedback
    c  short dialogues with short answers: HH-RLHF
    d  a long prompt with four answers, two pairs on one prompt side by side, as GRPO sees them

    sql  the bundled requests of the built-in model, for checks that need no other text

Texts are stripped, and an answer that would not fit loses its end here instead of in each tool's own way.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from benchmarks.measure import REPOSITORY, Failed, read_json, read_json_lines
from benchmarks.models import END, START

DATA = REPOSITORY.parent / "shared" / "data"
_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}

Turn = dict[str, str]  # role, content


@dataclass(frozen=True)
class Pair:
    prompt: list[Turn]
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Workload:
    title: str
    rows: int
    batch: int
    max_length: int = 1024


WORKLOADS = {
    "a": Workload("the first rows of dpo_en_demo", 16, 2),
    "b": Workload("short prompts, long answers (UltraFeedback-like)", 16, 2),
    "c": Workload("short dialogues (HH-RLHF)", 32, 4, 512),
    "d": Workload("long shared prompt, four answers (GRPO-like)", 16, 2),
    "sql": Workload("requests and SQL, bundled", 80, 4, 256),
}


@dataclass(frozen=True)
class Counts:
    """Sizes in tokens: `distinct` with every prompt once a batch, `separate` a sequence an answer, `padded` to the
    longest of a batch."""

    pairs: int
    dropped: int
    steps: int
    distinct: int
    answers: int
    separate: int
    padded: int


@dataclass(frozen=True)
class Prepared:
    """Files of one workload for every tool, in `directory`."""

    directory: Path
    workload: Workload
    counts: Counts


def prepare(key: str, model: Path, directory: Path, rows: int | None = None, data: Path = DATA) -> Prepared:
    """Write the workload's pairs in every tool's format.

    Raises:
        Failed: the text it is made of is not in `data`, or nothing of it fits.
    """
    workload = WORKLOADS[key]
    rows = rows or workload.rows
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    try:
        candidates = list(islice(_SOURCES[key](data, tokenizer), rows))
    except FileNotFoundError as error:
        raise Failed(f"{error.filename} is not there; --data names the folder with the benchmark's texts") from error
    fitted = [fit(pair, tokenizer, workload.max_length) for pair in candidates]
    pairs = [pair for pair in fitted if pair]
    if not pairs:
        raise Failed(f"workload {key}: no row fits into {workload.max_length} tokens of this tokenizer")
    write(pairs, directory)
    return Prepared(directory, workload, count(pairs, tokenizer, workload.batch, len(candidates) - len(pairs)))


# --- text -------------------------------------------------------------------------------------


def english(data: Path, _: Tokenizer) -> Iterator[Pair]:
    for row in read_json(data / "dpo_en_demo.json"):
        prompt = [{"role": _ROLES[turn["from"]], "content": turn["value"].strip()} for turn in row["conversations"]]
        yield Pair(prompt, row["chosen"]["value"].strip(), row["rejected"]["value"].strip())


def long_answers(data: Path, tokenizer: Tokenizer) -> Iterator[Pair]:
    """Rows whose prompt is short beside both answers."""
    for pair in english(data, tokenizer):
        sizes = [len(tokenizer.encode(text).ids) for text in (render(pair.prompt), pair.chosen, pair.rejected)]
        if sizes[0] <= 200 and min(sizes[1:]) >= 250:
            yield pair


def dialogues(data: Path, _: Tokenizer) -> Iterator[Pair]:
    """HH rows whose sides differ in the last answer only, with turns that alternate and are not empty."""
    for row in read_json_lines(data / "hh_harmless.jsonl"):
        chosen, rejected = turns(row["chosen"]), turns(row["rejected"])
        roles = [turn["role"] for turn in chosen]
        alternating = roles == ["user", "assistant"] * (len(roles) // 2)
        if alternating and chosen[:-1] == rejected[:-1] and all(turn["content"] for turn in [*chosen, rejected[-1]]):
            yield Pair(chosen[:-1], chosen[-1]["content"], rejected[-1]["content"])


def turns(text: str) -> list[Turn]:
    """A dialogue in HH's one string → its turns."""
    parts = re.split(r"\n\n(Human|Assistant):", text)[1:]
    return [
        {"role": "user" if who == "Human" else "assistant", "content": said.strip()}
        for who, said in zip(parts[::2], parts[1::2], strict=True)
    ]


def shared_prompts(data: Path, tokenizer: Tokenizer) -> Iterator[Pair]:
    """A web page of 640 tokens to go on from, and four answers of 96 to 160 tokens: two pairs on one prompt."""
    rng = random.Random(0)
    answers = iter([text for pair in english(data, tokenizer) for text in (pair.chosen, pair.rejected)])
    for row in read_json_lines(data / "c4_demo.jsonl"):
        page = cut(row["text"], tokenizer, 640)
        if len(tokenizer.encode(page).ids) < 600:
            continue
        prompt = [{"role": "user", "content": f"What could follow this?\n\n{page}"}]
        for _ in range(2):
            chosen, rejected = (cut(_next(answers, tokenizer, 200), tokenizer, rng.randint(96, 160)) for _ in range(2))
            yield Pair(prompt, chosen, rejected)


def _next(texts: Iterator[str], tokenizer: Tokenizer, least: int) -> str:
    return next(text for text in texts if len(tokenizer.encode(text).ids) >= least)


def bundled(_: Path, __: Tokenizer) -> Iterator[Pair]:
    for row in read_json_lines(REPOSITORY / "src" / "trueup" / "builtin" / "data" / "sql_pairs.jsonl"):
        yield Pair([{"role": "user", "content": row["instruction"].strip()}], row["chosen"], row["rejected"])


_SOURCES = {"a": english, "b": long_answers, "c": dialogues, "d": shared_prompts, "sql": bundled}


# --- lengths ----------------------------------------------------------------------------------


def render(prompt: Sequence[Turn]) -> str:
    """The prompt as the models' chat template renders it."""
    turns = "".join(f"{START}{turn['role']}\n{turn['content']}{END}" for turn in prompt)
    return f"{turns}{START}assistant\n"


def cut(text: str, tokenizer: Tokenizer, room: int) -> str:
    """The start of a text that takes at most `room` tokens when it is tokenised again."""
    keep, ids = room, tokenizer.encode(text).ids
    while len(ids) > room:
        text = tokenizer.decode(ids[:keep]).rstrip("\ufffd").strip()
        keep, ids = keep - 1, tokenizer.encode(text).ids
    return text


def fit(pair: Pair, tokenizer: Tokenizer, max_length: int) -> Pair | None:
    """The pair with its answers cut to what the prompt leaves; None if that is next to nothing."""
    room = max_length - len(tokenizer.encode(render(pair.prompt)).ids) - 1  # the end of the turn
    if room < 8:
        return None
    chosen, rejected = (cut(text, tokenizer, room) for text in (pair.chosen, pair.rejected))
    return Pair(pair.prompt, chosen, rejected) if chosen != rejected else None


def count(pairs: Sequence[Pair], tokenizer: Tokenizer, batch: int, dropped: int = 0) -> Counts:
    distinct = answers = separate = padded = 0
    groups = [pairs[i : i + batch] for i in range(0, len(pairs), batch)]
    for group in groups:
        prompts = [render(pair.prompt) for pair in group]
        sizes = [len(tokenizer.encode(text).ids) for text in prompts]
        sides = [[len(tokenizer.encode(f"{text}{END}").ids) for text in (pair.chosen, pair.rejected)] for pair in group]
        lengths = [size + side for size, both in zip(sizes, sides, strict=True) for side in both]
        answers += sum(map(sum, sides))
        distinct += sum(map(sum, sides)) + sum(dict(zip(prompts, sizes, strict=True)).values())
        separate += sum(lengths)
        padded += max(lengths) * len(lengths)
    return Counts(len(pairs), dropped, len(groups), distinct, answers, separate, padded)


# --- files ------------------------------------------------------------------------------------


def write(pairs: Sequence[Pair], directory: Path) -> None:
    """`trl.jsonl` (TRL and trueup), `swift.jsonl`, and `sharegpt.json` with its dataset_info.json."""

    directory.mkdir(parents=True, exist_ok=True)

    def answer(text: str) -> Turn:
        return {"role": "assistant", "content": text}

    trl = [{"prompt": p.prompt, "chosen": [answer(p.chosen)], "rejected": [answer(p.rejected)]} for p in pairs]
    swift = [{"messages": [*p.prompt, answer(p.chosen)], "rejected_response": p.rejected} for p in pairs]
    for name, rows in (("trl.jsonl", trl), ("swift.jsonl", swift)):
        with open(directory / name, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    names = {role: name for name, role in _ROLES.items()}

    def turn(role: str, content: str) -> dict[str, str]:
        return {"from": names[role], "value": content}

    sharegpt = [
        {
            "conversations": [turn(**message) for message in pair.prompt],
            "chosen": turn("assistant", pair.chosen),
            "rejected": turn("assistant", pair.rejected),
        }
        for pair in pairs
    ]
    columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
    info = {"bench": {"file_name": "sharegpt.json", "ranking": True, "formatting": "sharegpt", "columns": columns}}
    for name, value in (("sharegpt.json", sharegpt), ("dataset_info.json", info)):
        with open(directory / name, "w", encoding="utf-8") as file:
            json.dump(value, file, ensure_ascii=False, indent=1)


def in_words(record: Mapping[str, Any]) -> str:
    """A workload and its sizes, as `as_record` gives them, in two lines."""
    dropped = f" ({record['dropped']} dropped)" if record["dropped"] else ""
    return (
        f"{record['title']}:\n"
        f"{record['pairs']} pairs{dropped}, batch {record['batch']}, {record['steps']} steps; "
        f"{record['distinct']:,} distinct tokens,\n{record['answers']:,} of them answers; "
        f"{record['separate']:,} in separate sequences, {record['padded']:,} padded"
    )


def as_record(prepared: Prepared) -> dict[str, Any]:
    return {**asdict(prepared.workload), **asdict(prepared.counts)}
