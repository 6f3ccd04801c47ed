"""`trueup data build`: prompts in, preference pairs out. Models answer, a ranker ranks, pairs are chosen and written.

Everything found out is in `journal.jsonl` at once; the result is made from it, whole, at the end. So the same command
goes on after any interruption, and asks again for what could not be had the last time.
"""

from __future__ import annotations

import json
import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trueup import __version__
from trueup.config.schema import REDACTED, SECRETS, RunConfig
from trueup.data.register import check_name, enter
from trueup.data.report import DataReport, Rows
from trueup.errors import ConfigError, ResourceError
from trueup.recipes.candidates import EndpointSource, Losses, Question, Source, make_sources, read_questions
from trueup.recipes.journal import Journal
from trueup.recipes.pairing import ENTRIES, Row, Scored, choose, differing, lengths_of
from trueup.recipes.rankers import Contest, Ranker, check_texts, make_ranker
from trueup.rollout.endpoint import money
from trueup.training import durable
from trueup.training.run_files import RUN_FILE
from trueup.training.run_lock import RunLock
from trueup.training.signals import sigterm_cleans_up

log = logging.getLogger("trueup")

JOURNAL_FILE = "journal.jsonl"
REPORT_FILE = "build_report.json"
_LONGER = 1.5  # chosen over rejected, in characters, from which a training is likely to learn length


