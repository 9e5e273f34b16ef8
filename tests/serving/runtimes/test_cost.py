"""The cost curve."""

from __future__ import annotations

import pytest

from serving.runtimes.cost import CostCurve


@pytest.mark.parametrize(("images", "ns"), [(1, 100), (2, 100), (4, 200), (8, 400), (16, 800)])
def test_the_cost_of_any_size_follows_from_those_that_are_known(images: int, ns: float) -> None:
    """Level below the smallest, on the line between two, in proportion beyond the largest."""
    assert CostCurve({8: 400, 2: 100}).ns(images) == ns


def test_nothing_is_known_before_the_first_batch() -> None:
    """Then the first one is taken as it was, and later ones move the curve."""
    curve = CostCurve()
    assert curve.ns(4) == 0
    curve.update(4, 1000)
    assert curve.ns(4) == 1000
    for _ in range(50):
        curve.update(4, 500)
    assert curve.ns(4) == pytest.approx(500, rel=0.01)
    assert curve.points() == {4: curve.ns(4)}


def test_what_slows_one_size_slows_the_others() -> None:
    """By the root of it, as long as they are not seen; their own batches correct it."""
    curve = CostCurve({1: 100, 8: 400})
    curve.update(8, 800)
    assert curve.points() == {1: pytest.approx(100 * 2**0.1), 8: pytest.approx(400 * 2**0.2)}
    for _ in range(50):
        curve.update(8, 800)
        curve.update(1, 100)
    assert curve.points() == {1: pytest.approx(100, rel=0.1), 8: pytest.approx(800, rel=0.1)}


def test_what_passes_leaves_no_trace() -> None:
    """One batch in ten takes a hundred times as long; a size that is not seen keeps its cost all the same."""
    curve = CostCurve({1: 100, 8: 400})
    for _ in range(100):
        curve.update(1, 10_000)
        for _ in range(30):
            curve.update(1, 100)
    assert curve.points() == {1: pytest.approx(100, rel=0.1), 8: pytest.approx(400, rel=0.1)}


def test_a_new_size_is_believed_as_far_as_the_others_allow() -> None:
    """Its first batch was held up for seconds: within some others it is right, and they are not far off."""
    curve = CostCurve({1: 100, 8: 400})
    curve.update(4, 10**6)
    for _ in range(60):
        curve.update(4, 250)
    assert curve.points()[4] == pytest.approx(250, rel=0.1)
    assert 50 <= curve.points()[1] <= 100


def test_the_best_size_is_the_smallest_at_which_an_image_costs_nearly_the_least() -> None:
    """The largest allowed while nothing is known."""
    assert CostCurve({1: 100, 2: 180, 4: 330, 8: 645}).find_best_batch(8) == 4
    assert CostCurve({1: 100, 2: 180, 4: 330, 8: 500}).find_best_batch(4) == 4
    assert CostCurve({1: 100, 2: 180, 4: 330, 8: 500}).find_best_batch(8) == 8
    assert CostCurve().find_best_batch(8) == 8
