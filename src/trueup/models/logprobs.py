"""Hidden states → log-probabilities of the target tokens, in tiles: `[N, V]` logits never exist at once.

The one place where objectives meet the model's head. Plain linear heads go tile by tile over rows and vocabulary with
a running maximum (online softmax, Milakov & Gimelshein 2018, arXiv 1805.02867). A frozen head's gradient is made on
the way (per row it is a scalar times `W[target] − softmax·W`, so nothing is recomputed); a trained head's tiles are
recomputed in the backward, where the row's normaliser is known. Where only some rows of a head train (new tokens'),
they stand in their tiles in the place of the weight's own, and the backward makes their logits alone. Any other head
(adapted, quantised) is called as a module on some rows at a time, and recomputed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trueup.models.device_memory import total_memory
from trueup.models.rows import Rows, parts_of

#: Logits held at once: rows × vocabulary entries. On a CPU a tile stays in the cache (docs/log.md, 2026-11-21); a GPU
#: wants larger products.
TILES = {"cpu": (512, 8192)}
LARGE_TILE = (2048, 32768)

#: Of a device's memory, what logits may take.
SHARE = 1 / 32
#: Rows below which products get too thin to be worth it.
FEWEST_ROWS = 64

FP32 = 4  # bytes


@dataclass(frozen=True)
class Head:
    """The output projection and what the architecture does to its logits.

    Raises nothing; `models/load.py` proves at load that this reproduces the model's own logits.
    """

    module: nn.Module  # [H] → [V]
    scale: float = 1.0  # logits are multiplied by it (Cohere's logit_scale, 1 / Granite's logits_scaling)
    softcap: float | None = None  # logits become softcap · tanh(logits / softcap) (Gemma 2)

    def finish(self, logits: Tensor) -> Tensor:
        """Raw logits → the architecture's logits."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def slope(self, logits: Tensor) -> Tensor | float:
        """d logits / d raw logits, from the finished logits."""
        if self.softcap is None:
            return self.scale
        return self.scale * (1.0 - (logits / self.softcap) ** 2)  # tanh' = 1 − tanh²


def is_plain(module: nn.Module) -> bool:
    """Whether a head is its weight and bias, and perhaps rows in the place of some: no adapter, no quantised weight, no
    hook.
    """
    linear, rows = parts_of(module)
    hooked = any(part._forward_hooks or part._forward_pre_hooks for part in (module, linear))
    if type(linear) is not nn.Linear or hooked or (rows and linear.weight.requires_grad):
        return False
    return type(linear.weight.data) is Tensor


def vocabulary_of(module: nn.Module) -> int:
    """Entries of a head's vocabulary, also where something is wrapped around it or its weight is packed."""
    return int(getattr(module, "out_features", None) or len(module.weight))  # type: ignore[arg-type]


def tile_of(module: nn.Module, device: torch.device, dtype: torch.dtype, memory: int | None = None) -> tuple[int, int]:
    """Rows and vocabulary entries of logits that a head holds at once.

    What measured best on such a device, halved until it takes a small share of its memory. That is the memory it has,
    not what is free of it now: a run that is resumed has to round as before.

    Args:
        memory: of the device, in bytes; asked of it by default.
    """
    rows, columns = TILES.get(device.type, LARGE_TILE)
    columns = min(columns, vocabulary_of(module)) if is_plain(module) else vocabulary_of(module)
    room = SHARE * (total_memory(device) if memory is None else memory)
    while rows > FEWEST_ROWS and rows * columns * bytes_of_logit(module, dtype) > room:
        rows //= 2
    return rows, columns


def bytes_of_logit(module: nn.Module, dtype: torch.dtype) -> int:
    """What a logit takes at the most: of tiles, itself and its exponential; else four fp32 copies, as measured."""
    return dtype.itemsize + FP32 if is_plain(module) else 4 * FP32


