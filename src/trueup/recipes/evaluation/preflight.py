"""What would end an evaluation later, looked for before any weights load, and told at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from trueup.config.methods import stage_kind
from trueup.config.schema import RunConfig
from trueup.data.encode import run_template
from trueup.data.examples import Example
from trueup.data.load import LoadedData, load_examples_for
from trueup.errors import ConfigError, DataError, Problem, UserError
from trueup.models.load import load_tokenizer, read_model_config
from trueup.recipes.candidates import make_endpoint
from trueup.recipes.evaluation.answers import Asked, prompts_of
from trueup.recipes.evaluation.benchmarks import check_tasks
from trueup.recipes.evaluation.subjects import MODELS, Reference, Subject, located, require_reference, subjects_of
from trueup.recipes.journal import Journal
from trueup.recipes.rankers import Ranker, make_ranker


@dataclass
class Ready:
    """All that an evaluation needs but weights.

    Attributes:
        data, examples: the rows, as they were loaded and one after another; none where only tasks are asked.
        asked: prompts to answer. ranker: who says what answers are worth.
    """

    data: LoadedData | None = None
    examples: list[Example] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    ranker: Ranker | None = None

    def close(self) -> None:
        """Let the judge go. It writes down what it has spent, so this comes before the journal is closed."""
        if self.ranker is not None:
            self.ranker.close()
            self.ranker = None


@contextmanager
def ready(cfg: RunConfig, directory: Path, journal: Journal) -> Iterator[Ready]:
    """The rows, prompts and judges of an evaluation whose models, tasks and references can be had.

    Raises:
        UserError: everything that is wrong, of the kind of the first of it.
    """
    faults, found = _Faults(), Ready()
    subjects = subjects_of(cfg)
    with faults.apart():
        if directory.is_file():
            raise ConfigError(f"{directory} is a file", where="output_dir", expected="a directory")
    whole = [subject for subject in subjects if faults.holds(_check_model, subject)]
    if set(cfg.evaluate.eval_measures) & {"preference", "divergence"} and cfg.objective.stage != "rm":
        reference = Reference(cfg)
        if faults.holds(reference.check):
            for subject in whole:
                faults.holds(_check_reference, cfg, reference, subject)
    with faults.apart():
        _load(cfg, found)
    if cfg.evaluate.task:
        faults.holds(check_tasks, cfg)
    if cfg.build.rank_by and set(cfg.evaluate.eval_measures) & {"answers", "wins"}:
        with faults.apart():
            found.ranker = make_ranker(cfg, journal)
    try:
        faults.tell()
        yield found
    finally:
        found.close()


def _load(cfg: RunConfig, found: Ready) -> None:
    if not (cfg.data.dataset or cfg.data.eval_dataset):
        return
    kind = "pair" if cfg.objective.stage == "rm" else stage_kind(cfg)
    found.data = load_examples_for(cfg, kind=kind)  # type: ignore[arg-type]
    found.examples = [example for part in found.data.eval.values() for example in part]
    if not found.examples:
        raise DataError("no row is left to evaluate on", where="eval_dataset")
    if set(cfg.evaluate.eval_measures) & {"answers", "wins"}:
        found.asked = prompts_of(found.examples, cfg.evaluate.eval_prompts, cfg.data.default_system)
        if not found.asked:
            raise DataError(
                "no row has a prompt to answer", where="eval_dataset",
                fix="set eval_measures without answers and wins, or give chats, pairs or prompts",
            )  # fmt: skip


def _check_model(subject: Subject) -> None:
    """Whether its files, or its endpoint's key, are there."""
    cfg = subject.cfg
    if subject.is_endpoint:
        make_endpoint(cfg, str(cfg.model.model_name_or_path), cfg.build.sample_key_env, MODELS)
        return
    name, location, _ = located(cfg, subject.key)
    read_model_config(location, cfg.model, name, subject.key)
    if cfg.evaluate.eval_measures != ["task"]:
        run_template(cfg, load_tokenizer(cfg.model))


def _check_reference(cfg: RunConfig, reference: Reference, subject: Subject) -> None:
    exists = not subject.is_endpoint and reference.exists_for(subject)
    if "preference" in cfg.evaluate.eval_measures:
        require_reference(cfg, exists, subject)


class _Faults:
    """Problems of parts that do not need each other."""

    def __init__(self) -> None:
        self.first: UserError | None = None
        self.problems: list[Problem] = []

    @contextmanager
    def apart(self) -> Iterator[None]:
        """A part whose failure leaves the others to be looked at."""
        try:
            yield
        except UserError as error:
            self.first = self.first or error
            self.problems += error.problems

    def holds(self, check, *about) -> bool:
        """Whether a check found nothing."""
        before = len(self.problems)
        with self.apart():
            check(*about)
        return len(self.problems) == before

    def tell(self) -> None:
        if self.first is not None:
            raise type(self.first)(list(dict.fromkeys(self.problems)))
