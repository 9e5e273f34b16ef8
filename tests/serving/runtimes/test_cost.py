"""The cost curve."""

from __future__ import annotations

import math
import random

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
    assert curve.points()[1] == pytest.approx(100, rel=0.1)


def test_the_best_size_is_the_smallest_at_which_an_image_costs_nearly_the_least() -> None:
    """The largest allowed while nothing is known."""
    assert CostCurve({1: 100, 2: 180, 4: 330, 8: 645}).find_best_batch(8) == 4
    assert CostCurve({1: 100, 2: 180, 4: 330, 8: 500}).find_best_batch(4) == 4
    assert CostCurve({1: 100, 2: 180, 4: 330, 8: 500}).find_best_batch(8) == 8
    assert CostCurve().find_best_batch(8) == 8
    assert CostCurve({1: 105, 2: 200, 4: 400}).find_best_batch(4) == 1
    assert CostCurve({1: 106, 2: 200, 4: 400}).find_best_batch(4) == 2
    assert CostCurve({1: 100, 8: 8000}).find_best_batch(8) == 8  # two are no comparison
    assert CostCurve({1: 100, 2: 100, 4: 400}).find_best_batch(4) == 2  # three are
    assert CostCurve({1: 100, 2: 150, 3: 200, 4: 100}).find_best_batch(4) == 4


TRUE = {1: 1e6, 2: 1.6e6, 4: 3e6, 8: 5e6, 16: 9e6, 32: 17e6}  # what batches take, in nanoseconds


@pytest.mark.parametrize("seed", range(5))
def test_noise_adds_up_to_nothing(seed: int) -> None:
    """Whatever sizes are computed, and however much a few batches are delayed: other sizes keep their costs, too."""
    draw = random.Random(seed)
    curve = CostCurve(TRUE)
    sizes = draw.sample([1, 2, 4, 8, 16], draw.randint(1, 3))
    for _ in range(5000):
        size = draw.choice(sizes)
        delay = draw.choice((20, 1000)) if draw.random() < 0.002 else draw.uniform(0.9, 1.3)
        curve.update(size, TRUE[size] * delay)
        assert all(ns < 10 * TRUE[size] for size, ns in curve.points().items())
    for size, ns in curve.points().items():
        assert ns == pytest.approx(TRUE[size], rel=0.7)


@pytest.mark.parametrize(
    "wrong",
    [
        dict.fromkeys(TRUE, 1.0),
        dict.fromkeys(TRUE, 1e15),
        dict.fromkeys(TRUE, math.inf),
        dict.fromkeys(TRUE, math.nan),
        dict.fromkeys(TRUE, 0.0),
        dict.fromkeys(TRUE, -1.0),
        {1: 1e6, 2: math.inf, 4: 1e14, 8: 0.0, 32: 5e-324},
        {32: 1e12},
    ],
    ids=str,
)
def test_any_curve_becomes_right(wrong: dict[int, float]) -> None:
    """By a hundred batches of each size, with noise; nothing that no batch takes is believed at all."""
    draw = random.Random(0)
    curve = CostCurve(wrong)
    for _ in range(100):
        for size in draw.sample(sorted(TRUE), len(TRUE)):
            curve.update(size, TRUE[size] * draw.uniform(0.9, 1.3))
    for size in (1, 8, 32):
        assert curve.ns(size) == pytest.approx(TRUE[size], rel=0.5)


def test_one_batch_tells_a_cost_that_is_far_too_high() -> None:
    """Nothing makes a batch faster than it is."""
    curve = CostCurve({1: 1e12, 32: 17e12})
    curve.update(1, 1e6)
    assert curve.ns(1) == pytest.approx(4e6)
    curve.update(32, 17e6)
    assert curve.ns(32) == pytest.approx(4 * 17e6)


@pytest.mark.parametrize("ns", [math.inf, math.nan, 0, -5])
def test_a_time_that_is_none_breaks_nothing(ns: float) -> None:
    """A clock may be set, or a number overflow."""
    curve = CostCurve(TRUE)
    for _ in range(3):
        curve.update(4, ns)
        curve.update(4, 3e6)
    for _ in range(100):
        curve.update(4, 3e6)
    assert curve.points()[4] == pytest.approx(3e6, rel=0.01)


def test_a_measurement_is_believed_from_a_nanosecond_to_eleven_days() -> None:
    """Others count as not measured."""
    assert CostCurve({1: 1, 2: 0.9, 4: 1.1e15, 8: 1e15}).points() == {1: 1, 8: 1e15}


def test_a_batch_beyond_the_largest_size_tells_about_that_size() -> None:
    """No number of sizes makes the curve long."""
    curve = CostCurve({1: 100, 4: 400})
    for size in range(5, 100):
        curve.update(size, 200 * size)
    assert curve.points() == {1: pytest.approx(200, rel=0.5), 4: pytest.approx(800, rel=0.1)}