@dataclass
class BuildReport:
    """What became of every prompt: read = kept + dropped + waiting, at any time.

    `waiting`: reason → {row: what was last said}; another run of the same command tries them again.
    """

    output: str
    format: str
    read: int = 0
    kept: int = 0
    rows: int = 0
    dropped: dict[str, Rows] = field(default_factory=lambda: defaultdict(Rows))
    waiting: dict[str, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))
    answers: dict[str, int] = field(default_factory=dict)
    lengths: dict[str, float] = field(default_factory=dict)
    ranked_by: dict[str, Any] = field(default_factory=dict)
    spent: dict[str, Any] = field(default_factory=dict)
    registered: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether nothing waits for another run."""
        return not self.waiting

    @property
    def reasons(self) -> dict[str, int]:
        """How many prompts gave nothing, by reason."""
        return {why: r.count for why, r in self.dropped.items()} | {why: len(r) for why, r in self.waiting.items()}

    def to_dict(self) -> dict[str, Any]:
        return {
            "output": self.output,
            "format": self.format,
            "rows": self.rows,
            "prompts": {
                "read": self.read,
                "kept": self.kept,
                "dropped": {why: {"count": rows.count, "rows": rows.ids} for why, rows in sorted(self.dropped.items())},
                "waiting": {why: {"count": len(rows), "rows": rows} for why, rows in sorted(self.waiting.items())},
            },
            "complete": self.complete,
            "answers": self.answers,
            "mean_chars": self.lengths,
            "ranked_by": self.ranked_by,
            "registered": self.registered,
            "settings": self.settings,
            "trueup": __version__,
            "spent": self.spent,
        }

    def render(self) -> str:
        reasons = Counter({why: rows.count for why, rows in self.dropped.items()})
        waiting = {why: len(rows) for why, rows in self.waiting.items()}
        lines = [
            f"prompts   {self.read:,} read = {self.kept:,} kept + {sum(reasons.values()):,} dropped"
            + (f" + {sum(waiting.values()):,} waiting" if waiting else ""),
            *(f"          {count:,} dropped: {why}" for why, count in reasons.most_common()),
            *(f"          {count:,} waiting: {why}" for why, count in waiting.items()),
            f"answers   {self.answers['drawn']:,} drawn, {self.answers['differing']:,} that differ, "
            f"{self.answers['cut_off']:,} cut off",
        ]
        if self.lengths:
            lines.append(f"length    {self.lengths['chosen']:.0f} characters chosen, "
                         f"{self.lengths['rejected']:.0f} rejected (mean)")  # fmt: skip
        if "comparisons" in self.ranked_by:
            lines.append(f"judge     {self.ranked_by['comparisons']:,} comparisons in both orders, "
                         f"{self.ranked_by['decided_by_place']:,} decided by place: ties")  # fmt: skip
        lines += [
            f"cost      {who}: {s['requests']:,} requests ({s['retries']:,} again), {s['prompt_tokens']:,} tokens in, "
            f"{s['completion_tokens']:,} out{_price(s.get('cost'))}{_now(s)}"
            for who, s in self.spent.items()
        ]
        lines.append(f"wrote     {self.rows:,} {self.format.replace('_', ' ')} to {self.output}")
        return "\n".join([*lines, *([f"          registered as {self.registered}"] if self.registered else [])])


def build(cfg: RunConfig) -> BuildReport:
    """Build preference data as a config (of `verb="build"`) says; the files lie in `output_dir`.

    Raises:
        UserError: of the kind that tells who can mend it. What was found out until then is kept.
    """
    directory = Path(str(cfg.train.output_dir))
    check_directory(directory)
    check_texts(cfg)
    output = directory / f"{cfg.build.build_format}.jsonl"
    if cfg.build.register_as:
        check_name(cfg.build.register_as, output, cfg.data.dataset_dir, "register_as")  # before any work
    questions, data, repeated = read_questions(cfg)
    directory.mkdir(parents=True, exist_ok=True)
    lock = RunLock(directory)
    lock.acquire()
    try:
        with sigterm_cleans_up(), Journal(directory / JOURNAL_FILE) as journal:
            return _build(cfg, output, journal, questions, data, repeated)
    except KeyboardInterrupt:
        log.warning("what was found out so far is in %s; the same command goes on from there", directory)
        raise
    finally:
        lock.release()


def _build(
    cfg: RunConfig,
    output: Path,
    journal: Journal,
    questions: Sequence[Question],
    data: DataReport,
    repeated: Sequence[str],
) -> BuildReport:
    sources = make_sources(cfg, journal)
    ranker = make_ranker(cfg, journal)
    report = BuildReport(str(output), cfg.build.build_format, settings=_settings(cfg))
    _account_for_rows(report, data, repeated)
    try:
        lost = Losses.none()
        for source in sources:
            source.draw([q for q in questions if q.key not in lost.dropped], lost)
        contests = _contests(cfg, questions, sources, lost, report)
        ranker.find_out(contests)
        rows = _rows(cfg, contests, ranker, report)
    finally:
        for source in sources:
            source.close()
        ranker.close()
    report.rows, report.lengths = len(rows), lengths_of(rows)
    report.ranked_by = {**ranker.to_dict(), **ranker.told()}
    report.spent = _spent(sources, report.ranked_by.pop("spent", None))
    assert report.read == report.kept + sum(report.reasons.values())
    durable.write_text(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    if (name := cfg.build.register_as) and rows:
        entry = ENTRIES[cfg.build.build_format]
        report.registered = f"{name} in {enter(name, output, entry, cfg.data.dataset_dir, 'register_as')}"
    durable.write_json(output.with_name(REPORT_FILE), report.to_dict())
    _tell(report)
    return report


def check_directory(directory: Path) -> None:
    """Whether a build may use a directory: a new one, or an earlier build's. Raises ConfigError."""
    if directory.is_file():
        raise ConfigError(f"{directory} is a file", where="output_dir", expected="a directory")
    if (directory / RUN_FILE).exists() or list(directory.glob("*.safetensors")):
        raise ConfigError(
            f"{directory} holds a model or a training run", where="output_dir", fix="name another directory"
        )


def _account_for_rows(report: BuildReport, data: DataReport, repeated: Sequence[str]) -> None:
    """Rows that gave no prompt of their own."""
    for dataset in data.datasets.values():
        report.read += dataset.read
        for why, rows in dataset.dropped.items():
            for row in rows.ids:
                report.dropped[why].add(row)
            report.dropped[why].count += rows.count - len(rows.ids)  # a report keeps the first ids only
    for row in repeated:
        report.dropped["repeated prompt"].add(row)


