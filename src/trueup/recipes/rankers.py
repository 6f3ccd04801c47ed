"""Who ranks the answers to a prompt: a judge, scores (rules, functions, a reward model), or log-probabilities.

A ranker puts all it finds out into the journal, in groups that do not depend on what is there already, and then reads
each contest's scores from it. A contest without all of its scores waits for another run.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from trueup.config.building import has_rules, is_url
from trueup.config.schema import RunConfig
from trueup.data.encode import run_template
from trueup.data.encoded import Answer, Encoded
from trueup.data.examples import Message
from trueup.data.forest import build_forest
from trueup.errors import ConfigError
from trueup.models.load import load_for_inference, load_tokenizer, pick_device, pick_dtype
from trueup.models.logprobs import sum_by_sequence
from trueup.models.tokenizer import UNCHANGED
from trueup.recipes.candidates import (
    Candidate,
    Question,
    grouped,
    make_endpoint,
    model_identity,
    seed_of,
)
from trueup.recipes.journal import Journal, digest
from trueup.recipes.judges import Judges, check_files, load_judges
from trueup.recipes.ledger import Ledger
from trueup.recipes.prompts import PromptRows
from trueup.recipes.verdicts import (
    RUBRIC,
    WORDING,
    ask_pair,
    ask_score,
    read_score,
    read_verdict,
    win_shares,
)
from trueup.rollout.endpoint import Endpoint, Unanswered, ask_all
from trueup.rollout.engines import Engine, Sampling
from trueup.rollout.rewards import Answered, Workers
from trueup.rollout.rules import Rules, is_sql
from trueup.rollout.worker import file_and_function
from trueup.waiting import waiting

_JUNK_TEMPERATURE = 0.7  # of a judge that is asked again: at 0 it would say the same
_LOCAL_TRIES = 3


@dataclass(frozen=True)
class Contest:
    """A prompt with answers that differ."""

    question: Question
    answers: tuple[Candidate, ...]


@dataclass(frozen=True)
class Ranked:
    """A score for each answer, higher is better; None where nobody had an opinion. `why`: what is missing, if so."""

    scores: tuple[float | None, ...] = ()
    why: str | None = None


class Ranker(Protocol):
    """Who says which answer is better."""

    def find_out(self, contests: Sequence[Contest]) -> None:
        """Have everything in the journal, as far as it can be had."""
        ...

    def ranked(self, contest: Contest) -> Ranked:
        """What the journal has on a contest."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Who it is, for the provenance of a pair."""
        ...

    def told(self) -> dict[str, Any]:
        """What the report says of it."""
        ...

    def close(self) -> None: ...


def make_ranker(cfg: RunConfig, journal: Journal) -> Ranker:
    """The ranker that a config asks for.

    Raises:
        ConfigError, ModelError: a file, a function or a model is not there.
    """
    if cfg.build.rank_by == "judge":
        return JudgeRanker(cfg, journal)
    return LogpRanker(cfg, journal) if cfg.build.rank_by == "logps" else ScoreRanker(cfg, journal)


# --- rules, functions, a reward model --------------------------------------------------------------


