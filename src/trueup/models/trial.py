"""Fused layers against a model's own: whether they give the same numbers, and which of the two are faster here.

Numbers are compared at every load, on a layer of each kind that a model has; time before a training of a large model,
on a layer of the most frequent kind that trains.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import starmap
from typing import Any

import torch
from torch import Tensor, nn

from trueup.models.fused import fused_modules, own_class
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
COMPARED = 16  # tokens
SEGMENT = 128

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Classes = dict[nn.Module, type]


# --- the same numbers -----------------------------------------------------------------------------


def kinds_of(policy: Policy) -> list[list[nn.Module]]:
    """The layers with something fused in them, by what they compute: their modules' classes, and what trains."""
    kinds: dict[tuple, list[nn.Module]] = defaultdict(list)
    for layer in find_layers(policy.base) or ():
        if fused_modules(layer):
            classes = tuple((name, own_class(module)) for name, module in layer.named_modules())
            kinds[classes, tuple(_trained(layer))].append(layer)
    return list(kinds.values())


def limit_of(dtype: torch.dtype) -> float:
    """Of the disagreement."""
    return LIMITS.get(dtype, ROUNDED)


def disagreement(policy: Policy) -> float:
    """The largest difference between the two ways on a few tokens, relative to norms: of outputs and, where the policy
    trains, of gradients, without dropout, on a layer of each kind. The policy is left as it was found.

    Returns:
        0 where nothing is fused; infinite where a number is none, or only one way has a gradient.
    """
    kinds = kinds_of(policy)
    with _left_alone(policy):
        policy.model.eval()
        return max((_gap(policy, layers[0]) for layers in kinds), default=0.0)


def _gap(policy: Policy, layer: nn.Module) -> float:
    learns = bool(policy.trainable())
    given = _inputs(policy, layer, _forest(policy, COMPARED))
    with _all_acting(layer, policy.device):
        ways = [_pass(layer, given, classes, learns) for classes in _ways(layer)]
    return max(starmap(_relative, zip(*ways, strict=True)))


@contextmanager
def _all_acting(layer: nn.Module, device: torch.device) -> Iterator[None]:
    """A new adapter's second matrices are 0, and much would agree because of that: they are something meanwhile."""
    generator = torch.Generator(device).manual_seed(0)
    idle = [p for p in _trained(layer).values() if not p.any()]
    for parameter in idle:
        nn.init.normal_(parameter, std=0.02, generator=generator)
    try:
        yield
    finally:
        for parameter in idle:
            nn.init.zeros_(parameter)


def _relative(a: Tensor | None, b: Tensor | None) -> float:
    if a is None or b is None:
        return 0.0 if a is b else math.inf
    norm = float(b.float().norm())
    difference = float((a.float() - b.float()).norm())
    found = difference / norm if norm else difference
    return found if math.isfinite(found) else math.inf  # NaN is not larger than a limit


# --- time -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """What came of it.

    tokens  of the timed passes
    seconds with fused layers and without, pair by pair
    """

    tokens: int
    seconds: tuple[tuple[float, float], ...]

    @property
    def fused(self) -> bool:
        """Whether the fused layers are taken: they are not clearly slower."""
        if len(self.seconds) < FEWEST:
            return True
        fused, own = map(min, zip(*self.seconds, strict=True))
        return fused / own <= MARGIN or sorted(self.ratios)[1] <= MARGIN

    @property
    def ratios(self) -> tuple[float, ...]:
        return tuple(fused / own for fused, own in self.seconds)

    @property
    def ratio(self) -> float | None:
        return statistics.median(self.ratios) if len(self.ratios) >= FEWEST else None


def timed_layer(policy: Policy) -> nn.Module | None:
    """A layer of the most frequent kind that trains; None where nothing is fused, or the model is too small."""
    layers = find_layers(policy.base)
    if layers is None or sum(p.numel() for p in layers.parameters()) < WORTHWHILE:
        return None
    kinds = kinds_of(policy)
    return max(kinds, key=lambda kind: (bool(_trained(kind[0])), len(kind)))[0] if kinds else None


def trial_tokens(layer: nn.Module, device: torch.device) -> int:
    """How many tokens to time: enough, as far as a pass stays short; whatever the micro-batches of a run are."""
    most, work = (128, 2e9) if device.type == "cpu" else (2048, 1e12)
    weights = sum(p.numel() for p in layer.parameters())
    return max(16, min(most, int(work / weights)))


def time_layer(policy: Policy, layer: nn.Module) -> Trial:
    """Time a layer of a policy whose layers are fused; the policy is left as it was found.

    Args:
        layer: takes hidden states; does not recompute its activations.
    """
    tokens = trial_tokens(layer, policy.device)
    fused, own = _ways(layer)
    with _left_alone(policy), torch.random.fork_rng([policy.device] if policy.device.type == "cuda" else []):
        policy.model.train()
        return Trial(tokens, _pairs(layer, _inputs(policy, layer, _forest(policy, tokens)), fused, own))


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
    _pass(layer, given, classes)
    _wait(given[0][0])
    return time.perf_counter() - begun


def _wait(tensor: Tensor) -> None:
    if tensor.device.type != "cpu":
        torch.accelerator.synchronize(tensor.device)


# --- both -----------------------------------------------------------------------------------------


def _trained(layer: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in layer.named_parameters() if parameter.requires_grad}


def _ways(layer: nn.Module) -> tuple[Classes, Classes]:
    """The classes of a layer's fused modules, and those that are the model's own."""
    modules = fused_modules(layer)
    return {module: type(module) for module in modules}, {module: own_class(module) for module in modules}


def _pass(layer: nn.Module, given: Inputs, classes: Classes, learns: bool = True) -> list[Tensor | None]:
    """Output of the layer and, where it learns, gradients of its input and of what trains in it; none is left in the
    parameters.
    """
    for module, kind in classes.items():
        module.__class__ = kind
    (hidden, *others), keywords = given
    hidden = hidden.detach().requires_grad_(learns)
    with torch.set_grad_enabled(learns):
        found = layer(hidden, *others, **keywords)
    output = found[0] if isinstance(found, tuple) else found
    if not learns:
        return [output]
    upstream = torch.linspace(-1, 1, output.numel(), device=output.device, dtype=output.dtype).view_as(output)
    asked = [hidden, *_trained(layer).values()]
    return [output.detach(), *torch.autograd.grad(output, asked, upstream, allow_unused=True)]


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
    raise AssertionError("the layer was not asked")


def _forest(policy: Policy, tokens: int) -> Forest:
    """Rows of random tokens, no prompt shared."""
    starts = range(0, tokens, SEGMENT)
    segments = tuple(Segment(start, min(start + SEGMENT, tokens), -1) for start in starts)
    known = min(policy.base.config.get_text_config().vocab_size, 1000)
    ids = torch.randint(known, (tokens,), generator=torch.Generator().manual_seed(0))
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
