"""Fused layers against the model's own, on its first layer: the same numbers, and which of the two are faster here.

A layer is enough, since the others are its like, and what is outside of them is the same both ways.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trueup.models.fused import fused_modules
from trueup.models.memory import find_layers
from trueup.models.policy import Policy
from trueup.types import Forest, Segment

#: Parameters in all layers from which a second at the start is little beside the steps.
WORTHWHILE = 50_000_000
#: Seconds of pairs, and how many they are at least, to be a verdict, and at most.
SECONDS, FEWEST, MOST = 1.5, 5, 9
#: By so much all pairs but one, and the fastest pass of all, have to be slower before fused layers are given up: two
#: runs of a seed should not differ because a machine was busy.
MARGIN = 1.05
#: Relative difference (norms) of outputs and gradients beyond which a layer computes something else.
LIMITS = {torch.float32: 1e-4}
ROUNDED = 0.05  # in 16 bits
SEGMENT = 128


@dataclass(frozen=True)
class Trial:
    """What came of it.

    tokens  of the timed passes
    gap     between outputs, and between gradients, relative to their norm; the largest
    limit   of the gap
    seconds with fused layers and without, pair by pair
    """

    tokens: int
    gap: float
    limit: float
    seconds: tuple[tuple[float, float], ...]

    @property
    def agrees(self) -> bool:
        return self.gap <= self.limit

    @property
    def fused(self) -> bool:
        """Whether the fused layers are taken: they compute the same, and are not clearly slower."""
        return self.agrees and not self._slower

    @property
    def _slower(self) -> bool:
        if len(self.seconds) < FEWEST:
            return False
        fused, own = map(min, zip(*self.seconds, strict=True))
        return fused / own > MARGIN and sorted(self.ratios)[1] > MARGIN

    @property
    def ratios(self) -> tuple[float, ...]:
        return tuple(fused / own for fused, own in self.seconds)

    @property
    def ratio(self) -> float | None:
        return statistics.median(self.ratios) if len(self.ratios) >= FEWEST else None


def first_layer(policy: Policy) -> nn.Module | None:
    """The layer that is tried; None where there is nothing to try, or too little to be worth it."""
    layers = find_layers(policy.base)
    if layers is None or sum(p.numel() for p in layers.parameters()) < WORTHWHILE:
        return None
    return layers[0] if fused_modules(layers[0]) else None


def trial_tokens(layer: nn.Module, largest: int, device: torch.device) -> int:
    """How many tokens to time: those of a micro-batch, as far as a pass stays short."""
    most, work = (128, 2e9) if device.type == "cpu" else (2048, 1e12)
    weights = sum(p.numel() for p in layer.parameters())
    return max(16, min(largest, most, int(work / weights)))


def try_layer(policy: Policy, layer: nn.Module, tokens: int) -> Trial:
    """Compare and time a layer of a policy whose layers are fused; it is left as it was found.

    Args:
        layer: takes hidden states; does not recompute its activations.
    """
    dtype = policy.dtype
    limit = LIMITS.get(dtype, ROUNDED)
    fused = {module: type(module) for module in fused_modules(layer)}
    own = {module: kind.__bases__[-1] for module, kind in fused.items()}
    with _left_alone(policy), torch.random.fork_rng(_devices(policy)):
        torch.manual_seed(0)
        gap = _gap(policy, layer, fused, own)
        given = _inputs(policy, layer, _forest(policy, tokens))
        seconds = _pairs(layer, given, fused, own) if gap <= limit else ()
    return Trial(tokens, gap, limit, seconds)


Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Classes = dict[nn.Module, type]


def _gap(policy: Policy, layer: nn.Module, fused: Classes, own: Classes) -> float:
    """Between the two ways' outputs and gradients on a few tokens, without dropout."""
    policy.model.eval()
    given = _inputs(policy, layer, _forest(policy, 16))
    with _all_acting(layer):
        pairs = zip(_pass(layer, given, fused), _pass(layer, given, own), strict=True)
    policy.model.train()
    return max(_relative(a, b) for a, b in pairs if a is not None and b is not None)