def token_logps(hidden: Tensor, head: Head, target: Tensor, tile: tuple[int, int] | None = None) -> Tensor:
    """log p(target | hidden) for N positions.

    Args:
        hidden: [N, H] hidden states after the final norm, in compute dtype.
        target: [N] token ids.
        tile: rows and vocabulary entries of logits held at once; `tile_of` by default.

    Returns:
        [N] fp32, differentiable in `hidden` and in the head's trained parameters.
    """
    module = head.module
    tile = tile or tile_of(module, hidden.device, hidden.dtype)
    if is_plain(module):
        linear, rows = parts_of(module)
        values = rows.values if rows else None
        return _LinearHead.apply(hidden, linear.weight, linear.bias, values, target, head, tile, rows)

    def project(rows: Tensor, targets: Tensor) -> Tensor:
        return _gather_logps(head.finish(module(rows).float()), targets)

    pieces = []
    for rows, targets in zip(hidden.split(tile[0]), target.split(tile[0]), strict=True):
        if torch.is_grad_enabled():
            pieces.append(checkpoint(project, rows, targets, use_reentrant=False))
        else:
            pieces.append(project(rows, targets))
    return torch.cat(pieces) if pieces else hidden.new_zeros(0, dtype=torch.float32)


@torch.no_grad()
def graded_logps(
    hidden: Tensor, head: Head, target: Tensor, tile: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """`token_logps` [N] without gradient, and [N] bool: whether each target is the likeliest token.

    Both from one pass over the tiles. Of tokens that are equally likely the first is, as `argmax` has it. Args as
    `token_logps`.
    """
    module = head.module
    tile = tile or tile_of(module, hidden.device, hidden.dtype)
    if is_plain(module):
        linear, own = parts_of(module)
        likeliest = torch.zeros_like(target)
        tiles = _Tiles(hidden, linear.weight, linear.bias, head, tile, own)  # type: ignore[arg-type]
        return _logps(hidden, target, tiles, False, likeliest)[0], likeliest == target
    logps, right = hidden.new_empty(len(hidden), dtype=torch.float32), torch.empty_like(target, dtype=torch.bool)
    for start in range(0, len(hidden), tile[0]):
        rows = slice(start, start + tile[0])
        logits = head.finish(module(hidden[rows]).float())
        logps[rows], right[rows] = _gather_logps(logits, target[rows]), logits.argmax(1) == target[rows]
    return logps, right


def _gather_logps(logits: Tensor, target: Tensor) -> Tensor:
    return logits.gather(1, target[:, None]).squeeze(1) - torch.logsumexp(logits, dim=1)


class _Tiles:
    """The tiles of `finish(hidden Wᵀ + b)`, through buffers that every tile uses again.

    `own` are rows in the place of some of W's.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head, tile: tuple[int, int],
        own: Rows | None = None,
    ) -> None:  # fmt: skip
        self.weight, self.bias, self.head, self.own = weight, bias, head, own
        self.rows, self.columns = max(1, min(tile[0], len(hidden))), min(tile[1], len(weight))
        self.exact = torch.promote_types(hidden.dtype, torch.float32)
        self._raw = hidden.new_empty(self.rows * self.columns)
        self._fine = hidden.new_empty(self.rows * self.columns, dtype=self.exact)

    def row_slices(self, count: int) -> Iterator[slice]:
        return (slice(start, min(start + self.rows, count)) for start in range(0, count, self.rows))

    def columns_of(self, rows: Tensor) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
        """(first entry, tile of W, raw logits, finished logits, fine buffer) for each stretch of the vocabulary."""
        for start in range(0, len(self.weight), self.columns):
            part = self._part(start)
            shape = len(rows), len(part)
            raw, fine = (buffer[: shape[0] * shape[1]].view(shape) for buffer in (self._raw, self._fine))
            torch.mm(rows, part.t(), out=raw)
            if self.bias is not None:
                raw += self.bias[start : start + self.columns]
            plain = self.head.scale == 1.0 and self.head.softcap is None
            yield start, part, raw, raw if plain else self.head.finish(raw.to(self.exact)), fine

    def _part(self, start: int) -> Tensor:
        part = self.weight[start : start + self.columns]
        inside = self.own.within(start, start + len(part)) if self.own is not None else slice(0, 0)
        if self.own is None or inside.start == inside.stop:
            return part
        return part.index_copy(0, self.own.index[inside] - start, self.own.values[inside])

    def rows_of(self, target: Tensor) -> Tensor:
        """[N, H] the rows of W of these tokens [N]."""
        found = self.weight[target]
        return found if self.own is None else self.own.replace(found, target)


class _LinearHead(torch.autograd.Function):
    """log p = z_y − logsumexp(z), z = finish(W h + b); d log p / d h = Wᵀ (finish'(z) ⊙ (onehot_y − softmax z))."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, values, target, head: Head, tile: tuple[int, int], own: Rows | None):
        trained = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        wants_slope = ctx.needs_input_grad[0] and not trained
        tiles = _Tiles(hidden, weight, bias, head, tile, own and replace(own, values=values))
        logps, normaliser, slopes = _logps(hidden, target, tiles, wants_slope)
        ctx.trained, ctx.head, ctx.tile, ctx.own = trained, head, tile, own
        if trained:
            ctx.save_for_backward(hidden, weight, bias, target, normaliser)
        elif ctx.needs_input_grad[3]:
            ctx.save_for_backward(slopes, hidden, values, bias, target, normaliser)
        elif wants_slope:
            ctx.save_for_backward(slopes)
        return logps

    @staticmethod
    def backward(ctx, grad_logps):
        if ctx.trained:
            hidden, weight, bias, target, normaliser = ctx.saved_tensors
            grads = _trained_gradients(
                hidden, weight, bias, target, normaliser, grad_logps, ctx.head, ctx.tile, ctx.needs_input_grad
            )
            return *grads, None, None, None, None, None
        slopes, *of_rows = ctx.saved_tensors
        d_hidden = None if slopes is None else slopes * grad_logps[:, None].to(slopes.dtype)
        d_values = _gradient_of_rows(*of_rows, grad_logps, ctx.head, ctx.tile, ctx.own) if of_rows else None
        return d_hidden, None, None, d_values, None, None, None, None


def _logps(
    hidden: Tensor, target: Tensor, tiles: _Tiles, slope: bool, likeliest: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probabilities [N] fp32, logsumexp [N, 1] and, if asked for, d log p / d hidden [N, H].

    Into `likeliest` [N] goes the token with the largest logit.
    """
    head = tiles.head
    exact = {"dtype": tiles.exact, "device": hidden.device}
    normaliser = torch.empty(len(hidden), 1, **exact)
    picked = torch.zeros(len(hidden), 1, **exact)
    slopes = torch.empty_like(hidden) if slope else None
    for rows in tiles.row_slices(len(hidden)):
        x, y = hidden[rows], target[rows, None]
        largest = torch.full((len(x), 1), -torch.inf, **exact)
        total = torch.zeros(len(x), 1, **exact)
        expected = torch.zeros(len(x), hidden.shape[1], **exact)  # Σ exp(z − largest) finish'(z) W
        own_slope: Tensor | float = head.scale  # finish' at the target
        for start, part, raw, logits, fine in tiles.columns_of(x):
            inside = (y >= start) & (y < start + len(part))
            at = (y - start).clamp(0, len(part) - 1)
            picked[rows] = torch.where(inside, logits.gather(1, at).to(tiles.exact), picked[rows])
            before = largest
            largest = torch.maximum(before, logits.amax(1, keepdim=True).to(tiles.exact))
            if likeliest is not None:
                found = (largest > before).squeeze(1)
                likeliest[rows] = torch.where(found, logits.argmax(1) + start, likeliest[rows])
            shrink = torch.exp(before - largest)
            weights = torch.sub(logits, largest, out=fine).exp_()
            total.mul_(shrink).add_(weights.sum(1, keepdim=True))
            if slopes is not None:
                if head.softcap is not None:
                    weights = weights.mul_(head.slope(logits))
                expected.mul_(shrink).add_(raw.copy_(weights) @ part)
        normaliser[rows] = largest + total.log()
        if slopes is not None:
            mean = expected / total
            if head.softcap is None:
                mean *= head.scale
            else:
                own_slope = head.slope(picked[rows])
            slopes[rows] = tiles.rows_of(y.squeeze(1)) * own_slope - mean
    return (picked - normaliser).squeeze(1).float(), normaliser, slopes


def _trained_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, normaliser: Tensor, grad_logps: Tensor,
    head: Head, tile: tuple[int, int], needed: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of hidden, weight and bias, from tiles made again."""
    tiles = _Tiles(hidden, weight, bias, head, tile)
    d_hidden = torch.zeros(hidden.shape, dtype=tiles.exact, device=hidden.device)
    d_weight = torch.zeros(weight.shape, dtype=tiles.exact, device=weight.device) if needed[1] else None
    d_bias = torch.zeros(len(weight), dtype=tiles.exact, device=weight.device) if needed[2] else None
    for rows in tiles.row_slices(len(hidden)):
        x, y, g = hidden[rows], target[rows, None], grad_logps[rows, None].to(tiles.exact)
        for start, part, raw, logits, fine in tiles.columns_of(x):
            slope = torch.sub(logits, normaliser[rows], out=fine).exp_().mul_(-g)  # −g softmax(z)
            inside = (y >= start) & (y < start + len(part))
            at = (y - start).clamp(0, len(part) - 1)
            slope.scatter_add_(1, at, torch.where(inside, g, 0.0))
            slope.mul_(head.slope(logits))
            if d_bias is not None:
                d_bias[start : start + len(part)] += slope.sum(0)
            slope = raw.copy_(slope)
            d_hidden[rows] += slope @ part
            if d_weight is not None:
                d_weight[start : start + len(part)] += slope.t() @ x
    return (
        d_hidden.to(hidden.dtype),
        None if d_weight is None else d_weight.to(weight.dtype),
        None if d_bias is None else d_bias.to(weight.dtype),
    )


def _gradient_of_rows(
    hidden: Tensor, values: Tensor, bias: Tensor | None, target: Tensor, normaliser: Tensor, grad_logps: Tensor,
    head: Head, tile: tuple[int, int], own: Rows,
) -> Tensor:  # fmt: skip
    """[n, H] of rows that train alone: their logits are all that is made again."""
    exact = torch.promote_types(hidden.dtype, torch.float32)
    found = torch.zeros(values.shape, dtype=exact, device=values.device)
    shift = None if bias is None else bias[own.index]
    for rows in _Tiles(hidden, values, None, head, tile).row_slices(len(hidden)):
        x, g = hidden[rows], grad_logps[rows, None].to(exact)
        logits = head.finish(torch.nn.functional.linear(x, values, shift).to(exact))
        slope = (target[rows, None] == own.index).to(exact) - (logits - normaliser[rows]).exp()  # onehot − softmax
        found += (slope * g * head.slope(logits)).to(x.dtype).t() @ x
    return found.to(values.dtype)


@torch.no_grad()
def token_entropy(hidden: Tensor, head: Head, tile: tuple[int, int] | None = None) -> Tensor:
    """Entropy [N] (fp32, nats) of the next-token distribution at each hidden state: one more product of the head.

    Args as `token_logps`. H = log Z − Σ_v p_v z_v, with a running maximum over the vocabulary.
    """
    module = head.module
    tile = tile or tile_of(module, hidden.device, hidden.dtype)
    if not is_plain(module):
        pieces = [_entropy(head.finish(module(rows).float())) for rows in hidden.split(tile[0])]
        return torch.cat(pieces) if pieces else hidden.new_zeros(0, dtype=torch.float32)
    linear, own = parts_of(module)
    tiles = _Tiles(hidden, linear.weight, linear.bias, head, tile, own)  # type: ignore[arg-type]
    exact = {"dtype": tiles.exact, "device": hidden.device}
    found = torch.empty(len(hidden), **exact)
    for rows in tiles.row_slices(len(hidden)):
        x = hidden[rows]
        largest = torch.full((len(x), 1), -torch.inf, **exact)
        total, expected = (torch.zeros(len(x), 1, **exact) for _ in range(2))  # Σ e^(z − largest), Σ e^(z − largest) z
        for _, _, _, logits, fine in tiles.columns_of(x):
            before = largest
            largest = torch.maximum(before, logits.amax(1, keepdim=True).to(tiles.exact))
            shrink = torch.exp(before - largest)
            weights = torch.sub(logits, largest, out=fine).exp_()
            total.mul_(shrink).add_(weights.sum(1, keepdim=True))
            expected.mul_(shrink).add_(weights.mul_(logits).sum(1, keepdim=True))
        found[rows] = (largest + total.log() - expected / total).squeeze(1)
    return found.float()


def _entropy(logits: Tensor) -> Tensor:
    return torch.logsumexp(logits, 1) - (torch.softmax(logits, 1) * logits).sum(1)


def sum_by_sequence(logps: Tensor, owner: Tensor, num_sequences: int) -> Tensor:
    """[N] per-token values → [S] sums per sequence, fp32."""
    return torch.zeros(num_sequences, dtype=torch.float32, device=logps.device).index_add(0, owner, logps)
