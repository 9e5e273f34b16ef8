"""What a number of images says: against other implementations, other derivations, and figures by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import optimize, stats

from export import statistics


@pytest.fixture
def small_network() -> None:
    """Nothing is trained here."""


@pytest.mark.parametrize(
    ("lost", "gained"), [(0, 0), (1, 0), (0, 1), (3, 3), (3, 4), (9, 2), (2, 30), (120, 150), (1000, 900), (5000, 0)]
)
def test_mcnemar_is_the_exact_binomial_test(lost: int, gained: int) -> None:
    """Of a coin: as many heads as images that only one of the models gets right."""
    expected = stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    assert statistics.compute_mcnemar(lost, gained) == pytest.approx(expected, rel=1e-9)
    assert statistics.compute_mcnemar(gained, lost) == statistics.compute_mcnemar(lost, gained)


def test_thousands_of_discordant_images_overflow_nothing() -> None:
    """A share of 2 to the power of 20,000, which no float holds."""
    assert 0.15 < statistics.compute_mcnemar(10_000, 10_200) < 0.17
    assert statistics.compute_mcnemar(20_000, 0) == 0
    assert statistics.compute_mcnemar(5_000, 5_001) == pytest.approx(1, abs=0.01)  # above, an approximation
    assert statistics.compute_mcnemar(4_900, 5_100) == pytest.approx(statistics.compute_mcnemar(4_901, 5_101), abs=1e-3)
    assert statistics.compute_mcnemar(10**9, 10**9) == 1


def find_bound(lost: int, gained: int, images: int) -> float:
    """Return the bound by the likelihood: the cells of the table are fitted numerically, for each loss."""
    same = images - lost - gained

    def measure(loss: float) -> float:
        low, high = max(0.0, -loss), (1 - loss) / 2

        def improbability(share: float) -> float:
            cells = ((lost, share + loss), (gained, share), (same, 1 - 2 * share - loss))
            return -sum(count * math.log(max(cell, 1e-300)) for count, cell in cells if count)

        fit = optimize.minimize_scalar(improbability, bounds=(low, high), method="bounded", options={"xatol": 1e-12})
        share = min([fit.x, low, high], key=improbability)
        variance = images * (2 * share + loss * (1 - loss))
        return (images * loss - lost + gained) / math.sqrt(variance) - stats.norm.ppf(0.95)

    return float(optimize.brentq(measure, (lost - gained) / images + 1e-9, 1 - 1e-9, xtol=1e-13))


@pytest.mark.parametrize(
    ("lost", "gained", "images"),
    [
        (0, 0, 10),
        (1, 0, 50),
        (0, 1, 50),
        (0, 9, 50),
        (5, 5, 100),
        (2, 0, 1000),
        (30, 20, 400),
        (7, 0, 5000),
        (49, 1, 50),
    ],
)
def test_the_bound_is_that_of_the_score_test(lost: int, gained: int, images: int) -> None:
    """It rejects every larger loss; here the maximum of the likelihood is searched for, not solved for."""
    assert statistics.bound_drop(lost, gained, images) == pytest.approx(find_bound(lost, gained, images), abs=2e-6)


def test_the_bound_has_known_values() -> None:
    """Without discordant images it is z^2 / (n + z^2); images that are all lost show nothing."""
    square = stats.norm.ppf(0.95) ** 2
    for images in (1, 2, 539, 10**9):
        assert statistics.bound_drop(0, 0, images) == pytest.approx(square / (images + square), rel=1e-9)
    assert statistics.bound_drop(1, 0, 1) == 1
    assert 0 < statistics.bound_drop(0, 1, 1) < 1
    assert statistics.bound_drop(50, 0, 50) == 1
    assert -1 < statistics.bound_drop(0, 50, 50) < 0


def test_the_bound_grows_with_losses_and_shrinks_with_gains_and_images() -> None:
    """And is above the loss as measured."""
    bounds = [statistics.bound_drop(lost, 3, 500) for lost in range(20)]
    assert bounds == sorted(bounds)
    assert all(bound > (lost - 3) / 500 for lost, bound in enumerate(bounds))
    bounds = [statistics.bound_drop(3, gained, 500) for gained in range(20)]
    assert bounds == sorted(bounds, reverse=True)
    bounds = [statistics.bound_drop(2, 1, images) for images in (10, 100, 1000, 10**6, 10**9)]
    assert bounds == sorted(bounds, reverse=True)


@pytest.mark.parametrize(("lose", "gain", "images"), [(0.01, 0.005, 1000), (0.02, 0.02, 500), (0.004, 0.001, 5000)])
def test_the_bound_is_above_the_loss_nineteen_times_of_twenty(lose: float, gain: float, images: int) -> None:
    """Of 4,000 draws of images, from a population with these shares of discordant ones."""
    draws = np.random.default_rng(0).multinomial(images, [lose, gain, 1 - lose - gain], size=4000)
    counts, times = np.unique(draws[:, :2], axis=0, return_counts=True)
    above = [statistics.bound_drop(int(lost), int(gained), images) >= lose - gain for lost, gained in counts]
    assert np.average(above, weights=times) == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize(
    ("lost", "gained", "images", "drop", "needed"),
    [(0, 0, 100, 0.005, 539), (0, 0, 7, 0.002, 1351), (0, 0, 1, 0.001, 2703), (0, 0, 360, 1.0, 1)],
)
def test_the_number_of_images_that_is_needed_is_exact(
    lost: int, gained: int, images: int, drop: float, needed: int
) -> None:
    """So many show it, and one less do not."""
    assert statistics.count_needed(lost, gained, images, drop) == needed
    assert statistics.bound_drop(0, 0, needed) <= drop
    assert needed == 1 or statistics.bound_drop(0, 0, needed - 1) > drop


@pytest.mark.parametrize(
    ("lost", "gained", "images", "drop"), [(2, 0, 1000, 0.005), (7, 5, 300, 0.01), (1, 9, 400, 0.002)]
)
def test_discordant_images_become_more_with_the_images(lost: int, gained: int, images: int, drop: float) -> None:
    """In the same shares."""
    needed = statistics.count_needed(lost, gained, images, drop)
    assert needed
    for count, is_shown in ((needed, True), (needed - 1, False)):
        bound = statistics.bound_drop(lost * count / images, gained * count / images, count)
        assert (bound <= drop) == is_shown


@pytest.mark.parametrize(("lost", "images", "drop"), [(2, 1000, 0.002), (2, 1000, 0.001), (0, 1000, 0.0)])
def test_no_number_of_images_shows_what_is_not_so(lost: int, images: int, drop: float) -> None:
    """A loss as large as the limit, or larger, or none at all."""
    assert statistics.count_needed(lost, 0, images, drop) is None


def test_logits_are_those_of_the_softmax_but_for_a_constant() -> None:
    """They add up to 0; what a float32 cannot tell from 0 counts as the smallest that it can."""
    logits = np.random.default_rng(0).normal(size=(5, 7))
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    centred = logits - logits.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(statistics.compute_logits(softmax.astype(np.float32)), centred, atol=1e-6)
    assert statistics.compute_logits(softmax.astype(np.float32)).dtype == np.float64
    certain = statistics.compute_logits(np.array([[1, 0], [1, 1e-45]], np.float32))
    np.testing.assert_allclose(certain, [[43.668, -43.668]] * 2, atol=1e-3)
    assert np.isnan(statistics.compute_logits(np.array([[np.nan, 1]], np.float32))).all()


def test_cosines_are_between_the_logits_of_each_image() -> None:
    """1 for the same direction, -1 for the opposite one, 0 at a right angle; 1 for two that are 0, 0 if only one is."""
    expected = np.array([[1.0, -1.0, 0.0], [1.0, -1.0, 0.0], [1.0, -1.0, 0.0], [0.0] * 3, [0.0] * 3])
    actual = np.array([[2.0, -2.0, 0.0], [-3.0, 3.0, 0.0], [1.0, 1.0, -2.0], [0.0] * 3, [1.0, -1.0, 0.0]])
    np.testing.assert_allclose(statistics.compute_cosines(expected, actual), [1, -1, 0, 1, 0], atol=1e-12)
