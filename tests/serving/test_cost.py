"""The cost curve."""

from __future__ import annotations

import pytest

from serving.cost import CostCurve


@pytest.mark.parametrize(("images", "ns"), [(1, 100), (2, 100), (4, 200), (8, 400), (16, 800)])
def test_the_cost_of_any_size_follows_from_those_that_are_known(images: int, ns: float) -> None:
    """Level below the smallest, on the line between two, in proportion beyond the largest."""
    assert CostCurve({8: 400, 2: 100}).ns(images) == ns


def test_nothing_is_known_before_the_first_batch() -> None:
    """Then the first one is taken as it was, and later ones move the curve."""
    curve = CostCurve()
    assert curve.ns(4) == 0
    curve.learn(4, 1000)
    assert curve.ns(4) == 1000
    for _ in range(50):
        curve.learn(4, 500)
    assert curve.ns(4) == pytest.approx(500, rel=0.01)
    assert curve.points() == {4: curve.ns(4)}
