"""Arrivals are decided ahead, and are what they say."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.load.arrivals import ARRIVALS, constant, poisson


@pytest.mark.parametrize("name", ARRIVALS)
def test_arrivals_ascend_within_the_time(name: str) -> None:
    """The same seed gives the same ones."""
    times = ARRIVALS[name](200, 3, 1)
    np.testing.assert_array_equal(times, ARRIVALS[name](200, 3, 1))
    assert (np.diff(times) >= 0).all()
    assert 0 <= times[0] < times[-1] < 3


def test_constant_arrivals_are_evenly_spaced() -> None:
    """Ten a second are a tenth of a second apart."""
    np.testing.assert_allclose(constant(10, 1, 0), np.arange(10) / 10)


def test_poisson_gaps_vary_as_much_as_they_last() -> None:
    """Exponential gaps have a standard deviation like their mean; those of even arrivals have none."""
    gaps = np.diff(poisson(1000, 20, 0))
    assert np.mean(gaps) == pytest.approx(1e-3, rel=0.02)
    assert np.std(gaps) == pytest.approx(np.mean(gaps), rel=0.05)
    assert len(poisson(1000, 20, 0)) != len(poisson(1000, 20, 1))
