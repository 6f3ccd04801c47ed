"""What a run trains on, step after step: a fixed dataset, or a stream of rows."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from trueup.config.schema import RunConfig
from trueup.data.encode import EncodedDataset, Prepared
from trueup.data.encoded import Encoded
from trueup.data.forest import BatchPlan
from trueup.data.report import DataReport
from trueup.data.streaming import TokenStream
from trueup.recipes.batches import in_layout
from trueup.training.backend import Backend
from trueup.training.events import Ended, Event, Saved
from trueup.training.run_directory import RunDirectory


class Feed(Protocol):
    """Micro-batches by step, as indices into `dataset`, which holds the same examples for `dataset_lasts` steps."""

    dataset: EncodedDataset
    dataset_lasts: int
    steps_per_epoch: int

    def micro_batches(self, epoch: int, step: int) -> list[np.ndarray]:
        """This process's, of one optimizer step."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def make_feed(cfg: RunConfig, prepared: Prepared, plan: BatchPlan, shared: bool, backend: Backend) -> Feed:
    """Of the data of a run; `plan` is of all of them, or of a stream's first buffer."""
    if prepared.stream is None:
        return FixedFeed(prepared.train, plan, backend)
    return StreamFeed(prepared.stream, plan, shared, cfg.train.max_steps, backend)


class FixedFeed:
    """A dataset that is there as a whole: every step follows from its number, so there is no state."""

    def __init__(self, dataset: EncodedDataset, plan: BatchPlan, backend: Backend) -> None:
        self.dataset, self._plan, self._place = dataset, plan, (backend.rank, backend.world_size)
        self.steps_per_epoch = self.dataset_lasts = plan.steps_per_epoch
        self._steps = functools.lru_cache(maxsize=2)(plan.steps)

    def micro_batches(self, epoch: int, step: int) -> list[np.ndarray]:
        return self._plan.micro_batches(self._steps(epoch)[step], *self._place)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""


class Window(EncodedDataset):
    """The examples of one step at a time, under the name of a dataset."""

    def __init__(self) -> None:
        self.show([])

    def show(self, examples: Sequence[Encoded]) -> None:
        """Hold these examples now."""
        vars(self).update(vars(EncodedDataset.of(examples)))
        missing = max(0, 2 - self.answer_lengths.shape[1])  # objectives on pairs look at the second, if only for none
        self.answer_lengths = np.pad(self.answer_lengths, ((0, 0), (0, missing)))


class StreamFeed:
    """Steps of a stream, in turn. Every process reads all of it and takes its share of each step.

    A buffer's units (examples, or packs of them) are shuffled by the seed and the buffer's number; a step goes on into
    the next buffer where one ends. The run is one epoch: how long an epoch is, nobody knows.
    """

    dataset_lasts = 1

    def __init__(self, stream: TokenStream, plan: BatchPlan, shared: bool, steps: int, backend: Backend) -> None:
        self.dataset, self.steps_per_epoch = Window(), steps
        self._stream, self._plan, self._shared = stream, plan, shared
        self._place = backend.rank, backend.world_size
        self._step, self._groups = -1, []  # the one that is shown
        self._open(0)

    def micro_batches(self, epoch: int, step: int) -> list[np.ndarray]:
        if step != self._step:
            assert step == self._step + 1, "a stream goes forward, step by step"
            units = self._take()
            self.dataset.show([example for unit in units for example in unit])
            ends = np.cumsum([0, *map(len, units)])
            indices = [np.arange(first, last) for first, last in zip(ends, ends[1:], strict=False)]
            self._groups = self._plan_of(self.dataset).micro_batches(indices, *self._place)
            self._step = step
        return self._groups

    def state_dict(self) -> dict[str, Any]:
        return {"stream": {**self._stream.state(), "unit": self._unit, "step": self._step}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._stream.restore(state["stream"])
        self._open(state["stream"]["unit"])
        self._step = state["stream"]["step"]

    def _take(self) -> list[list[Encoded]]:
        """The examples of the next step, unit by unit."""
        taken: list[list[Encoded]] = []
        while len(taken) < self._plan.rows_per_step:
            if self._unit == len(self._order):
                self._stream.advance()
                self._open(0)
            missing = self._plan.rows_per_step - len(taken)
            chosen = self._order[self._unit : self._unit + missing]
            taken += [[self._stream.dataset[i] for i in self._units[number]] for number in chosen]
            self._unit += len(chosen)
        return taken

    def _open(self, unit: int) -> None:
        """Lay out the stream's present buffer, of which `unit` units are taken already."""
        plan = self._plan_of(self._stream.dataset)
        self._units, self._order, self._unit = plan.units, plan.order(self._stream.number), unit

    def _plan_of(self, dataset: EncodedDataset) -> BatchPlan:
        return in_layout(replace(self._plan, lengths=dataset.lengths), dataset, self._shared)


def write_report(run: RunDirectory, report: DataReport, name: str = "data_report") -> None:
    """Write the data report into a run's directory, as JSON and as a page."""
    run.write_json(f"{name}.json", report.to_dict())
    run.write_text(f"{name}.html", report.page())


class ReportKeeper:
    """Writes the data report anew whenever a checkpoint is saved: it counts what has been read by then."""

    def __init__(self, run: RunDirectory, stream: TokenStream) -> None:
        self._run, self._stream = run, stream

    def observe(self, event: Event) -> None:
        if isinstance(event, Saved | Ended):
            write_report(self._run, self._stream.report)


@contextmanager
def watched(prepared: Prepared, run: RunDirectory) -> Iterator[list[ReportKeeper]]:
    """Observers of a run's stream, if it has one; the stream is closed in the end."""
    if prepared.stream is None:
        yield []
        return
    try:
        yield [ReportKeeper(run, prepared.stream)]
    finally:
        prepared.stream.close()
