"""The trend of a footprint is that of most samples."""

from __future__ import annotations

import os

import numpy as np
import pytest

from tests.acceptance.footprint import Footprint, fit_growth


def test_a_leak_is_the_growth_over_the_time() -> None:
    """In the unit of the values."""
    times = np.arange(100.0)
    assert fit_growth(times, 300 + 0.5 * times) == pytest.approx(49.5)


def test_a_peak_is_no_growth() -> None:
    """Nor one at the end."""
    values = np.full(100, 300.0)
    values[[40, 41, 97, 98, 99]] = 900
    assert fit_growth(np.arange(100.0), values) == 0


def test_one_sample_has_no_trend() -> None:
    """A short check may have no second one."""
    assert fit_growth(np.ones(1), np.ones(1)) == 0


def test_the_footprint_is_of_the_process() -> None:
    """A descriptor more is one more."""
    before = Footprint.read(os.getpid())
    reading, writing = os.pipe()
    after = Footprint.read(os.getpid())
    os.close(reading)
    os.close(writing)
    assert after.descriptors - before.descriptors == 2
    assert after.threads >= 1
    assert after.megabytes > 1
