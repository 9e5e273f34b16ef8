"""Percentiles and their intervals, against published ranks and against chance."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.load.percentiles import estimate


def test_a_percentile_is_a_sample() -> None:
    """The smallest that is no less than that share of all, in any order."""
    samples = np.random.default_rng(0).permutation(np.arange(1.0, 101))
    assert [estimate(samples, percent).value for percent in (50, 99, 99.9)] == [50, 99, 100]


def test_the_interval_of_a_median_has_the_known_ranks() -> None:
    """For 100 samples and 95 %, tables of the sign test give the 40th and the 61st."""
    assert estimate(np.arange(1.0, 101), 50)[1:] == (40, 61)


def test_too_few_samples_have_no_bound() -> None:
    """Nothing says how far above 50 samples their 99th percentile may lie."""
    found = estimate(np.arange(1.0, 51), 99)
    assert found.low is not None
    assert found.high is None
    assert estimate(np.array([3.0]), 50) == (3.0, None, None)


@pytest.mark.parametrize("percent", [50, 95])
def test_the_interval_holds_the_truth_as_often_as_it_says(percent: float) -> None:
    """Of 1,000 sets of 200 exponential samples, at least 94 % of the intervals hold the true percentile."""
    random, truth = np.random.default_rng(0), -np.log(1 - percent / 100)
    found = [estimate(random.exponential(size=200), percent) for _ in range(1000)]
    held = [low is not None and high is not None and low <= truth <= high for _, low, high in found]
    assert np.mean(held) >= 0.94
