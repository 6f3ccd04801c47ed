"""`trueup generate`: an answer to every prompt of datasets, as JSON lines.

Answers are drawn in blocks that the prompts alone decide, and are in a journal beside the output as soon as they are
there; the output is written whole at the end, and the journal goes. So no half of a file is taken for all of it, and
the same command goes on after any interruption: a block of which something is missing is drawn again, to the same bits.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from trueup.config.schema import RunConfig
from trueup.data.counts import counted, some_ids
from trueup.data.encode import run_template
from trueup.data.encoder import Policy as Lengths
from trueup.data.encoder import encode_examples
from trueup.data.examples import Prompt
from trueup.data.load import load_examples_for
from trueup.data.report import DataReport, Rows
from trueup.errors import ConfigError, DataError, ResourceError
from trueup.models.load import load_for_inference, load_tokenizer
from trueup.recipes.candidates import Question, model_identity, seed_of
from trueup.recipes.journal import Journal, digest
from trueup.rollout.engines import Answer, Engine, Generation, Limits, Sampling, TooLong
from trueup.training import durable
from trueup.training.signals import sigterm_cleans_up
from trueup.waiting import waiting

log = logging.getLogger("trueup")

_BLOCK = 4  # batches drawn together: what an interruption costs at most, against slots that idle at a block's end

#: A dataset's rows as they are: nothing held out, mixed or streamed.
_PLAIN: dict[str, Any] = {
    "eval_dataset": [], "val_size": 0.0, "do_eval": False, "do_predict": False, "eval_strategy": "no",
    "mix_strategy": "concat", "interleave_probs": [],
}  # fmt: skip


@dataclass
class Generated:
    """What was answered. `found`: answers that an earlier, interrupted run had drawn; `left_out`: why, and which."""

    output: str | None
    rows: int = 0
    answers: int = 0
    found: int = 0
    cut_off: int = 0
    tokens: int = 0
    seconds: float = 0.0
    left_out: dict[str, Rows] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        out = {why: {"count": rows.count, "rows": rows.ids} for why, rows in self.left_out.items()}
        return {**asdict(self), "left_out": out}

    def render(self) -> str:
        cut = f", {self.cut_off:,} cut off" if self.cut_off else ""
        kept = f", {self.found:,} of them from before" if self.found else ""
        lines = [f"{counted(self.answers, 'answer', 'answers')} to {counted(self.rows, 'row', 'rows')}{kept}{cut}"]
        lines += [
            f"{counted(r.count, 'row', 'rows')} left out: {why} ({some_ids(r)})" for why, r in self.left_out.items()
        ]
        if self.tokens:
            lines.append(f"{self.tokens:,} tokens in {self.seconds:.0f} s")
        return "\n".join([*lines, *([f"wrote {self.output}"] if self.output else [])])


def generate(cfg: RunConfig, output: Path | None, force: bool = False) -> tuple[Generated, list[dict[str, Any]]]:
    """Answer every row of the datasets; the lines go to `output` when all are there, or, without one, are returned.

    A line holds `row`, `prompt`, `answer`, `finish_reason` ("stop" or "length"), `tokens`, `logprob` (Σ over the tokens
    of the answer, at temperature 1, without the one that ends it), `seed`, and `sample` where a prompt gets several.

    Raises:
        ConfigError: `output` exists. UserError: from reading the data or the model.
    """
    if output is None:
        return _Batch(cfg, None).run(None)
    if output.exists() and not force:
        raise ConfigError(f"{output} exists already", where="--output", fix="name another file, or add --force")
    output.parent.mkdir(parents=True, exist_ok=True)
    path = output.with_name(f"{output.name}.journal")
    lock = FileLock(output.with_name(f"{output.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ResourceError(f"another process writes {output}", where="--output", fix="wait for it") from None
    try:
        with sigterm_cleans_up(), Journal(path) as journal:
            done, lines = _Batch(cfg, output).run(journal)
        durable.write_text(output, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        path.unlink()
        return done, lines
    except KeyboardInterrupt:
        log.warning("what was answered so far is in %s; the same command goes on from there", path)
        raise
    finally:
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)


@dataclass(frozen=True)
class _Task:
    """One answer to draw."""

    question: Question
    prompt: np.ndarray
    key: str
    seed: int
    sample: int


class _Batch:
    """All prompts of a config, and the model that answers them."""

    def __init__(self, cfg: RunConfig, output: Path | None) -> None:
        self.cfg = cfg.replace(**_PLAIN)
        self.done = Generated(str(output) if output else None)
        self.tokenizer = load_tokenizer(cfg.model)
        self.template = run_template(cfg, self.tokenizer)
        data = load_examples_for(self.cfg, kind="prompt")
        prompts = [example for example in data.train if isinstance(example, Prompt)]
        system = cfg.data.default_system
        self.questions = [Question.of(p, None if p.plain else system) for p in prompts]
        self._account_for(data.report)
        dataset, tally = encode_examples(prompts, self.template, Lengths(cfg.data.cutoff_len))
        self.ids = {example.row: example.prompt for example in dataset}
        for row, reason, _ in tally.dropped:
            self._leave_out(row, reason)
        g = cfg.generate
        self.sampling = Sampling(
            g.temperature, g.top_p, g.top_k, g.repetition_penalty, g.max_new_tokens, logprobs=0
        )  # fmt: skip

    def run(self, journal: Journal | None) -> tuple[Generated, list[dict[str, Any]]]:
        """Draw what the journal lacks; every row's lines, in the order of the data."""
        began = time.monotonic()
        tasks = list(self._tasks())
        if not tasks:
            raise DataError("no row has a prompt that can be answered", where="dataset", expected=", ".join(
                f"{rows.count:,} {why}" for why, rows in self.done.left_out.items()))  # fmt: skip
        unique = list({task.key: task for task in tasks}.values())
        size = _BLOCK * self.cfg.online.generation_batch_size
        blocks = [unique[i : i + size] for i in range(0, len(unique), size)]
        kept = [b for b in blocks if journal is not None and all(task.key in journal for task in b)]
        values = {task.key: journal.get(task.key) for b in kept for task in b} if journal is not None else {}
        self.done.found = sum(task.key in values for task in tasks)
        todo = [b for b in blocks if b[0].key not in values]
        drawn = self._draw(todo, journal) if todo else {}
        values |= drawn
        lines = [self._line(task, values[task.key]) for task in tasks if values[task.key] is not None]
        for row in dict.fromkeys(task.question.row for task in tasks if values[task.key] is None):
            self._leave_out(row, "no room for an answer")
        done = self.done
        done.rows, done.answers = len({line["row"] for line in lines}), len(lines)
        done.cut_off = sum(line["finish_reason"] == "length" for line in lines)
        done.tokens = sum(value["tokens"] for value in drawn.values() if value)
        done.seconds = round(time.monotonic() - began, 3)
        return done, lines

    def _tasks(self) -> Iterator[_Task]:
        cfg = self.cfg
        count = cfg.online.num_generations or 1
        identity = model_identity(cfg) | {"template": self.template.fingerprint[:16]}
        how = {**asdict(self.sampling), "tokens": cfg.generate.token_logprobs,
               "special": cfg.generate.skip_special_tokens}  # fmt: skip
        for question in self.questions:
            prompt = self.ids.get(question.row)
            if prompt is None:
                continue
            if not len(prompt):
                self._leave_out(question.row, "empty prompt")
                continue
            about = identity, how, cfg.train.seed, cfg.data.default_system, question.key
            for i in range(count):
                seed = seed_of(cfg.train.seed, question.key, i)
                yield _Task(question, prompt, digest("generated", *about, i), seed, i)

    def _draw(self, blocks: Sequence[Sequence[_Task]], journal: Journal | None) -> dict[str, Any]:
        """Answers by key; None for a prompt that leaves no room for one."""
        values: dict[str, Any] = {}
        policy = load_for_inference(self.cfg.model, self.cfg.train)
        limits = Limits(self.cfg.online.generation_batch_size, max(map(len, blocks)))
        with (
            Engine(policy, self.tokenizer, self.template.stop_ids, limits) as engine,
            waiting("answering", sum(map(len, blocks)), "answers") as tell,
        ):
            for block in blocks:
                with engine.together():
                    asked = [(task, self._submit(engine, task)) for task in block]
                for task, generation in asked:
                    values[task.key] = None if generation is None else self._value(generation.result())
                    if journal is not None:
                        journal.put(task.key, values[task.key])
                    tell(len(values))
        return values

    def _submit(self, engine: Engine, task: _Task) -> Generation | None:
        try:
            return engine.submit(task.prompt.tolist(), replace(self.sampling, seed=task.seed))
        except TooLong as error:
            log.warning("row %s: %s", task.question.row, error)
            return None

    def _value(self, answer: Answer) -> dict[str, Any]:
        g = self.cfg.generate
        text = answer.text
        if not g.skip_special_tokens:
            text = self.tokenizer.decode(list(answer.ids), skip_special_tokens=False)
        value: dict[str, Any] = {
            "text": text, "finish_reason": answer.finish_reason, "tokens": len(answer.ids),
            "logprob": float(sum(token.logp for token in answer.logps)),
        }  # fmt: skip
        if g.token_logprobs:
            pieces = self.tokenizer.convert_ids_to_tokens([token.id for token in answer.logps])
            value["token_logprobs"] = [
                [piece, token.id, token.logp] for piece, token in zip(pieces, answer.logps, strict=True)
            ]
        return value

    def _line(self, task: _Task, value: dict[str, Any]) -> dict[str, Any]:
        line = {
            "row": task.question.row, "prompt": task.question.to_dicts(), "answer": value["text"],
            "finish_reason": value["finish_reason"], "tokens": value["tokens"], "logprob": value["logprob"],
            "seed": task.seed,
        }  # fmt: skip
        if task.question.tools:
            line["tools"] = list(task.question.tools)
        if (self.cfg.online.num_generations or 1) > 1:
            line["sample"] = task.sample
        return line | ({"token_logprobs": value["token_logprobs"]} if "token_logprobs" in value else {})

    def _account_for(self, report: DataReport) -> None:
        for dataset in report.datasets.values():
            for why, rows in dataset.dropped.items():
                known = self.done.left_out.setdefault(why, Rows())
                for row in rows.ids:
                    known.add(row)
                known.count += rows.count - len(rows.ids)  # a report keeps the first ids only

    def _leave_out(self, row: str, why: str) -> None:
        self.done.left_out.setdefault(why, Rows()).add(row)
