"""The weights of a run, listed before its first step (`print_param_status`)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import groupby

from rich.console import Console
from rich.table import Table
from torch import nn

from trueup.config.schema import RunConfig

_TITLES = ("weight", "shape", "type", "device", "trains")
_WRAPPED = "base_model.model."  # peft's, before each name of the model's own
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def show_weights(cfg: RunConfig, model: nn.Module, console: Console) -> None:
    """The table, where it is asked for."""
    if cfg.train.print_param_status:
        console.print("", weights_table(model), "", highlight=False)


def weights_table(model: nn.Module) -> Table:
    """Name, shape, type, device and whether it trains, of every weight; layers that are alike share a line.

    A type or device that all of them have is said once, above: lines fit into 80 columns.
    """
    columns = dict(zip(_TITLES, zip(*_rows(model.named_parameters()), strict=True), strict=True))
    common = {title: columns.pop(title)[0] for title in ("type", "device") if len(set(columns[title])) == 1}
    said = ", ".join(f"{title} {value}" for title, value in common.items())
    table = Table(box=None, pad_edge=False, title=f"all: {said}" if said else None, title_justify="left")
    for title in columns:
        table.add_column(title, overflow="fold")
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    return table


def _rows(weights: Iterable[tuple[str, nn.Parameter]]) -> Iterator[tuple[str, ...]]:
    """Lines in the order of first names: `layers.0-23.mlp.up_proj.weight` for weights alike but for a number."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, weight in weights:
        found = _NUMBER.findall(name)
        pattern = _NUMBER.sub("#", name.removeprefix(_WRAPPED), count=1)
        kind = ("×".join(map(str, weight.shape)), str(weight.dtype).removeprefix("torch."), str(weight.device))
        trains = "yes" if weight.requires_grad else "no"
        alike.setdefault((pattern, *kind, trains), []).extend(found[:1])
    for (pattern, *rest), numbers in alike.items():
        yield pattern.replace("#", _ranges([int(n) for n in numbers]), 1), *rest


def _ranges(numbers: list[int]) -> str:
    """`0-3,7` of ascending numbers."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
