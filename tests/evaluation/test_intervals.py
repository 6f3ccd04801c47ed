"""Intervals hold what they promise where the truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from trueup.recipes.evaluation.intervals import Bootstrap, at_equal_length

TRIALS = 200


def coverage(truth: float, draw) -> float:
    """Of many data sets, the share whose interval holds the truth."""
    found = [draw(np.random.default_rng(trial)) for trial in range(TRIALS)]
    return float(np.mean([e.low <= truth <= e.high for e in found]))


def test_intervals_of_a_mean_an_accuracy_and_a_perplexity_cover_the_truth():
    boot = Bootstrap(300)

    def perplexity(rng):
        counts = rng.integers(5, 40, 150)
        sums = counts * 2.0 + rng.normal(0, 3, 150)  # nats of rows: 2 a token
        return boot.ratio(sums, counts, np.exp)

    assert 0.9 <= coverage(1.5, lambda rng: boot.mean(rng.normal(1.5, 2.0, 80))) <= 0.99
    assert 0.9 <= coverage(0.7, lambda rng: boot.share(rng.random(120) < 0.7)) <= 0.99
    assert 0.9 <= coverage(np.exp(2.0), perplexity) <= 0.99


def pairs(rng, at_equal: float, pull: float, n: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """Pairs whose chosen answers tend to be longer, judged by someone who likes length."""
    longer = rng.normal(20, 30, n)
    logit = np.log(at_equal / (1 - at_equal)) + pull * np.tanh(longer / 30)
    return (rng.random(n) < 1 / (1 + np.exp(-logit))).astype(float), longer


def test_length_controlled_accuracy_finds_what_length_hides_and_its_interval_covers_it():
    boot = Bootstrap(300)
    hits, longer = pairs(np.random.default_rng(1), 0.5, 3.0, 4000)
    assert hits.mean() > 0.65  # length alone
    assert boot.length_controlled(hits, longer).value == pytest.approx(0.5, abs=0.05)
    assert 0.9 <= coverage(0.6, lambda rng: boot.length_controlled(*pairs(rng, 0.6, 1.5))) <= 0.99


def test_length_controlled_accuracy_is_the_accuracy_where_length_says_nothing():
    rng = np.random.default_rng(0)
    hits = (rng.random(2000) < 0.8).astype(float)
    boot = Bootstrap(0)
    assert boot.length_controlled(hits, rng.normal(0, 10, 2000)).value == pytest.approx(hits.mean(), abs=0.01)
    assert boot.length_controlled(hits, np.zeros(2000)).value == pytest.approx(hits.mean(), abs=1e-6)
    assert boot.length_controlled(np.ones(50), rng.normal(5, 10, 50)).value == pytest.approx(1.0, abs=1e-6)


def test_the_fit_is_the_maximum_of_the_likelihood():
    rng = np.random.default_rng(3)
    hits, longer = pairs(rng, 0.7, 1.0)
    weights = np.ones((1, len(hits)))
    a = np.log(1 / at_equal_length(hits, longer, weights)[0] - 1) * -1
    x = np.tanh(longer / longer.std())

    def loss(a: float) -> float:
        """The best over b, by brute force."""
        b = np.linspace(-5, 5, 2001)[:, None]
        z = a + b * x
        return float(np.min((np.logaddexp(0, z) - hits * z).sum(1) + 0.5 * b[:, 0] ** 2))

    assert loss(a) <= min(loss(a - 0.02), loss(a + 0.02))


def test_rows_that_all_agree_do_not_make_a_figure_certain():
    found = Bootstrap(100).share(np.ones(20))
    assert (found.value, found.high) == (1.0, 1.0) and found.low == pytest.approx(0.839, abs=0.001)
    assert Bootstrap(100).share(np.zeros(20)).high == pytest.approx(0.161, abs=0.001)


def test_draws_depend_on_the_seed_and_the_number_of_rows_alone():
    values = np.arange(10.0)
    assert Bootstrap(50, 1).mean(values) == Bootstrap(50, 1).mean(values) != Bootstrap(50, 2).mean(values)
    both = Bootstrap(50, 1).mean(values), Bootstrap(50, 1).mean(values + 1)
    assert both[1].low == pytest.approx(both[0].low + 1)


def test_one_row_has_no_interval_and_none_no_value():
    assert Bootstrap().mean(np.array([3.0])).low is None
    assert np.isnan(Bootstrap().mean(np.array([])).value)
