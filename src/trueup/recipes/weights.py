"""The weights of a run, listed before its first step (`print_param_status`)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import groupby

from rich.console import Console
from rich.table import Table
from torch import nn

from trueup.config.schema import RunConfig

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def show_weights(cfg: RunConfig, model: nn.Module, console: Console) -> None:
    """The table, where it is asked for."""
    if cfg.train.print_param_status:
        console.print(weights_table(model), highlight=False)


def weights_table(model: nn.Module) -> Table:
    """Name, shape, type, device and whether it trains, of every weight; layers that are alike share a line."""
    table = Table(box=None, pad_edge=False)
    for title in ("weight", "shape", "type", "device", "trains"):
        table.add_column(title, overflow="fold")
    for row in _rows(model.named_parameters()):
        table.add_row(*row)
    return table


def _rows(weights: Iterable[tuple[str, nn.Parameter]]) -> Iterator[tuple[str, ...]]:
    """Lines in the order of first names: `layers.0-23.mlp.up_proj.weight` for weights alike but for a number."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, weight in weights:
        found = _NUMBER.findall(name)
        pattern = _NUMBER.sub("#", name, count=1)
        kind = ("×".join(map(str, weight.shape)), str(weight.dtype).removeprefix("torch."), str(weight.device))
        trains = "yes" if weight.requires_grad else "no"
        alike.setdefault((pattern, *kind, trains), []).extend(found[:1])
    for (pattern, *rest), numbers in alike.items():
        yield pattern.replace("#", _ranges([int(n) for n in numbers]), 1), *rest


def _ranges(numbers: list[int]) -> str:
    """`0-3,7` of ascending numbers."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
