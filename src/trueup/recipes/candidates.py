"""Who answers which prompts: models of ours and endpoints, each answer with a seed of its own, kept in the journal."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from trueup.config.building import is_url
from trueup.config.schema import RunConfig
from trueup.data.encode import run_template
from trueup.data.encoder import Policy as Lengths
from trueup.data.encoder import encode_examples
from trueup.data.examples import Message, Messages, Prompt, Tools
from trueup.data.load import load_examples_for
from trueup.data.report import DataReport
from trueup.errors import DataError
from trueup.models.hub import resolve_model
from trueup.models.load import hub_access, load_for_inference, load_tokenizer, read_model_config
from trueup.models.policy import Policy
from trueup.models.rope import context_of, fit_rope
from trueup.recipes.collector import sampling_of
from trueup.recipes.journal import Journal, digest
from trueup.recipes.ledger import Ledger
from trueup.rollout.endpoint import Endpoint, Reply, Unanswered, ask_all
from trueup.rollout.engines import Engine
from trueup.waiting import waiting

log = logging.getLogger("trueup")

T = TypeVar("T")
_ENDS = 1 << 20  # bytes of a large file that identify it, from its beginning and its end


@dataclass(frozen=True)
class Question:
    """A prompt to answer. `key` is of its content, so that neither its row nor its neighbours matter."""

    row: str
    key: str
    messages: Messages
    tools: Tools | None

    @classmethod
    def of(cls, prompt: Prompt, system: str | None) -> Question:
        """The prompt, with a system message where it brings none."""
        messages = prompt.messages
        if system and messages[0].role != "system":
            messages = (Message("system", system), *messages)
        return cls(prompt.row, digest([m.to_dict() for m in messages], prompt.tools), messages, prompt.tools)

    def to_dicts(self) -> list[dict[str, Any]]:
        return [message.to_dict() for message in self.messages]


@dataclass(frozen=True)
class Candidate:
    """One answer. `tokens`: as its model counts them; `source`: who gave it, and how it was sampled."""

    text: str
    ended: bool
    tokens: int | None
    source: Mapping[str, Any]


@dataclass
class Losses:
    """Prompts of which nothing comes: for good (by reason), or until another run."""

    dropped: dict[str, str]
    waiting: dict[str, str]

    @classmethod
    def none(cls) -> Losses:
        return cls({}, {})


class Source(Protocol):
    """A model that answers."""

    def draw(self, questions: Sequence[Question], lost: Losses) -> None:
        """Have every answer in the journal, as far as it can be had; `lost` hears of the others."""
        ...

    def candidates(self, question: Question) -> list[Candidate]:
        """The answers to a question that the journal has."""
        ...

    def close(self) -> None:
        """Nothing more will be drawn."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """What identifies it."""
        ...


def read_questions(cfg: RunConfig) -> tuple[list[Question], DataReport, list[str]]:
    """The prompts of a config's datasets, the report on their rows, and the rows that repeat a prompt."""
    data = load_examples_for(cfg, kind="prompt")
    questions: dict[str, Question] = {}
    repeated: dict[str, None] = {}
    for example in data.train:
        assert isinstance(example, Prompt)
        if example.plain:
            raise DataError(
                "this dataset's prompts are raw text, without turns to answer", where=f"row {example.row}",
                fix="drop `formatting: trl` from its entry: the prompts are then what a user says",
            )  # fmt: skip
        question = Question.of(example, cfg.data.default_system)
        if questions.setdefault(question.key, question).row != example.row:
            repeated[example.row] = None
    return list(questions.values()), data.report, list(repeated)


def make_sources(cfg: RunConfig, journal: Journal) -> list[Source]:
    """The models that `sample_from` names, or else the config's own.

    Raises:
        ConfigError, ModelError: one of them cannot be had.
    """
    if not cfg.build.sample_from:
        return [LocalSource(cfg, journal)]
    own = {"adapter_name_or_path": []}
    return [
        EndpointSource(cfg, name, journal) if is_url(name)
        else LocalSource(cfg.replace(model_name_or_path=name, **own), journal)
        for name in cfg.build.sample_from
    ]  # fmt: skip