class ScoreRanker:
    """Points of rules, plus the weighted sum of functions and a reward model."""

    def __init__(self, cfg: RunConfig, journal: Journal) -> None:
        check_files(cfg)
        _check_functions(cfg)
        self.cfg, self.journal = cfg, journal
        self.rules = rules_of(cfg)
        self.rows = PromptRows(cfg)
        self.rewarded = bool(cfg.online.reward_funcs or cfg.online.reward_model)
        self._judges: Judges | None = None
        self._identity = {
            "functions": [_of_function(name) for name in cfg.online.reward_funcs],
            "weights": cfg.online.reward_weights,
            "model": _of_reward_model(cfg),
        }

    def find_out(self, contests: Sequence[Contest]) -> None:
        if not self.rewarded:
            return
        todo = [c for c in contests if any(key not in self.journal for key in self._keys(c))]
        with waiting("scoring", len(todo), "prompts") as tell:
            for done, contest in enumerate(todo, 1):  # each by itself: a neighbour could change a reward's last bits
                judges = self._loaded()
                scores = judges.score([self._answered(contest.question, answer) for answer in contest.answers])
                for key, row, score in zip(self._keys(contest), scores, judges.combine(scores), strict=True):
                    if np.isfinite(score) and key not in self.journal:
                        each = {n: float(v) for n, v in zip(judges.names, row, strict=True) if np.isfinite(v)}
                        self.journal.put(key, {"score": float(score), "each": each})
                tell(done)

    def ranked(self, contest: Contest) -> Ranked:
        points = self.rules.score([a.text for a in contest.answers])
        if not self.rewarded:
            return Ranked(tuple(points))
        found = [self.journal.get(key) for key in self._keys(contest)]
        return Ranked(tuple(None if f is None else p + f["score"] for p, f in zip(points, found, strict=True)))

    def each(self, contest: Contest) -> list[dict[str, float]]:
        """What each reward gave each answer, by its name; nothing of rules."""
        found = (
            [self.journal.get(key) for key in self._keys(contest)] if self.rewarded else [None] * len(contest.answers)
        )
        return [{} if f is None else f["each"] for f in found]

    def to_dict(self) -> dict[str, Any]:
        rules = {name: value for name, value in vars(self.rules).items() if value and name in Rules.__annotations__}
        online = self.cfg.online
        who = {"rules": rules, "reward_funcs": online.reward_funcs, "reward_model": online.reward_model}
        return {"by": "scores", **{name: value for name, value in who.items() if value}}

    def told(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        if self._judges is not None:
            self._judges.close()

    def _keys(self, contest: Contest) -> list[str]:
        columns = digest(json.loads(json.dumps(dict(self.rows.columns(contest.question.row)), default=str)))
        about = "score", self._identity, contest.question.key, columns
        return [digest(*about, answer.text) for answer in contest.answers]

    def _answered(self, question: Question, answer: Candidate) -> Answered:
        messages = (*question.messages, Message("assistant", answer.text))
        whole = "\n\n".join(f"{m.role}: {m.content}" for m in messages)
        return Answered(
            question.row, question.messages[-1].content, answer.text, whole, self.rows.columns(question.row)
        )  # fmt: skip

    def _loaded(self) -> Judges:
        """Functions and models, once something has to be scored."""
        if self._judges is None:
            cfg = self.cfg
            named = cfg if cfg.model.model_name_or_path else cfg.replace(model_name_or_path=cfg.online.reward_model)
            model = cfg.online.reward_model and not is_url(cfg.online.reward_model)
            template = run_template(named, load_tokenizer(named.model)) if model else None
            device = pick_device(cfg.model.device)
            dtype = pick_dtype(device, cfg.train.bf16, cfg.train.fp16)
            self._judges = load_judges(cfg, template, self.rows, device, dtype)  # type: ignore[arg-type]
        return self._judges


def rules_of(cfg: RunConfig) -> Rules:
    """The rules of a config. Raises ConfigError for a schema that does not run."""
    build = cfg.build
    schema = _text_of(build.rule_sql_schema, "rule_sql_schema")
    rules = Rules(
        build.rule_min_chars, build.rule_max_chars, tuple(build.rule_keywords), tuple(build.rule_forbidden),
        tuple(build.rule_regex), tuple(build.rule_not_regex), build.rule_format, schema,
    )  # fmt: skip
    assert bool(rules) == has_rules(cfg)
    if schema is not None:
        try:
            is_sql("SELECT 1", schema)
        except Exception as error:
            raise ConfigError(f"the schema does not run: {error}", where="rule_sql_schema") from error
    return rules


def _check_functions(cfg: RunConfig) -> None:
    """Whether the functions are there; seen before anything is answered."""
    workers = Workers(cfg.online.reward_timeout)
    try:
        for name in cfg.online.reward_funcs:
            workers.check(name, "reward_funcs")
    finally:
        workers.close()


def _of_function(name: str) -> list[str]:
    """A function's name, and a digest of its file."""
    path = Path(file_and_function(name)[0])
    return [name, hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""]


def _of_reward_model(cfg: RunConfig) -> Any:
    name = cfg.online.reward_model
    if not name or is_url(name):
        return name
    return model_identity(cfg.replace(model_name_or_path=name, adapter_name_or_path=cfg.online.reward_model_adapters))


# --- log-probabilities ------------------------------------------------------------------------------


class LogpRanker:
    """Answers by what models make of them: Σ log π − Σ log π_ref with `ref_model`, else the mean log π of a token.

    The first is the reward that DPO gives a policy by its reference (arXiv 2305.18290, eq. 5, without beta).
    """

    def __init__(self, cfg: RunConfig, journal: Journal) -> None:
        self.cfg, self.journal = cfg.replace(default_system=None), journal
        names = cfg.objective.ref_model, cfg.objective.ref_model_adapters
        self.models = [self.cfg]
        if names[0]:
            self.models.append(self.cfg.replace(model_name_or_path=names[0], adapter_name_or_path=names[1]))
        self.template = run_template(self.cfg, load_tokenizer(cfg.model))
        self._identities = [model_identity(m) | {"template": self.template.fingerprint[:16]} for m in self.models]

    def find_out(self, contests: Sequence[Contest]) -> None:
        ordered = sorted(contests, key=lambda c: c.question.key)
        for model, identity in zip(self.models, self._identities, strict=True):
            todo = [c for c in ordered if any(key not in self.journal for key in self._keys(identity, c))]
            if not todo:
                continue
            policy = load_for_inference(model.model, model.train)
            with waiting(f"log-probabilities of {identity['model']}", len(todo), "prompts") as tell:
                for done, contest in enumerate(todo, 1):
                    forest = build_forest([self._encoded(contest)])
                    with torch.no_grad():
                        logps = policy.token_logps(forest).cpu()
                    sums = sum_by_sequence(logps, forest.owner, forest.num_sequences).tolist()
                    counts = forest.owner.bincount(minlength=forest.num_sequences).tolist()
                    for key, total, tokens in zip(self._keys(identity, contest), sums, counts, strict=True):
                        if key not in self.journal:
                            self.journal.put(key, {"logp": total, "tokens": tokens})
                    tell(done)
            del policy

    def ranked(self, contest: Contest) -> Ranked:
        found = [[self.journal.get(key) for key in self._keys(i, contest)] for i in self._identities]
        if any(value is None for values in found for value in values):
            return Ranked(why="no log-probabilities")
        if len(found) == 1:
            return Ranked(tuple(v["logp"] / max(v["tokens"], 1) for v in found[0]))
        return Ranked(tuple(own["logp"] - ref["logp"] for own, ref in zip(*found, strict=True)))

    def to_dict(self) -> dict[str, Any]:
        who = dict(zip(("model", "reference"), self._identities, strict=False))
        return {"by": "logps", **who}

    def told(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass

    def _keys(self, identity: dict[str, Any], contest: Contest) -> list[str]:
        return [digest("logp", identity, contest.question.key, answer.text) for answer in contest.answers]

    def _encoded(self, contest: Contest) -> Encoded:
        """Every answer with the token that ends it, as a training would see it."""
        q = contest.question
        prompt = np.asarray(self.template.encode_prompt(q.messages, q.tools), dtype=np.int32)
        answers = [
            Answer(*self.template.encode_answer(q.messages, (Message("assistant", a.text),), q.tools))
            for a in contest.answers
        ]
        return Encoded(q.row, prompt, tuple(answers))


# --- a judge ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """One thing to ask: about one answer, or which of two is better."""

    contest: Contest
    shown: tuple[int, ...]
    key: str


@dataclass
class JudgeRanker:
    """A strong model that compares every two answers in both orders, or gives each a score."""

    cfg: RunConfig
    journal: Journal
    failed: dict[str, str] = field(default_factory=dict)  # key of a task → why there is no reply
    by_place: int = 0  # comparisons in which the first, or the second, won in both orders
    compared: int = 0

    def __post_init__(self) -> None:
        build = self.cfg.build
        self.rubric = _text_of(build.judge_rubric, "judge_rubric") or RUBRIC
        self.pairwise = build.judge_mode == "pairs"
        self.read = read_verdict if self.pairwise else read_score
        self.name = str(build.judge_model)
        self.endpoint: Endpoint | None = None
        if is_url(self.name):
            self.endpoint = make_endpoint(self.cfg, self.name, build.judge_key_env, "judge_model", build.judge_price)
            self.ledger = Ledger(self.journal, "judge", self.endpoint)
            self.identity = self.endpoint.identity
        else:
            self.local = self.cfg.replace(
                model_name_or_path=self.name, adapter_name_or_path=[], default_system=None, template=None, **UNCHANGED
            )
            self.identity = model_identity(self.local)

    def find_out(self, contests: Sequence[Contest]) -> None:
        tasks = [task for contest in contests for task in self._tasks(contest)]
        if self.endpoint is not None:
            self._ask_endpoint([task for task in tasks if task.key not in self.journal])
        else:
            self._ask_local(tasks)

    def ranked(self, contest: Contest) -> Ranked:
        tasks = self._tasks(contest)
        if missing := [task for task in tasks if task.key not in self.journal]:
            return Ranked(why=self.failed.get(missing[0].key, "not asked yet"))
        if not self.pairwise:
            return Ranked(tuple(self.journal.get(task.key)["score"] for task in tasks))
        said = {task.shown: self.journal.get(task.key)["better"] for task in tasks}
        verdicts = [(i, j, said[i, j], said[j, i]) for i, j in said if i < j]
        shares, by_place = win_shares(len(contest.answers), verdicts)
        self.compared += len(verdicts)
        self.by_place += by_place
        return Ranked(tuple(shares))

    def to_dict(self) -> dict[str, Any]:
        return {"by": "judge", **self.identity, "mode": self.cfg.build.judge_mode, "rubric": digest(self.rubric)}

    def told(self) -> dict[str, Any]:
        told: dict[str, Any] = {"rubric": digest(self.rubric), "mode": self.cfg.build.judge_mode}
        if self.pairwise:
            told |= {"comparisons": self.compared, "decided_by_place": self.by_place}
        return told | ({"spent": self.ledger.to_dict()} if self.endpoint else {})

    def close(self) -> None:
        if self.endpoint is not None:
            self.ledger.close()

    def _tasks(self, contest: Contest) -> list[_Task]:
        count = len(contest.answers)
        shown = itertools.permutations(range(count), 2) if self.pairwise else ((i,) for i in range(count))
        about = "verdict", self.identity, WORDING, self.rubric, self.cfg.build.judge_max_tokens, contest.question.key
        return [_Task(contest, s, digest(*about, [contest.answers[i].text for i in s])) for s in shown]

    def _messages(self, task: _Task) -> list[dict[str, str]]:
        ask = ask_pair if self.pairwise else ask_score
        texts = [task.contest.answers[i].text for i in task.shown]
        return ask(self.rubric, task.contest.question.messages, *texts)

    def _ask_endpoint(self, tasks: Sequence[_Task]) -> None:
        endpoint = self.endpoint
        assert endpoint is not None

        def ask(task: _Task) -> dict[str, Any]:
            return endpoint.chat(
                self._messages(task), lambda reply: self.read(reply.text), {"temperature": _JUNK_TEMPERATURE},
                temperature=0.0, max_tokens=self.cfg.build.judge_max_tokens,
            )  # fmt: skip

        with waiting(f"judging by {endpoint.model}", len(tasks), "replies") as tell:
            for done, (task, found) in enumerate(ask_all(tasks, ask, self.cfg.build.requests_at_once), 1):
                if isinstance(found, Unanswered):
                    self.failed[task.key] = str(found)
                else:
                    self.ledger.put(task.key, found)
                tell(done, self.ledger.in_words())

    def _ask_local(self, tasks: Sequence[_Task]) -> None:
        """Groups whole, as `LocalSource` draws them; what cannot be read is drawn again, with chance and a seed."""
        tokenizer = load_tokenizer(self.local.model)
        template = run_template(self.local, tokenizer)
        spoken = {t.key: template.encode_prompt([Message(**m) for m in self._messages(t)]) for t in tasks}
        groups = grouped(tasks, lambda t: (len(spoken[t.key]), t.key), self.cfg.online.generation_batch_size)
        todo = [g for g in groups if any(task.key not in self.journal for task in g)]
        if not todo:
            return
        engine = Engine(load_for_inference(self.local.model, self.local.train), tokenizer, template.stop_ids)
        done = 0
        with waiting(f"judging by {self.name}", sum(map(len, todo)), "replies") as tell:
            for group in todo:
                for key, value in self._local_replies(engine, group, spoken).items():
                    if key not in self.journal:
                        self.journal.put(key, value)
                done += len(group)
                tell(done)

    def _local_replies(self, engine: Engine, group: Sequence[_Task], spoken: dict[str, list[int]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for attempt in range(_LOCAL_TRIES):
            left = [task.key for task in group if task.key not in found]
            if not left:
                break
            sampling = Sampling(_JUNK_TEMPERATURE if attempt else 0.0, max_new_tokens=self.cfg.build.judge_max_tokens)
            seeds = [seed_of(self.cfg.train.seed, key, attempt) for key in left]
            for key, (answer,) in zip(left, engine.sample([spoken[k] for k in left], sampling, 1, seeds), strict=True):
                text = engine.tokenizer.decode(answer.ids, skip_special_tokens=True)
                try:
                    found[key] = self.read(text)
                    self.failed.pop(key, None)
                except ValueError as junk:
                    self.failed[key] = str(junk)
        return found


def check_texts(cfg: RunConfig) -> None:
    """Read the files that rankers will need, before there is anything to rank. Raises ConfigError."""
    for key in ("rule_sql_schema", "judge_rubric"):
        _text_of(getattr(cfg.build, key), key)


def _text_of(path: str | None, key: str) -> str | None:
    """The text of a file that a key names."""
    if path is None:
        return None
    try:
        return Path(path).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", where=key, fix="name a text file") from error
