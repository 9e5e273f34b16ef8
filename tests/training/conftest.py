"""The small network is in the family for every test here, whether it asks for it or not."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def small_network(tiny: str) -> str:
    """Return its name."""
    return tiny


@pytest.fixture(autouse=True)
def without_pictures(no_pictures: None) -> None:
    """Leave out the pictures in every test; test_plots.py draws them."""