def _contests(
    cfg: RunConfig, questions: Sequence[Question], sources: Sequence[Source], lost: Losses, report: BuildReport
) -> list[Contest]:
    """Prompts with at least two answers that differ; the others are accounted for."""
    contests, count = [], Counter(drawn=0, differing=0, cut_off=0)
    for question in questions:
        if why := lost.dropped.get(question.key):
            report.dropped[why].add(question.row)
            continue
        if why := lost.waiting.get(question.key):
            report.waiting["no answer"][question.row] = why
            continue
        drawn = [answer for source in sources for answer in source.candidates(question)]
        count["drawn"] += len(drawn)
        count["cut_off"] += sum(not answer.ended for answer in drawn)
        if cfg.online.mask_truncated_completions:
            drawn = [answer for answer in drawn if answer.ended]
        answers = differing(drawn)
        count["differing"] += len(answers)
        if len(answers) < 2:
            report.dropped["no two answers that differ"].add(question.row)
        else:
            contests.append(Contest(question, tuple(answers)))
    report.answers = dict(count)
    return contests


def _rows(cfg: RunConfig, contests: Sequence[Contest], ranker: Ranker, report: BuildReport) -> list[Row]:
    """The rows to write, in the order of the prompts."""
    rows: list[Row] = []
    who = ranker.to_dict()
    for contest in contests:
        row = contest.question.row
        ranked = ranker.ranked(contest)
        if ranked.why is not None:
            report.waiting["judge failed" if cfg.build.rank_by == "judge" else "not ranked"][row] = ranked.why
            continue
        scored = [
            Scored(answer, score)
            for answer, score in zip(contest.answers, ranked.scores, strict=True)
            if score is not None
        ]
        if len(scored) < 2:
            report.dropped["fewer than two answers with a score"].add(row)
            continue
        chosen = choose(contest.question, scored, cfg.build, who)
        if chosen.reason:
            report.dropped[chosen.reason].add(row)
        else:
            report.kept += 1
            rows += chosen.rows
    return rows


def _price(cost: float | None) -> str:
    return "" if cost is None else f": {money(cost)}"


def _now(spent: dict[str, Any]) -> str:
    """What of it this run asked, if earlier ones did too."""
    now = spent["this_run"]
    if now["requests"] == spent["requests"]:
        return ""
    return f"; of these {now['requests']:,} requests in this run{_price(now.get('cost'))}"


def _spent(sources: Sequence[Source], judge: dict[str, Any] | None) -> dict[str, Any]:
    """What the endpoints were asked, by their names."""
    spent = {s.endpoint.model: s.ledger.to_dict() for s in sources if isinstance(s, EndpointSource)}
    return spent | ({"judge": judge} if judge else {})


def _settings(cfg: RunConfig) -> Mapping[str, Any]:
    return {key: REDACTED if key in SECRETS and cfg[key] else cfg[key] for key in sorted(cfg.explicit)}


def _tell(report: BuildReport) -> None:
    """What a user should do about the result."""
    if not report.complete:
        why = next(said for rows in report.waiting.values() for said in rows.values())
        count = sum(map(len, report.waiting.values()))
        log.warning("%d prompts wait: run the same command again to try them (the first: %s)", count, why)
    if not report.rows:
        raise ResourceError(
            "no prompt gave a row; what was found out is kept", where=report.output,
            expected="; ".join(f"{count:,} {why}" for why, count in report.reasons.items()), fix=_way_out(report),
        )  # fmt: skip
    chosen, rejected = report.lengths["chosen"], report.lengths["rejected"]
    if chosen > _LONGER * rejected:
        log.warning(
            "chosen answers are %.1f times as long as rejected ones: a training may learn length; "
            "max_length_ratio: 1.5 leaves such pairs out", chosen / max(rejected, 1),
        )  # fmt: skip


def _way_out(report: BuildReport) -> str:
    if not report.complete:
        return "see that the endpoint answers, then run the same command again"
    if "no room for an answer" in report.dropped:
        return "lower max_new_tokens: prompt and answer have to fit the model's context"
    return "raise temperature or num_generations for answers that differ more, or loosen rules and filters"
