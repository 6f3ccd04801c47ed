"""`streaming: true`: rows become tokens while the run trains, a buffer of them ahead, in flat memory.

The stream is cut into buffers of `buffer_size` rows, and each is shuffled by itself, by the seed and its number. What a
buffer holds follows from the place in the stream at which it begins, so that is all a checkpoint has to keep: a resumed
run reads the buffer it was in once more, and goes on to the bit. The next buffer is read and tokenised by a thread.

The report counts the rows of the buffers begun so far, each row once, however often it is read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from trueup.config.schema import RunConfig
from trueup.data.buffers import Account, Buffer, BufferReader, Reading, Recipe, peek, shape_problem
from trueup.data.encoded import EncodedDataset
from trueup.data.encoder import Policy, Tally, say, tell
from trueup.data.examples import Example, Kind
from trueup.data.formats import RowProblem, ShapeProblem, parse_with
from trueup.data.load import excerpt, hub_settings, load_examples, load_settings, name_splits
from trueup.data.registry import resolve_datasets
from trueup.data.report import DataReport
from trueup.data.row_files import Place
from trueup.data.streams import RowStream, Source
from trueup.data.templates import ChatTemplate
from trueup.errors import ConfigError, CorruptStateError, DataError
from trueup.waiting import waiting

log = logging.getLogger("trueup")

Refuse = Callable[[DataReport, Sequence[Tally]], None]


class TokenStream:
    """Buffers of encoded rows, one after another without end, each read while the one before it is trained on."""

    def __init__(self, recipe: Recipe, report: DataReport, refuse: Refuse) -> None:
        self._recipe, self.report, self._refuse = recipe, report, refuse
        self._screen: Callable[[EncodedDataset], EncodedDataset] = lambda dataset: dataset
        self._reasons: set[str] = set()  # for which rows were left out, as far as said
        self._reader = BufferReader(recipe, {name: entry.read for name, entry in report.datasets.items()})
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="stream")
        with waiting("reading ahead", recipe.buffer_size, "rows") as told:
            self._reader.told = told
            self._coming: Future[Buffer] = self._thread.submit(self._reader.read)
            self._coming.exception()  # waits; raised below
            self._reader.told = lambda done: None
        self._begin()

    @property
    def fingerprint(self) -> str:
        return self._recipe.fingerprint()

    @property
    def number(self) -> int:
        """Of the present buffer, from 0."""
        return self._current.number

    def screened_by(self, screen: Callable[[EncodedDataset], EncodedDataset]) -> None:
        """Let `screen` have a look at the present buffer and every later one: it gives what is to be trained on."""
        self._screen = screen
        self._screened()

    def advance(self) -> None:
        """Go on to the next buffer that holds an example. Raises DataError."""
        self._begin()

    def state(self) -> dict[str, Any]:
        """Where the present buffer begins, as JSON, with what has been reported before it."""
        return {
            "begins": self._current.begins,
            "report": self._report_before,
            "digest": self._current.dataset.fingerprint,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go back, or on, to the buffer whose `state` this was. Raises CorruptStateError if it holds other rows now."""
        self._stop_reading()
        self.report.go_back(state["report"])
        self._reader = BufferReader(self._recipe, {}, state["begins"])
        self._coming = self._thread.submit(self._reader.read)
        self._begin()
        if self._current.dataset.fingerprint != state["digest"]:
            raise CorruptStateError(
                "the data have changed since the checkpoint: the rows it goes on with are others now",
                where=", ".join(source.spec.name for source in self._recipe.sources),
                expected="the data the checkpoint was trained on",
                fix="restore the files, or start a new run",
            )

    def close(self) -> None:
        self._stop_reading()
        self._thread.shutdown()

    def _stop_reading(self) -> None:
        self._reader.stopped = True
        if not self._coming.cancel():
            self._coming.exception()  # waits for what is being read
        self._reader.close()

    def _begin(self) -> None:
        """Make the buffer that is coming the present one, and have the next one read."""
        self._report_before = self.report.state()
        first_pass = None
        while True:
            buffer = self._coming.result()
            self._coming = self._thread.submit(self._reader.read)
            self._enter(buffer)
            if len(buffer.dataset):
                break
            first_pass = buffer.passes if first_pass is None else first_pass
            if buffer.passes > first_pass + 1:
                self.report.require_usable()
                raise DataError("no row is left to train on", where="dataset")
        self._current = buffer
        self._screened()

    def _screened(self) -> None:
        self.report.told_before(self._current.repeats)
        splits = dict(self.report.splits)
        self.dataset = self._screen(self._current.dataset)
        if self._current.passes:
            self.report.splits = splits
        self.report.forget_rows()

    def _enter(self, buffer: Buffer) -> None:
        """Put what became of a buffer's rows into the report, and say what is new."""
        report, account = self.report, buffer.account
        for name, count in account.read.items():
            entry = report.dataset(name)
            entry.read += count
            entry.available = max(entry.available, entry.read)
        for row, reason, detail in account.dropped:
            report.dropped(row, reason, detail)
        for note in account.notes:
            if note not in report.notes:
                report.warn(note)
        if buffer.number == 0:
            say(account.tally, self._recipe.template, self._recipe.policy)
        tell(report, account.tally)
        report.forget_rows()
        if buffer.passes == 0:
            report.splits["train"] += len(buffer.dataset)
        self._refuse(report, [account.tally])
        for row, reason, _ in [*account.dropped, *account.tally.dropped]:
            if reason not in self._reasons:
                self._reasons.add(reason)
                log.warning("%s: %s; such rows are left out, and counted in the data report", row, reason)
        buffer.account = Account()


