"""The arithmetic of the guard, against scipy and against chance."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy import stats

from serving.rollouts import guard
from serving.rollouts.guard import GuardCheck, GuardSettings, TrafficCounts, wilson
from tests.acceptance.alarms import TRAFFIC, simulate

SETTINGS = GuardSettings()


def traffic(
    latencies_ms: object = (), failed: int = 0, answered: int | None = None, times: object = None
) -> TrafficCounts:
    """Return the counts of some requests, which all were in the same second unless `times` says when."""
    ns = (np.array(latencies_ms, np.float64) * 1e6).astype(np.int64)
    moments = np.zeros(len(ns)) if times is None else np.array(times, np.float64)
    return TrafficCounts(len(ns) if answered is None else answered, failed, ns, moments)


@pytest.mark.parametrize("total", [1, 2, 10, 57, 1000, 123_456])
@pytest.mark.parametrize("z", [guard.PASSES, guard.BREAKS])
def test_the_interval_is_scipys(total: int, z: float) -> None:
    """For shares from none to all."""
    level = 2 * stats.norm.cdf(z) - 1
    for count in sorted({0, 1, total // 3, total - 1, total}):
        expected = stats.binomtest(count, total).proportion_ci(level, method="wilson")
        assert wilson(count, total, z) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert wilson(0, 0, z) == (0, 1)


@pytest.mark.parametrize(
    ("same", "images", "verdict"),
    [
        (0, 0, "undecided"),
        (0, 49, "undecided"),  # too few, whatever they say
        (0, 50, "broken"),
        (46, 50, "broken"),
        (50, 50, "undecided"),  # all agree, and yet one of a hundred may not
        (266, 266, "undecided"),
        (268, 268, "passed"),
        (980, 1000, "undecided"),
        (9_750, 10_000, "broken"),
        (9_940, 10_000, "passed"),
    ],
)
def test_agreement_is_judged_by_its_bounds(same: int, images: int, verdict: str) -> None:
    """Broken below 99 % at most, passed above 99 % at least."""
    check = guard.check_agreement(same, images, SETTINGS)
    assert check.verdict == verdict
    assert f"{same:,} of {images:,} images have the same class" in check.detail


def test_equal_answers_break_nothing_even_where_all_must_agree() -> None:
    """Whatever the number of images: no bound of all is below all, as rounding would have it."""
    strict = dataclasses.replace(SETTINGS, min_agreement=1.0)
    assert {guard.check_agreement(count, count, strict).verdict for count in range(1000)} == {"undecided"}


@pytest.mark.parametrize(
    ("canary", "stable", "verdict"),
    [
        ((0, 0), (0, 0), "passed"),
        ((0, 3), (60, 0), "broken"),
        ((0, 2), (1000, 0), "passed"),  # chance
        ((1, 3), (1000, 0), "broken"),
        ((0, 3), (0, 60), "passed"),  # both fail
        ((0, 3), (0, 5), "passed"),
        ((0, 8), (0, 0), "broken"),  # nobody else is asked: what fails is the new version's fault
        ((796, 4), (0, 0), "passed"),
        ((0, 400), (3, 0), "broken"),
        ((900, 100), (9000, 1000), "passed"),
        ((900, 100), (9950, 50), "broken"),
        ((995, 5), (10_000, 0), "passed"),  # within the point that is allowed
        ((960, 40), (10_000, 0), "broken"),
    ],
)
def test_failures_are_compared_with_those_of_the_stable_version(
    canary: tuple[int, int], stable: tuple[int, int], verdict: str
) -> None:
    """By the bounds of both shares; each pair is answered and failed."""
    counts = [traffic(answered=answered, failed=failed) for answered, failed in (canary, stable)]
    assert guard.check_failures(*counts, SETTINGS).verdict == verdict


@pytest.mark.parametrize(("factor", "verdict"), [(0.5, "passed"), (1.3, "passed"), (2.0, "broken")])
def test_the_median_may_grow_by_half(factor: float, verdict: str) -> None:
    """Whatever the distribution."""
    random = np.random.default_rng(0)
    stable, canary = traffic(random.lognormal(size=4000)), traffic(factor * random.lognormal(size=400))
    assert guard.check_median(canary, stable, SETTINGS).verdict == verdict


@pytest.mark.parametrize(("slow", "verdict"), [(1, "passed"), (4, "passed"), (20, "broken")])
def test_more_than_one_of_a_hundred_may_not_be_slow(slow: int, verdict: str) -> None:
    """At a median that is the same."""
    stable = traffic(np.linspace(1, 2, 4000))
    canary = traffic([*np.linspace(1, 2, 400 - slow), *[5.0] * slow])
    assert guard.check_median(canary, stable, SETTINGS).verdict == "passed"
    assert guard.check_tail(canary, stable, SETTINGS).verdict == verdict


def test_what_slows_all_for_a_moment_is_nobodys_fault() -> None:
    """The same slow requests a minute later, when those of the stable version were quick, are."""
    quick, slow = np.ones(300), np.full(20, 50.0)
    stable = traffic([*np.ones(9000), 60.0], times=[*np.linspace(0, 100, 9000), 10.5])
    times = np.linspace(0, 100, 300)
    for moment, verdict in ((9.5, "passed"), (11.4, "passed"), (12.5, "broken"), (70.0, "broken")):
        canary = traffic([*quick, *slow], times=[*times, *[moment] * 20])
        assert guard.check_tail(canary, stable, SETTINGS).verdict == verdict


def test_latencies_of_the_same_time_are_compared() -> None:
    """Of a version with more requests, fewer seconds are kept; the load may have been another before."""
    canary = traffic([*[9.0] * 100, *[1.0] * 100], times=np.arange(200))
    stable = traffic([1.0] * 1000, times=np.linspace(100, 200, 1000))
    assert guard.check_median(canary, stable, SETTINGS).verdict == "passed"
    assert guard.check_tail(canary, stable, SETTINGS).verdict == "broken"
    ours, theirs = guard.share_window(canary, stable)
    assert (len(ours.times), len(theirs.times), ours.answered) == (100, 1000, 200)
    assert guard.check_tail(ours, theirs, SETTINGS).verdict == "passed"
    assert guard.share_window(traffic(), stable)[1] is stable


def test_few_requests_are_no_ground_for_anything() -> None:
    """Nor for going on."""
    few, many = traffic([9.0] * 49), traffic([1.0] * 1000)
    for check in (guard.check_median, guard.check_tail):
        assert check(few, many, SETTINGS).verdict == check(many, few, SETTINGS).verdict == "undecided"
    assert guard.check_requests(few, SETTINGS).verdict == "undecided"
    assert guard.check_requests(many, SETTINGS).verdict == "passed"


def test_one_broken_check_is_enough() -> None:
    """And one that is undecided keeps the others waiting."""
    checks = {verdict: GuardCheck("x", verdict, "") for verdict in ("passed", "undecided", "broken")}
    assert guard.find_verdict([checks["passed"], checks["broken"], checks["undecided"]]) == "broken"
    assert guard.find_verdict([checks["passed"], checks["undecided"]]) == "undecided"
    assert guard.find_verdict([checks["passed"]] * 2) == "passed"


@pytest.mark.slow
@pytest.mark.parametrize("traffic", TRAFFIC)
def test_chance_rolls_nothing_back(traffic: str) -> None:
    """Not a version that is as good, though both fail and stall now and then; the acceptance check does a thousand."""
    outcomes = [simulate(TRAFFIC[traffic], seed) for seed in range(2)]
    assert not [outcome for outcome in outcomes if outcome.broken]