@contextmanager
def _all_acting(layer: nn.Module) -> Iterator[None]:
    """A new adapter's second matrices are 0, and much would agree because of that: they are something meanwhile."""
    idle = [p for p in layer.parameters() if p.requires_grad and not p.any()]
    for parameter in idle:
        nn.init.normal_(parameter, std=0.02)
    try:
        yield
    finally:
        for parameter in idle:
            nn.init.zeros_(parameter)


def _relative(a: Tensor, b: Tensor) -> float:
    norm = float(b.float().norm())
    difference = float((a.float() - b.float()).norm())
    return difference / norm if norm else difference


def _pairs(layer: nn.Module, given: Inputs, fused: Classes, own: Classes) -> tuple[tuple[float, float], ...]:
    """Seconds of passes both ways, in turn, until there are enough or the time is over."""
    pairs: list[tuple[float, float]] = []
    begun = time.perf_counter()
    for classes in (fused, own):
        _pass(layer, given, classes)  # what is made once is made now
    while len(pairs) < MOST and time.perf_counter() - begun < SECONDS:
        if len(pairs) % 2:
            first = _seconds(layer, given, fused)
            pairs.append((first, _seconds(layer, given, own)))
        else:
            first = _seconds(layer, given, own)
            pairs.append((_seconds(layer, given, fused), first))
    return tuple(pairs)


def _seconds(layer: nn.Module, given: Inputs, classes: Classes) -> float:
    _wait(given[0][0])
    begun = time.perf_counter()
    _wait(_pass(layer, given, classes)[0])
    return time.perf_counter() - begun


def _wait(tensor: Tensor | None) -> None:
    if tensor is not None and tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)


def _pass(layer: nn.Module, given: Inputs, classes: Classes) -> list[Tensor | None]:
    """Output of the layer, and gradients of its input and of what trains in it; none is left in the parameters."""
    for module, kind in classes.items():
        module.__class__ = kind
    (hidden, *others), keywords = given
    hidden = hidden.detach().requires_grad_()
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    found = layer(hidden, *others, **keywords)
    output = found[0] if isinstance(found, tuple) else found
    upstream = torch.linspace(-1, 1, output.numel(), device=output.device, dtype=output.dtype).view_as(output)
    return [output.detach(), *torch.autograd.grad(output, [hidden, *trained], upstream, allow_unused=True)]


class _Reached(Exception):
    """What a layer was called with; ends the forward pass there."""


def _inputs(policy: Policy, layer: nn.Module, forest: Forest) -> Inputs:
    """What the layer is called with for a batch."""

    def reached(module: nn.Module, args: tuple, keywords: dict) -> None:
        raise _Reached(args, keywords)

    with layer.register_forward_pre_hook(reached, with_kwargs=True), torch.no_grad():
        try:
            policy.hidden(forest.to(policy.device))
        except _Reached as found:
            args, keywords = found.args
            keywords = dict(keywords)
            return (args, keywords) if args else ((keywords.pop("hidden_states"),), keywords)
    raise AssertionError("the first layer was not asked")


def _forest(policy: Policy, tokens: int) -> Forest:
    """Rows of random tokens, no prompt shared."""
    starts = range(0, tokens, SEGMENT)
    segments = tuple(Segment(start, min(start + SEGMENT, tokens), -1) for start in starts)
    ids = torch.randint(min(policy.base.config.get_text_config().vocab_size, 1000), (tokens,))
    places = torch.arange(tokens)
    owner = places // SEGMENT
    paths = tuple((index,) for index in range(len(segments)))
    return Forest(ids, places % SEGMENT, segments, places, ids, owner, len(segments), paths)


@contextmanager
def _left_alone(policy: Policy) -> Iterator[None]:
    """A policy is afterwards as it was: its mode, and its layers fused."""
    training = policy.model.training
    classes = {module: type(module) for module in fused_modules(policy.model)}
    try:
        yield
    finally:
        for module, kind in classes.items():
            module.__class__ = kind
        policy.model.train(training)


def _devices(policy: Policy) -> list[torch.device]:
    return [policy.device] if policy.device.type == "cuda" else []
