"""`trueup eval`: several models measured on the same rows, one report.

Each model is loaded once, read and asked, and let go; what it answered and what judges said is in `journal.jsonl`, so
that the same command goes on after an interruption.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trueup.config.methods import stage_kind
from trueup.config.schema import RunConfig
from trueup.data.encode import encode_dataset, run_template
from trueup.data.encoded import EncodedDataset
from trueup.data.report import DataReport
from trueup.errors import DataError
from trueup.models.load import load_tokenizer, pick_device, pick_dtype
from trueup.models.policy import Policy
from trueup.models.reward import RewardModel, load_reward_model
from trueup.recipes.candidates import Candidate, model_identity
from trueup.recipes.evaluation.answers import Asked, answers_of, duel, look_at, scores_of
from trueup.recipes.evaluation.benchmarks import run_tasks
from trueup.recipes.evaluation.groups import by_group, groups_of, sections
from trueup.recipes.evaluation.intervals import Bootstrap
from trueup.recipes.evaluation.likelihood import (
    Preferences,
    Readings,
    preferences,
    read_answers,
    scored_preferences,
    wins,
)
from trueup.recipes.evaluation.preflight import Ready, ready
from trueup.recipes.evaluation.report import EvaluationReport, Measured
from trueup.recipes.evaluation.report_page import report_page
from trueup.recipes.evaluation.subjects import Reference, Subject, subjects_of
from trueup.recipes.journal import Journal
from trueup.recipes.prompts import PromptRows
from trueup.recipes.rankers import Ranker, ScoreRanker
from trueup.training import durable
from trueup.training.run_files import RUN_FILE, finite
from trueup.training.run_lock import RunLock
from trueup.training.signals import sigterm_cleans_up
from trueup.waiting import waiting

log = logging.getLogger("trueup")

REPORT = "eval_report"
ANSWERS_FILE = "eval_answers.jsonl"
JOURNAL_FILE = "journal.jsonl"


def evaluate(cfg: RunConfig) -> EvaluationReport:
    """Measure what a config (of `verb="eval"`) asks for; the report lies in `output_dir`.

    Raises:
        UserError: of the kind that tells who can mend it.
    """
    directory = Path(str(cfg.train.output_dir))
    if (directory / RUN_FILE).exists():
        directory = directory / "eval"  # beside the run's own files, not among them
    journal = Journal(directory / JOURNAL_FILE)
    with ready(cfg, directory, journal) as found:
        directory.mkdir(parents=True, exist_ok=True)
        lock = RunLock(directory)
        lock.acquire()
        try:
            with sigterm_cleans_up(), journal, closing(found):
                return _Evaluation(cfg, directory, found, journal).run()
        finally:
            lock.release()


@dataclass
class _Evaluation:
    """One evaluation under way."""

    cfg: RunConfig
    directory: Path
    found: Ready
    journal: Journal

    def __post_init__(self) -> None:
        cfg = self.cfg
        self.boot = Bootstrap(cfg.evaluate.bootstrap_samples, cfg.train.seed)
        self.measures = set(cfg.evaluate.eval_measures)
        self.data, self.asked = self.found.data, self.found.asked
        self.rows = PromptRows(cfg) if self.data else None
        self.reference = Reference(cfg)
        self.answers: dict[str, list[Candidate | None]] = {}
        self.accounts: dict[str, DataReport] = {}  # model → what became of every row
        self.used_reference = False

    def run(self) -> EvaluationReport:
        ranker = self.found.ranker
        models = [self._measure(subject) for subject in subjects_of(self.cfg)]
        if isinstance(ranker, ScoreRanker):
            for model in models:
                figures, rows = scores_of(self.boot, ranker, self.asked, self.answers[model.name])
                self._add(model, figures, rows, self._asked_rows())
        report = self._report(models)
        if ranker is not None:
            self._duels(report, ranker)
        report.compare(self.boot)
        self._write(report)
        return report

    # --- one model -------------------------------------------------------------------------------

    def _measure(self, subject: Subject) -> Measured:
        """All figures of one model that need no other."""
        cfg = subject.cfg
        if subject.is_endpoint:
            model = Measured(subject.name, {"model": cfg.model.model_name_or_path})
            self._ask(model, subject, None)
            return model
        model = Measured(subject.name, model_identity(cfg))
        if cfg.objective.stage == "rm":
            self._read_scores(model, subject)
            return model
        policy = subject.load()
        if self.measures & {"preference", "perplexity", "divergence"}:
            self._read(model, subject, policy)
        if self.asked:
            self._ask(model, subject, policy)
        if "task" in self.measures:
            model.tasks = run_tasks(cfg, policy, subject.name)
        return model

    def _encode(self, model: Measured, subject: Subject) -> EncodedDataset:
        cfg = subject.cfg
        assert self.data is not None
        template = run_template(cfg, load_tokenizer(cfg.model))
        account = copy.deepcopy(self.data.report)  # each model reads the rows by itself
        dataset = encode_dataset(
            self.found.examples, template, cutoff_len=cfg.data.cutoff_len, truncation=cfg.data.truncation,
            mask_history=cfg.data.mask_history, on_bad_rows=cfg.data.on_bad_rows, report=account,
        )  # fmt: skip
        self.accounts[model.name] = account
        if not len(dataset):
            raise DataError("no row is left to evaluate on", where="eval_dataset", fix="raise cutoff_len")
        model.template = {"name": template.name, "fingerprint": template.fingerprint[:16]}
        model.data_fingerprint = dataset.fingerprint
        return dataset

    def _read(self, model: Measured, subject: Subject, policy: Policy) -> None:
        """What the model makes of the data's answers."""
        dataset, cfg = self._encode(model, subject), subject.cfg
        live = self.reference.of(subject, policy) if self.measures & {"preference", "divergence"} else None
        self.used_reference |= live is not None
        with waiting(f"reading by {subject.name}", len(dataset), "rows") as tell:
            size = cfg.train.per_device_eval_batch_size
            found = read_answers(policy, dataset, size, live, "divergence" in self.measures, tell)
        pairs = stage_kind(cfg) == "pair"
        if pairs and "preference" in self.measures:
            self._prefer(model, preferences(cfg, found), dataset)
        self._likelihood(model, found, dataset, pairs)

    def _likelihood(self, model: Measured, found: Readings, dataset: EncodedDataset, pairs: bool) -> None:
        """Perplexity is of the chosen answers, KL and entropy of all."""
        better = slice(0, None, 2) if pairs else slice(None)
        tokens = found.tokens[better]
        if "perplexity" in self.measures:
            model.figures["perplexity"] = self.boot.ratio(-found.logps[better], tokens, np.exp)
        if "divergence" in self.measures:
            for name, values in (("kl", found.kl), ("entropy", found.entropy)):
                if values is not None:
                    model.figures[name] = self.boot.ratio(_by_row(values, pairs), _by_row(found.tokens, pairs))

    def _read_scores(self, model: Measured, subject: Subject) -> None:
        """A reward model's scores of both answers."""
        cfg = subject.cfg
        dataset = self._encode(model, subject)
        device = pick_device(cfg.model.device)
        reward: RewardModel = load_reward_model(
            cfg.model, str(cfg.model.model_name_or_path), cfg.model.adapter_name_or_path, device,
            pick_dtype(device, cfg.train.bf16, cfg.train.fp16),
        )  # fmt: skip
        self._prefer(model, scored_preferences(reward, dataset, cfg.train.per_device_eval_batch_size), dataset)

    def _prefer(self, model: Measured, found: Preferences, dataset: EncodedDataset) -> None:
        boot, hits = self.boot, found.hits
        figures = {
            "accuracy": boot.share(hits),
            "accuracy_equal_length": boot.length_controlled(hits, found.longer),
            "margin": boot.mean(found.margins),
            "longer_wins": boot.share(wins(found.margins * found.longer)),  # as trainings report it
        }
        rows = {"accuracy": hits, "margin": found.margins}
        if found.loss is not None:
            figures["loss"] = boot.mean(found.loss)
            rows["loss"] = found.loss
        self._add(model, figures, rows, dataset.rows)
        assert self.rows is not None
        groups = groups_of(self.rows, dataset.rows, self.cfg.evaluate.eval_group_by)
        if groups is not None:
            model.groups = by_group(boot, hits, groups) | sections(boot, hits, groups)

    def _ask(self, model: Measured, subject: Subject, policy: Policy | None) -> None:
        """What the model answers."""
        found = answers_of(subject, self.asked, self.journal, policy)
        self.answers[model.name] = found
        figures, rows = look_at(self.boot, self.asked, found, compare=stage_kind(self.cfg) == "chat")
        self._add(model, figures, rows, self._asked_rows())

    def _asked_rows(self) -> list[str]:
        return [asked.question.row for asked in self.asked]

    @staticmethod
    def _add(model: Measured, figures: dict, rows: dict[str, np.ndarray], ids: Sequence[str]) -> None:
        model.figures |= figures
        model.rows |= rows
        model.ids |= dict.fromkeys(rows, ids)

    # --- all models ------------------------------------------------------------------------------

    def _duels(self, report: EvaluationReport, ranker: Ranker) -> None:
        first, *others = report.models
        for other in others if "wins" in self.measures else ():
            report.duels[other.name] = duel(
                self.boot, ranker, self.asked, self.answers[first.name], self.answers[other.name]
            )
        report.judged_by = {**ranker.to_dict(), **ranker.told()}

    def _report(self, models: list[Measured]) -> EvaluationReport:
        cfg, g = self.cfg, self.cfg.generate
        settings: dict[str, Any] = {"seed": cfg.train.seed, "bootstrap draws": self.boot.draws}
        if self.measures & {"preference"}:
            settings["objective"] = (
                f"{cfg.objective.stage}, {cfg.objective.pref_loss}, beta {cfg.objective.pref_beta:g}"
            )
            if cfg.objective.stage == "rm":
                settings["objective"] = "scores of a reward model"
        if templates := dict.fromkeys(model.template.get("name", "") for model in models if model.template):
            settings["template"] = list(templates)
        if self.asked:
            how = f"temperature {g.temperature:g}, at most {g.max_new_tokens} tokens"
            limits = [f"top_p {g.top_p:g}"] * (g.top_p < 1) + [f"top_k {g.top_k}"] * bool(g.top_k)
            settings["answers"] = ", ".join([f"{len(self.asked)} prompts, {how}", *limits])
        data: dict[str, Any] = {"datasets": list(cfg.data.eval_dataset or cfg.data.dataset)}
        if self.data:
            data["rows"] = {name: len(part) for name, part in self.data.eval.items()}
            accounts = list(self.accounts.values()) or [self.data.report]
            data["left_out"] = {
                name: count for name in self.data.report.datasets
                if (count := max(account.datasets[name].num_dropped for account in accounts))
            }  # fmt: skip
        reference = (self.reference.name or "the base without adapters") if self.used_reference else None
        report = EvaluationReport(str(self.directory / f"{REPORT}.html"), models, reference, data, settings)
        for name, count in data.get("left_out", {}).items():
            report.notes.append(f"{count:,} rows of {name} left out: see eval_data_report.json")
        return report

    def _write(self, report: EvaluationReport) -> None:
        if self.asked:
            lines = (_answer_line(i, a, self.answers) for i, a in enumerate(self.asked))
            durable.write_text(
                self.directory / ANSWERS_FILE, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            )
        if self.data:
            account = next(iter(self.accounts.values()), self.data.report)
            durable.write_json(self.directory / "eval_data_report.json", account.to_dict())
        durable.write_json(self.directory / f"{REPORT}.json", finite(report.to_dict()))
        durable.write_text(self.directory / f"{REPORT}.md", report.markdown())
        durable.write_text(self.directory / f"{REPORT}.html", report_page(report))


def _by_row(values: np.ndarray, pairs: bool) -> np.ndarray:
    """Sums of answers → of rows, which are what is drawn."""
    return values[0::2] + values[1::2] if pairs else values


def _answer_line(index: int, asked: Asked, answers: dict[str, list[Candidate | None]]) -> dict[str, Any]:
    """A prompt with every model's answer."""
    found = {name: of[index] for name, of in answers.items()}
    line: dict[str, Any] = {"row": asked.question.row, "prompt": asked.question.to_dicts()}
    if asked.label is not None:
        line["label"] = asked.label
    return line | {"answers": {name: None if a is None else a.text for name, a in found.items()}}