# ---- from a configuration --------------------------------------------------------------------------


def open_stream(
    cfg: RunConfig, template: ChatTemplate, policy: Policy, refuse: Refuse
) -> tuple[Callable[[], TokenStream], dict[str, list[Example]], DataReport]:
    """What a run's configuration streams (begun when it is called for), its evaluation sets, and the report on both.

    `val_size` rows are held out from the beginning of the datasets, the same number of each. Raises ConfigError,
    DataError or ModelError.
    """
    settings, hub = load_settings(cfg), hub_settings(cfg)
    kinds: tuple[Kind, Kind | None] = settings["kind"], settings["beside"]
    names: list[str] = settings["dataset"]
    specs = dict(zip(names, resolve_datasets(names, settings["dataset_dir"], settings["hub"]), strict=True))
    sources = {
        name: Source.of(spec, hub["hub_token"], hub["cache_dir"], settings["max_samples"])
        for name, spec in specs.items()
    }
    readings = {name: peek(source, kinds) for name, source in sources.items()}
    report, evaluation = DataReport(), {}
    if settings["eval_dataset"]:
        keys = ("kind", "beside", "eval_dataset", "dataset_dir", "hub", "max_samples", "seed", "eval_on_each_dataset")
        loaded = load_examples([], **{key: settings[key] for key in keys}, **hub, on_bad_rows=cfg.data.on_bad_rows)
        report, evaluation = loaded.report, loaded.eval
    for source in sources.values():
        report.dataset(source.spec.name).origin = source.spec.origin
    first: dict[str, Place | None] = dict.fromkeys(sources)
    if settings["val_size"]:
        held = _hold_out(sources, readings, int(settings["val_size"]), report, first)
        evaluation = name_splits(held, settings["eval_on_each_dataset"])
    report.splits = {"train": 0, **{name: len(examples) for name, examples in evaluation.items()}}
    report.note("streamed: rows are counted as far as they have been read; duplicates are not looked for")
    recipe = Recipe(
        [sources[name] for name in names], [readings[name] for name in names], [first[name] for name in names],
        template, policy, kinds, cfg.data.buffer_size, settings["mix_strategy"], settings["interleave_probs"],
        settings["seed"],
    )  # fmt: skip
    return lambda: TokenStream(recipe, report, refuse), evaluation, report


def _hold_out(
    sources: dict[str, Source],
    readings: dict[str, Reading],
    count: int,
    report: DataReport,
    first: dict[str, Place | None],
) -> dict[str, list[Example]]:
    """The first usable rows of each dataset, `count` in all; `first` tells where the others begin."""
    held: dict[str, list[Example]] = {}
    for number, (name, source) in enumerate(sources.items()):
        share = count // len(sources) + (number < count % len(sources))
        dataset, layout = source.spec.name, readings[name].layout
        examples, stream, entry = held.setdefault(dataset, []), RowStream(source), report.dataset(dataset)
        while len(examples) < share and not stream.ended:
            index, row, where = stream.take()
            entry.read += 1
            try:
                examples.append(parse_with(layout, f"{dataset}:{index}", row))
            except RowProblem as problem:
                report.dropped(f"{dataset}:{index}", problem.reason, problem.detail or excerpt(row))
            except ShapeProblem as problem:
                raise shape_problem(dataset, index, where, problem) from None
        if stream.ended:
            raise ConfigError(
                f"holding out {share:,} rows of dataset {dataset!r} leaves none to train on",
                where="val_size",
                fix="hold out fewer rows, give an eval_dataset, or do not evaluate",
            )
        entry.available, first[name] = entry.read, stream.place
        stream.close()
    return held
