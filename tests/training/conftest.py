"""The small network is in the family for every test here, whether it asks for it or not."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(autouse=True)
def small_network(tiny: str) -> str:
    """Return its name."""
    return tiny


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the pictures, which take longer than a training here; test_plots.py draws them."""
    if "training.train" in sys.modules:
        for name in ("plot_confusion", "plot_mistakes", "plot_reliability"):
            monkeypatch.setattr(f"training.train.{name}", lambda *_: None)
        monkeypatch.setattr("training.checkpoints.plot_curves", lambda *_: None)
