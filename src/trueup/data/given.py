"""Rows that a Python program hands over: a list, a `datasets.Dataset`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trueup.errors import DataError

log = logging.getLogger("trueup")


@dataclass(frozen=True)
class GivenRows:
    """Rows, and what their owner says about them, as an entry of a registry would."""

    rows: Sequence[Mapping[str, Any]]
    formatting: str = "auto"
    columns: Mapping[str, str | None] = field(default_factory=dict)


def rows_of(dataset: Any, name: str) -> list[dict[str, Any]]:
    """The rows of a dataset in memory: a sequence of mappings, a `datasets.Dataset`, a table of pandas.

    Raises:
        DataError: it is something else, a stream, or several splits none of which is called train.
    """
    if isinstance(dataset, Mapping):
        dataset = _split(dataset, name)
    if hasattr(dataset, "to_list"):  # datasets.Dataset
        dataset = dataset.to_list()
    elif hasattr(dataset, "to_dict") and hasattr(dataset, "columns"):  # pandas.DataFrame
        dataset = dataset.to_dict("records")
    if not isinstance(dataset, Sequence) or isinstance(dataset, str | bytes):
        stream = hasattr(dataset, "__iter__")
        raise DataError(
            f"{name} is {'a stream' if stream else 'no dataset'} ({type(dataset).__name__})", where=name,
            expected="a list of rows, a datasets.Dataset, or the name of a dataset",
            fix="give the name of its files with streaming: true, or list(rows) if they fit into memory"
            if stream else None,
        )  # fmt: skip
    for index, row in enumerate(dataset):
        if not isinstance(row, Mapping):
            raise DataError(
                f"row {index} is {type(row).__name__}", where=name, expected='a mapping such as {"prompt": …}'
            )
    return [dict(row) for row in dataset]


def _split(splits: Mapping[str, Any], name: str) -> Any:
    if "train" not in splits:
        raise DataError(
            f"{name} has the splits {', '.join(map(str, splits)) or 'none'}", where=name,
            expected="one dataset", fix=f'choose one, as in {name}=dataset["train"]',
        )  # fmt: skip
    if len(splits) > 1:
        log.warning("%s has the splits %s; train is used", name, ", ".join(map(str, splits)))
    return splits["train"]