class LocalSource:
    """A model on this machine, through the engine.

    Answers are drawn in groups that depend on the prompts, their number and `generation_batch_size` alone. A group of
    which the journal lacks something is drawn again as a whole, so that a resumed build repeats the bits.

    `policy`: the config's model, where it is loaded already.
    """

    def __init__(self, cfg: RunConfig, journal: Journal, policy: Policy | None = None) -> None:
        self.policy = policy
        self.cfg, self.journal = cfg.replace(default_system=None), journal  # the questions bring it
        self.tokenizer = load_tokenizer(cfg.model)
        self.template = run_template(self.cfg, self.tokenizer)
        self.num_answers = cfg.online.num_generations or 1
        self.sampling = sampling_of(cfg)
        self.identity = model_identity(cfg) | {"template": self.template.fingerprint[:16]}

    def draw(self, questions: Sequence[Question], lost: Losses) -> None:
        prompts = self._encoded(questions, lost)
        groups = grouped(
            [q for q in questions if q.key in prompts], lambda q: (len(prompts[q.key]), q.key),
            max(1, self.cfg.online.generation_batch_size // self.num_answers),
        )  # fmt: skip
        todo = [g for g in groups if any(key not in self.journal for q in g for key in self._keys(q))]
        if not todo:
            return
        policy = self.policy or load_for_inference(self.cfg.model, self.cfg.train)
        engine = Engine(policy, self.tokenizer, self.template.stop_ids)
        done = 0
        with waiting(f"answers of {self.cfg.model.model_name_or_path}", sum(map(len, todo)), "prompts") as tell:
            for group in todo:
                self._answer(engine, group, [prompts[q.key] for q in group])
                done += len(group)
                tell(done)

    def _answer(self, engine: Engine, group: Sequence[Question], prompts: Sequence[np.ndarray]) -> None:
        seeds = [self._seed(q, i) for q in group for i in range(self.num_answers)]
        for question, drawn in zip(group, engine.sample(prompts, self.sampling, self.num_answers, seeds), strict=True):
            for key, answer in zip(self._keys(question), drawn, strict=True):
                ids = answer.ids[:-1] if answer.ended else answer.ids
                text = self.tokenizer.decode(ids, skip_special_tokens=True)
                if key not in self.journal:
                    self.journal.put(key, {"text": text, "ended": answer.ended, "tokens": len(answer.ids)})

    def candidates(self, question: Question) -> list[Candidate]:
        values = [self.journal.get(key) for key in self._keys(question)]
        return [
            Candidate(
                readable(v["text"]), v["ended"], v["tokens"], {**self._provenance(), "seed": self._seed(question, i)}
            )
            for i, v in enumerate(values)
            if v is not None
        ]

    def close(self) -> None:
        pass

    def to_dict(self) -> dict[str, Any]:
        return self.identity

    def _encoded(self, questions: Sequence[Question], lost: Losses) -> dict[str, np.ndarray]:
        """Token ids of the prompts that leave room for an answer."""
        examples = [Prompt(q.messages, q.row, q.tools) for q in questions]
        dataset, tally = encode_examples(examples, self.template, Lengths(self.cfg.data.cutoff_len))
        keys = {q.row: q.key for q in questions}
        lost.dropped |= {keys[row]: reason for row, reason, _ in tally.dropped}
        found = {keys[example.row]: example.prompt for example in dataset}
        room = self._room()
        lost.dropped |= {key: "no room for an answer" for key, ids in found.items() if len(ids) > room}
        return {key: ids for key, ids in found.items() if 0 < len(ids) <= room}

    def _room(self) -> int:
        access = hub_access(self.cfg.model)
        name, location, starts = resolve_model(
            str(self.cfg.model.model_name_or_path), self.cfg.model.adapter_name_or_path, access
        )
        config = read_model_config(location, self.cfg.model, name)
        fit_rope(config, self.cfg.model, starts, name)
        return context_of(config, 1 << 30) - self.sampling.max_new_tokens

    def _keys(self, question: Question) -> list[str]:
        how = vars(self.sampling)
        return [
            digest("answer", self.identity, how, self.cfg.train.seed, question.key, i) for i in range(self.num_answers)
        ]

    def _seed(self, question: Question, index: int) -> int:
        return seed_of(self.cfg.train.seed, self.identity, question.key, index)

    def _provenance(self) -> dict[str, Any]:
        return {**self.identity, **vars(self.sampling)}


class EndpointSource:
    """A model behind a URL. What it answers to a seed is its own affair; what it has answered is kept."""

    def __init__(self, cfg: RunConfig, name: str, journal: Journal) -> None:
        self.cfg, self.journal = cfg, journal
        build = cfg.build
        self.endpoint = make_endpoint(cfg, name, build.sample_key_env, "sample_from", build.sample_price)
        self.ledger = Ledger(journal, "answers", self.endpoint)
        self.num_answers = cfg.online.num_generations or 1
        g = cfg.generate
        self.fields = {"temperature": g.temperature, "max_tokens": g.max_new_tokens}
        self.fields |= {"top_p": g.top_p} if g.top_p < 1 else {}
        self.fields |= {"top_k": g.top_k} if g.top_k else {}

    def draw(self, questions: Sequence[Question], lost: Losses) -> None:
        todo = [
            (q, i) for q in questions for i, key in enumerate(self._keys(q)) if key not in self.journal
        ]  # fmt: skip
        with waiting(f"answers of {self.endpoint.model}", len(todo), "answers") as tell:
            for done, (task, found) in enumerate(ask_all(todo, self._ask, self.cfg.build.requests_at_once), 1):
                question, index = task
                if isinstance(found, Unanswered):
                    lost.waiting[question.key] = str(found)
                else:
                    tokens = found.completion_tokens or None
                    value = {"text": found.text, "ended": found.ended, "tokens": tokens}
                    self.ledger.put(self._keys(question)[index], value)
                tell(done, self.ledger.in_words())

    def _ask(self, task: tuple[Question, int]) -> Reply:
        question, index = task
        tools = {"tools": list(question.tools)} if question.tools else {}
        fields = {**self.fields, **tools, "seed": self._seed(question, index)}
        return self.endpoint.chat(_spoken(question), lambda reply: reply, **fields)

    def candidates(self, question: Question) -> list[Candidate]:
        values = [self.journal.get(key) for key in self._keys(question)]
        source = {**self.to_dict(), **self.fields}
        return [
            Candidate(readable(v["text"]), v["ended"], v["tokens"], {**source, "seed": self._seed(question, i)})
            for i, v in enumerate(values)
            if v is not None
        ]

    def close(self) -> None:
        self.ledger.close()

    def to_dict(self) -> dict[str, Any]:
        return self.endpoint.identity

    def _keys(self, question: Question) -> list[str]:
        about = "answer", self.endpoint.identity, self.fields, self.cfg.train.seed, question.key
        return [digest(*about, i) for i in range(self.num_answers)]

    def _seed(self, question: Question, index: int) -> int:
        return seed_of(self.cfg.train.seed, self.endpoint.identity, question.key, index) >> 32  # 31 bits


def readable(text: str) -> str:
    """An answer as data can hold it: trimmed, without what no tokenizer takes."""
    return text.encode("utf-8", "replace").decode("utf-8").replace("\0", "").strip()


def make_endpoint(cfg: RunConfig, name: str, key_env: str | None, where: str, price: Sequence[float] = ()) -> Endpoint:
    """The endpoint of a URL#MODEL, as patient as the config says."""
    build = cfg.build
    return Endpoint(
        name, key_env=key_env, seconds=build.request_timeout, tries=build.request_tries,
        options=build.request_options, where=where, price=price,
    )  # fmt: skip


def _spoken(question: Question) -> list[dict[str, Any]]:
    """The messages as endpoints take them: arguments of calls are JSON text there."""
    messages = question.to_dicts()
    for message in messages:
        for number, call in enumerate(message.get("tool_calls", ())):
            function = call["function"] | {"arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)}
            call = {"id": f"call_{number}", "type": "function", **call, "function": function}
            message["tool_calls"][number] = call
    return messages


def grouped(items: Sequence[T], order: Any, size: int) -> list[list[T]]:
    """Items in order, cut into groups: the same ones whatever has been done already."""
    ordered = sorted(items, key=order)
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


def seed_of(*parts: Any) -> int:
    """63 bits that depend on all parts."""
    return int(digest("seed", *parts)[:16], 16) >> 1


def model_identity(cfg: RunConfig) -> dict[str, Any]:
    """What tells a model from another, without loading its weights: its names, and a digest of its files."""
    model = cfg.model
    _, location, adapters = resolve_model(str(model.model_name_or_path), model.adapter_name_or_path, hub_access(model))
    files = [part for directory in (location, *adapters) for part in _of_files(Path(directory))]
    identity: dict[str, Any] = {"model": str(model.model_name_or_path)}
    if model.adapter_name_or_path:
        identity["adapters"] = list(model.adapter_name_or_path)
    if model.model_revision != "main":
        identity["revision"] = model.model_revision
    return identity | ({"files": digest(files)[:16]} if files else {})


def _of_files(directory: Path) -> Iterator[list[Any]]:
    """Name, size and a digest of the files of a model; of large ones, of both their ends."""
    if not directory.is_dir():
        return
    for path in sorted(p for p in directory.iterdir() if p.suffix in (".json", ".safetensors", ".jinja", ".model")):
        if path.name in ("trainer_state.json", "all_results.json", "train_results.json", "eval_results.json"):
            continue
        size = path.stat().st_size
        with open(path, "rb") as file:
            part = hashlib.sha256(file.read(_ENDS))
            file.seek(max(size - _ENDS, 0))
            part.update(file.read(_ENDS))
        yield [path.name, size, part.hexdigest()]
