"""Prompts: whether they can be answered, and the rows behind them, looked up by row id."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from trueup.config.schema import RunConfig
from trueup.data.encode import Prepared
from trueup.data.examples import Prompt
from trueup.data.formats import parse_with
from trueup.data.layout import choose_layout
from trueup.data.registry import resolve_datasets
from trueup.data.sources import Rows, read_rows
from trueup.errors import ConfigError

_TOKENS = {"huggingface": "hf_hub_token", "modelscope": "ms_hub_token", "modelers": "om_hub_token"}


class PromptRows:
    """Rows of a run's datasets. A dataset is read when its first row is asked for."""

    def __init__(self, cfg: RunConfig) -> None:
        model, data = cfg.model, cfg.data
        names = list(dict.fromkeys([*data.dataset, *data.eval_dataset]))
        self._specs = {spec.name: spec for spec in resolve_datasets(names, data.dataset_dir, model.hub)}
        self._access = {"token": getattr(model, _TOKENS[model.hub]), "cache_dir": model.cache_dir}
        self._rows = cache(self._read)
        self._layout = cache(lambda name: choose_layout(self._specs[name], self._rows(name).values, "prompt"))

    def _read(self, name: str) -> Rows:
        return read_rows(self._specs[name], **self._access)

    def columns(self, row: str) -> Mapping[str, Any]:
        """The row as its file has it."""
        name, _, index = row.rpartition(":")
        return self._rows(name)[int(index)]

    def prompt(self, row: str) -> Prompt:
        """The row's messages and tools."""
        name, _, index = row.rpartition(":")
        example = parse_with(self._layout(name), row, self._rows(name)[int(index)])
        assert isinstance(example, Prompt)
        return example

    def question(self, row: str) -> str:
        """What is asked last, as people read it."""
        return self.prompt(row).messages[-1].content


def check_prompts(prepared: Prepared) -> None:
    """Whether every prompt has a token to begin from; ConfigError if not."""
    for dataset in (prepared.train, *prepared.eval.values()):
        if len(dataset) and int(dataset.prompt_lengths.min()) == 0:
            row = dataset.rows[int(dataset.prompt_lengths.argmin())]
            raise ConfigError("a prompt is empty: there is nothing to answer", where=f"row {row}")
