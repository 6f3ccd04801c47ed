"""Keys and values of answers under way: rows join in place of those that ended, and a step copies nothing.

Rows are aligned at their ends: the newest token of each is in the last column, what is before a row's first token is
padding, which the mask hides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import Cache, DynamicLayer

ROOM = 64  # columns to grow into, at the least


class GrowingLayer(DynamicLayer):
    """A layer's keys and values [R, heads, W, d], views of stores with columns to spare.

    transformers' own layer makes new tensors with every token, which for many short rows takes as long as the model.
    """

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.stores = (key_states[:, :, :0], value_states[:, :, :0])
        self.keys, self.values = self.stores
        self.start = 0  # first column in use

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        width, more = self.keys.shape[2], key_states.shape[2]
        if self.start + width + more > self.stores[0].shape[2]:
            self._move(len(self.keys), width, width + more)
        end = self.start + width
        for store, states in zip(self.stores, (key_states, value_states), strict=True):
            store[:, :, end : end + more] = states
        self._view(width + more)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        self.stores = (self.keys[indices], self.values[indices])
        self.start = 0
        self._view(self.stores[0].shape[2])

    def write(self, rows: Tensor, other: GrowingLayer, which: Tensor) -> None:
        """Put rows `which` of another layer, no wider than this, in place of `rows`."""
        width = other.keys.shape[2]
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            mine[rows, :, mine.shape[2] - width :] = theirs[which]

    def append(self, other: GrowingLayer, which: Tensor) -> None:
        """Put rows `which` of another layer below these; the wider of the two decides the width."""
        rows, width, theirs = len(self.keys), self.keys.shape[2], other.keys.shape[2]
        self._move(rows + len(which), max(width, theirs), max(width, theirs) + 1)
        added = torch.arange(rows, rows + len(which), device=which.device)
        self.write(added, other, which)

    def trim(self, columns: int) -> None:
        """Give up the first columns."""
        self.start += columns
        self._view(self.keys.shape[2] - columns)

    def _view(self, width: int) -> None:
        self.keys, self.values = (store[:, :, self.start : self.start + width] for store in self.stores)

    def _move(self, rows: int, width: int, needed: int) -> None:
        """Into stores of so many rows, with room for more than `needed` columns; what is there keeps to the end.

        Zeros elsewhere: what the mask hides has to be finite.
        """
        moved = []
        for old in (self.keys, self.values):
            store = old.new_zeros(rows, old.shape[1], needed + max(ROOM, needed // 8), old.shape[3])
            store[: len(old), :, width - old.shape[2] : width] = old
            moved.append(store)
        self.stores, self.start = (moved[0], moved[1]), 0
        self._view(width)


class RowCache:
    """The cache a model is handed, [R] rows of W columns, with its mask."""

    def __init__(self, config: PretrainedConfig) -> None:
        # One kind of layer for all: a window is in the mask, which sees whole rows.
        self.cache = Cache(layer_class_to_replicate=GrowingLayer)
        self.config = config

    @property
    def layers(self) -> list[GrowingLayer]:
        return [layer for layer in self.cache.layers if layer.is_initialized]  # type: ignore[misc]

    def __len__(self) -> int:
        """Rows, also those given up."""
        return len(self.layers[0].keys) if self.layers else 0

    @property
    def width(self) -> int:
        return self.cache.get_seq_length()

    def take(self, rows: Tensor) -> None:
        """Keep these rows alone."""
        self.cache.batch_select_indices(rows)

    def replace(self, rows: Tensor, other: RowCache, which: Tensor) -> None:
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            mine.write(rows, theirs, which)

    def append(self, other: RowCache, which: Tensor) -> None:
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            mine.append(theirs, which)

    def trim(self, columns: int) -> None:
        for layer in self.layers:
            layer.trim(columns)


def takes_rows(config: PretrainedConfig) -> bool:
    """Whether a model remembers by keys and values alone, so that rows of different ages can go together.

    Recurrent states, convolutions and attention in chunks know a row's place otherwise.
    """
    kinds = {type(layer).__name__ for layer in DynamicCache(config=config).layers}
    kinds -= {"DynamicLayer", "DynamicSlidingWindowLayer"}
    chunked = getattr(config.get_text_config(), "attention_chunk_size", None)
    return not kinds and not chunked


def bytes_per_token(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """What a place in the cache takes, as far as the config tells."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", 1)
    width = getattr(text, "head_dim", None) or text.hidden_size // getattr(text, "num_attention_heads", 1)
    return 2 * text.num_hidden_layers * heads * width * dtype.itemsize
