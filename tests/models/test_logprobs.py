"""Chunked log-probs equal log_softmax over full logits, for every kind of head, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trueup.models.logprobs import (
    FEWEST_ROWS,
    LARGE_TILE,
    SHARE,
    TILES,
    Head,
    bytes_of_logit,
    graded_logps,
    tile_of,
    token_entropy,
    token_logps,
)

GB = 1 << 30


@pytest.mark.parametrize("tile", [(1, 5), (4, 8), (64, 64)])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.5, None), (1.0, 3.0), (2.0, 5.0)])
def test_equals_full_logits(
    tile: tuple[int, int], trained: bool, bias: bool, scale: float, softcap: float | None
) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(8, 23, bias=bias, dtype=torch.float64).requires_grad_(trained)
    head = Head(linear, scale, softcap)
    hidden = torch.randn(11, 8, dtype=torch.float64)
    target = torch.randint(23, (11,))
    weights = torch.randn(11)

    def run(function):
        h = hidden.clone().requires_grad_()
        linear.zero_grad()
        logps = function(h)
        (logps.float() * weights).sum().backward()
        return logps.float(), h.grad, linear.weight.grad

    def full(h):
        z = linear(h) * scale
        z = softcap * torch.tanh(z / softcap) if softcap else z
        return torch.log_softmax(z, -1).gather(1, target[:, None]).squeeze(1)

    for actual, expected in zip(run(lambda h: token_logps(h, head, target, tile)), run(full), strict=True):
        if expected is None:
            assert actual is None
        else:
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_no_predictions_give_an_empty_result() -> None:
    head = Head(nn.Linear(8, 23, bias=False).requires_grad_(False))
    assert token_logps(torch.randn(0, 8), head, torch.empty(0, dtype=torch.long)).shape == (0,)


class Wrapped(nn.Module):
    """A head with something around it, as peft's are."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear, self.out_features = linear, linear.out_features

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.linear(hidden)


@pytest.mark.parametrize("wrap", [lambda linear: linear, Wrapped], ids=["plain", "wrapped"])
@pytest.mark.parametrize("tile", [(1, 5), (4, 8), (64, 64)])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.5, None), (2.0, 5.0)])
def test_the_likeliest_token_is_argmaxs(wrap, tile: tuple[int, int], scale: float, softcap: float | None) -> None:
    """Of equal ones the first, also where they lie in two tiles; the log-probabilities are those without grades."""
    torch.manual_seed(0)
    linear = nn.Linear(8, 23, bias=False, dtype=torch.float64).requires_grad_(False)
    hidden = 3 * torch.randn(13, 8, dtype=torch.float64)
    if softcap is None:  # products of whole numbers are exact, so that equal logits are equal however they are tiled
        linear.weight.copy_(torch.randint(-3, 4, (23, 8)))
        linear.weight[10] = linear.weight[2]
        linear.weight[4] = linear.weight[3]
        hidden = torch.cat([hidden[:11].round(), 9 * linear.weight[[2, 3]]])
    head = Head(wrap(linear), scale, softcap)
    best = (hidden @ linear.weight.T).argmax(1)
    for target in (best, (best + 1) % 23, best.where(torch.arange(13) % 2 == 0, best + 8 - 16 * (best > 14))):
        logps, right = graded_logps(hidden, head, target, tile)
        assert torch.equal(right, target == best)
        torch.testing.assert_close(logps, token_logps(hidden, head, target, tile), rtol=0, atol=0)
    assert graded_logps(hidden[:0], head, best[:0], tile)[1].shape == (0,)


@pytest.mark.parametrize("wrap", [lambda linear: linear, Wrapped], ids=["plain", "wrapped"])
@pytest.mark.parametrize("tile", [(1, 5), (4, 8), (64, 64)])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.5, None), (2.0, 5.0)])
def test_entropy_equals_that_of_full_logits(wrap, tile: tuple[int, int], scale: float, softcap: float | None) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(8, 23, dtype=torch.float64)
    hidden = 3 * torch.randn(11, 8, dtype=torch.float64, requires_grad=True)
    head = Head(wrap(linear), scale, softcap)
    found = token_entropy(hidden, head, tile)
    expected = torch.distributions.Categorical(logits=head.finish(linear(hidden))).entropy()
    assert not found.requires_grad and found.dtype == torch.float32
    torch.testing.assert_close(found, expected.float(), atol=1e-5, rtol=1e-5)
    assert token_entropy(hidden[:0], head).shape == (0,)


def test_rows_of_a_tile_follow_the_memory_there_is() -> None:
    with torch.device("meta"):
        plain, wrapped = nn.Linear(8, 150_000, bias=False), Wrapped(nn.Linear(8, 150_000, bias=False))
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert tile_of(plain, cpu, torch.bfloat16, 24 * GB) == TILES["cpu"]
    assert tile_of(plain, gpu, torch.bfloat16, 80 * GB) == LARGE_TILE
    assert tile_of(wrapped, gpu, torch.bfloat16, 140 * GB) == (1024, 150_000)
    rows = [tile_of(wrapped, gpu, torch.bfloat16, size * GB)[0] for size in (8, 16, 24, 80, 1000)]
    assert rows == [64, 128, 256, 1024, 2048]
    for size in (16, 24, 80):
        rows, columns = tile_of(wrapped, gpu, torch.bfloat16, size * GB)
        assert rows * columns * bytes_of_logit(wrapped, torch.bfloat16) <= SHARE * size * GB
    assert tile_of(wrapped, cpu, torch.float32, 0)[0] == FEWEST_ROWS


@pytest.mark.parametrize("wrap", [lambda linear: linear, Wrapped], ids=["plain", "wrapped"])
def test_rows_of_a_tile_change_nothing_but_rounding(wrap) -> None:
    torch.manual_seed(0)
    head = Head(wrap(nn.Linear(16, 300)))
    hidden, target = torch.randn(200, 16), torch.randint(300, (200,))
    results = []
    for rows in (64, 128, 512):
        own = hidden.clone().requires_grad_()
        logps = token_logps(own, head, target, (rows, 300))
        results.append([logps, *torch.autograd.grad(logps.sum(), [own, *head.module.parameters()])])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=1e-4, rtol=1e-5)
