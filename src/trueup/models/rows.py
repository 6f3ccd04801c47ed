"""Single rows of embeddings and head that train while the rest stands: peft's trainable tokens, without its copies.

peft writes the rows into a copy of the whole matrix in every forward, and hands such a copy to whoever asks for its
`weight`. Here the matrix stays where it is, and what comes out of it is replaced where one of the rows is meant. The
parameters, their names and what peft saves do not change.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftConfig
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

_KEY = "base_model.model.{}.token_adapter.trainable_tokens_delta"  # as peft saves them


@dataclass(frozen=True)
class Rows:
    """Rows that stand in the place of a matrix's own.

    Attributes:
        ids: which, ascending; on the host as well, so that nobody waits for a device.
        index: [n] the same on the device.
        values: [n, H].
    """

    ids: tuple[int, ...]
    index: Tensor
    values: Tensor

    def within(self, start: int, stop: int) -> slice:
        """Which of them lie in a stretch of the matrix."""
        return slice(bisect_left(self.ids, start), bisect_left(self.ids, stop))

    def replace(self, found: Tensor, wanted: Tensor) -> Tensor:
        """`found` [..., H], the matrix's rows `wanted` [...], with these in their place."""
        at = torch.searchsorted(self.index, wanted).clamp_max(len(self.ids) - 1)
        return torch.where((self.index[at] == wanted)[..., None], F.embedding(at, self.values), found)


@lru_cache(maxsize=64)
def _order(ids: tuple[int, ...], device: torch.device) -> tuple[tuple[int, ...], Tensor, Tensor | None]:
    """Ids ascending, as a tensor, and what brings rows in that order where they are not in it."""
    order = sorted(range(len(ids)), key=ids.__getitem__)
    ascending = tuple(ids[i] for i in order)
    moved = None if ascending == ids else torch.tensor(order, device=device)
    return ascending, torch.tensor(ascending, device=device), moved


class RowsLayer(TrainableTokensLayer):
    """Forward of peft's layer."""

    def acting(self) -> Rows | None:
        """The rows of the adapter that acts; peft lets one act at a time."""
        names = [name for name in self.active_adapters if name in self.trainable_tokens_delta]
        if self.disable_adapters or self.merged or not names:
            return None
        self._check_overlapping_tokens(names)
        (name,) = names
        weight: Any = self.base_layer.weight
        values = self.trainable_tokens_delta[name]
        ids, index, moved = _order(tuple(self.token_indices[name]), weight.device)
        return Rows(ids, index, (values if moved is None else values[moved]).to(weight.dtype))

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """Token ids [...] → [..., H] of embeddings, [..., H] → [..., V] of a head."""
        base: Any = self.base_layer
        found, rows = base(x, *args, **kwargs), self.acting()
        if rows is None:
            return found
        if isinstance(base, nn.Embedding):
            scale = self._get_embed_scale()
            values = rows.values if scale is None else rows.values * scale.to(rows.values.dtype)
            return Rows(rows.ids, rows.index, values).replace(found, x)
        bias = None if base.bias is None else base.bias[rows.index]
        return found.index_copy(-1, rows.index, F.linear(x, rows.values, bias).to(found.dtype))

    def forward_adapters(self, x: Tensor, active_adapters, *args, **kwargs) -> Tensor:
        return self.forward(x, *args, **kwargs)


class RowsWrapper(TrainableTokensWrapper):
    """What stands in the model. Who asks for its weight wants to know a device, a format or a shape; and adapters
    beside the one that has rows are asked for theirs, which peft 0.21 does not expect.
    """

    def adapter_state_dict(self, adapter_name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return super().adapter_state_dict(adapter_name, state_dict) if adapter_name in self._adapters else {}

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        return super().adapter_state_dict_load_map(adapter_name) if adapter_name in self._adapters else {}

    def _getattr_wrapped(self, name: str, modules) -> Any:
        return modules["token_adapter"].base_layer.weight


def lighten(model: nn.Module) -> None:
    """Put our layers in the place of peft's."""
    for module in model.modules():
        if type(module) is TrainableTokensLayer:
            module.__class__ = RowsLayer
        elif type(module) is TrainableTokensWrapper:
            module.__class__ = RowsWrapper


def parts_of(module: nn.Module) -> tuple[Any, Rows | None]:
    """A projection as it is without trained rows, and the rows that act on it."""
    if not isinstance(module, RowsWrapper):
        return module, None
    layer: Any = module.token_adapter
    return layer.base_layer, layer.acting()


# --- adapters that hold rows ----------------------------------------------------------------------


def matrices(base: PreTrainedModel) -> dict[str, Any]:
    """Path → embeddings, and the head where it has a matrix of its own."""
    embeddings: Any = base.get_input_embeddings()
    head: Any = base.get_output_embeddings()
    wanted = [embeddings] if head is None or head.weight is embeddings.weight else [embeddings, head]
    names = {id(module): name for name, module in base.named_modules()}
    return {names[id(module)]: module for module in wanted}


def rows_names(config: PeftConfig) -> Any:
    """What an adapter's config says of rows, as peft has it: nothing, ids of the embeddings, or ids by name."""
    return getattr(config, "trainable_token_indices", None)  # of the kinds of adapter, LoRA alone has them


def rows_of(config: PeftConfig, base: PreTrainedModel) -> dict[str, list[int]]:
    """Path → ids of an adapter's rows."""
    if not (found := rows_names(config)):
        return {}
    paths = matrices(base)
    if not isinstance(found, Mapping):
        return {next(iter(paths)): list(found)}
    return {path: list(ids) for path in paths for name, ids in found.items() if path.endswith(name)}


def with_rows(config: Any, base: PreTrainedModel, more: Mapping[str, Iterable[int]]) -> None:
    """Let an adapter's config hold these rows too; in place."""
    found = rows_of(config, base)
    for path, ids in more.items():
        found[path] = sorted({*found.get(path, ()), *ids})
    if found:
        config.trainable_token_indices = found


def without_rows(config: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same adapter without its rows; the config in place."""
    if rows_names(config):
        config.trainable_token_indices = None
    return {key: tensor for key, tensor in state.items() if not key.endswith(_KEY.rpartition("}.")[2])}


@torch.no_grad()
def put_rows(base: PreTrainedModel, config: PeftConfig, state: Mapping[str, Tensor]) -> None:
    """Write an adapter's rows into the base."""
    for path, ids in rows_of(config, base).items():
        weight: Any = base.get_submodule(path).weight
        weight.data[ids] = state[_KEY.format(path)].to(weight.device, weight.dtype)


def filled(base: PreTrainedModel, config: PeftConfig, state: Mapping[str, Tensor], before: PeftConfig) -> dict:
    """An adapter's tensors with all rows of `config`: its own where it had them (`before`), else the base's."""
    filled, had = dict(state), rows_of(before, base)
    for path, ids in rows_of(config, base).items():
        own = dict(zip(had.get(path, ()), state.get(_KEY.format(path), ()), strict=True))
        weight: Any = base.get_submodule(path).weight
        filled[_KEY.format(path)] = torch.stack([own[i] if i in own else weight[i].float().cpu() for i in ids])
    return filled
