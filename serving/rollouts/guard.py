"""The guard of a rollout: what was counted, to the verdict of each check. All functions are pure.

A check is broken only if its bound says so, at a confidence that withstands many looks: chance alone ends no rollout.
It has passed only if the bound of the other side says that, or if there were enough requests; until then, the step
lasts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Verdict = Literal["undecided", "passed", "broken"]

# Normal quantiles. A step looks at its checks up to some thousand times, though hardly at new evidence: in simulations,
# 3.3 (one side: 0.05 %) ends fewer than one of a hundred rollouts of an equal version. 1.645 is 95 % on one side.
BREAKS, PASSES = 3.3, 1.645
MIN_IMAGES = MIN_REQUESTS = 50  # before these, one chance difference weighs too much
MIN_FAILURES = 3


@dataclass(frozen=True, kw_only=True)
class GuardSettings:
    """What a new version must keep, beside the stable one.

    Attributes:
        min_agreement: Smallest share of images with the same class as the stable version, 0 to 1.
        max_failures: How much larger its share of failed requests may be, 0 to 1.
        max_slowdown: How many times as long its requests may take, at the median and at p99.
        min_requests: Requests that it answers in a step before the next one, at least.
    """

    min_agreement: float = 0.99
    max_failures: float = 0.01
    max_slowdown: float = 1.5
    min_requests: int = 50


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float


class GuardCheck(NamedTuple):
    """A check, its verdict, and the figures in one clause."""

    name: str
    verdict: Verdict
    detail: str


@dataclass(frozen=True)
class TrafficCounts:
    """Requests that a version answered or failed.

    Attributes:
        answered: Answered ones.
        failed: Those that the server failed or refused for its own reasons.
        latencies_ns: Latencies of the latest answered ones, in nanoseconds.
        times: When those were answered, in seconds of any clock.
    """

    answered: int
    failed: int
    latencies_ns: NDArray[np.int64]
    times: NDArray[np.float64]


def wilson(count: int, total: int, z: float) -> Interval:
    """Return the Wilson score interval of a share (Wilson 1927), 0 to 1; of nothing it is all of that.

    Args:
        count: Those that have a property.
        total: All.
        z: Quantile of the normal distribution, for the confidence of each side.
    """
    if not total:
        return Interval(0.0, 1.0)
    share, scale = count / total, 1 + z * z / total
    middle = (share + z * z / (2 * total)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2)
    # Of none or all, one bound is 0 or 1, which rounding would miss.
    return Interval(max(0.0, middle - half) if count else 0.0, min(1.0, middle + half) if count < total else 1.0)


def check_agreement(same: int, images: int, settings: GuardSettings) -> GuardCheck:
    """Return whether enough images have the same class with both versions."""
    required, broken, passed = settings.min_agreement, wilson(same, images, BREAKS), wilson(same, images, PASSES)
    detail = f"{same:,} of {images:,} images have the same class"
    if images >= MIN_IMAGES and broken.high < required:
        return GuardCheck("agreement", "broken", f"{detail}, at most {broken.high:.2%}; required are {required:.2%}")
    detail += f", at least {passed.low:.2%} of all"
    if images >= MIN_IMAGES and passed.low >= required:
        return GuardCheck("agreement", "passed", detail)
    return GuardCheck("agreement", "undecided", f"{detail}; {required:.2%} must be shown")


def check_failures(canary: TrafficCounts, stable: TrafficCounts, settings: GuardSettings) -> GuardCheck:
    """Return whether the new version fails no more requests than the stable one."""
    total, others = canary.answered + canary.failed, stable.answered + stable.failed
    share, usual = wilson(canary.failed, total, BREAKS), wilson(stable.failed, others, BREAKS).high
    if others < MIN_REQUESTS:  # of which nothing can be said: then none, or as many as did, is what may fail
        usual = stable.failed / others if others else 0.0
    detail = f"{canary.failed:,} of {total:,} requests failed, {stable.failed:,} of {others:,} of the stable version"
    if canary.failed >= MIN_FAILURES and share.low > usual + settings.max_failures:
        allowed = f"at most {usual:.2%} + {settings.max_failures:.2%} are allowed"
        return GuardCheck("failures", "broken", f"{detail}: at least {share.low:.2%}, {allowed}")
    return GuardCheck("failures", "passed", detail)


def check_median(canary: TrafficCounts, stable: TrafficCounts, settings: GuardSettings) -> GuardCheck:
    """Return whether half of the requests of the new version take no longer than half of the stable version's.

    No distribution is assumed: of the new version's requests, more than half must not take longer than the other median
    times what is allowed.
    """
    if min(len(canary.latencies_ns), len(stable.latencies_ns)) < MIN_REQUESTS:
        return GuardCheck("p50", "undecided", _count_few(canary, stable))
    limit = settings.max_slowdown * _bound_quantile(stable.latencies_ns, 0.5)
    return _judge_latency("p50", 0.5, canary, stable, limit, canary.latencies_ns > limit)


def check_tail(canary: TrafficCounts, stable: TrafficCounts, settings: GuardSettings) -> GuardCheck:
    """Return whether no more requests of the new version take very long than of the stable one.

    As `check_median`, with the 99th percentile. What slows all requests down for a moment is nobody's fault: a request
    counts as slow only if it takes longer, too, than each of the stable version within a second of it.
    """
    if min(len(canary.latencies_ns), len(stable.latencies_ns)) < MIN_REQUESTS:
        return GuardCheck("p99", "undecided", _count_few(canary, stable))
    limit = settings.max_slowdown * _bound_quantile(stable.latencies_ns, 0.99)
    start = min(canary.times.min(), stable.times.min())
    ours, theirs = ((np.floor(counts.times) - np.floor(start)).astype(np.int64) for counts in (canary, stable))
    worst = np.zeros(2 + max(ours.max(), theirs.max()) + 1, np.int64)  # of each second, and one before and after
    np.maximum.at(worst, theirs + 1, stable.latencies_ns)
    near = np.maximum.reduce([worst[ours], worst[ours + 1], worst[ours + 2]])
    slow = canary.latencies_ns > np.maximum(limit, near)
    return _judge_latency("p99", 0.99, canary, stable, limit, slow)


def _count_few(canary: TrafficCounts, stable: TrafficCounts) -> str:
    few = f"{len(canary.latencies_ns):,} requests, {len(stable.latencies_ns):,} of the stable version"
    return f"{few}; {MIN_REQUESTS} of each are needed"


def _judge_latency(
    name: str, quantile: float, canary: TrafficCounts, stable: TrafficCounts, limit: float, slow: NDArray[np.bool_]
) -> GuardCheck:
    ours, theirs = (find_quantile(counts.latencies_ns, quantile) / 1e6 for counts in (canary, stable))
    detail = f"{ours:.2f} ms, {theirs:.2f} ms of the stable version"
    if wilson(int(slow.sum()), len(slow), BREAKS).low > 1 - quantile:
        return GuardCheck(
            name, "broken", f"{detail}: {slow.sum():,} of {len(slow):,} requests took longer than {limit / 1e6:.2f} ms"
        )
    return GuardCheck(name, "passed", detail)


def _bound_quantile(values: NDArray[np.int64], quantile: float) -> float:
    """Return the upper bound of a quantile, whose value in a sample may be too low."""
    return find_quantile(values, wilson(round(quantile * len(values)), len(values), BREAKS).high)


def share_window(canary: TrafficCounts, stable: TrafficCounts) -> tuple[TrafficCounts, TrafficCounts]:
    """Return both with the latencies of the same time only: of a version with more requests, fewer seconds are kept."""
    if not len(canary.times) or not len(stable.times):
        return canary, stable
    start = max(canary.times.min(), stable.times.min())
    return _cut(canary, start), _cut(stable, start)


def _cut(counts: TrafficCounts, start: float) -> TrafficCounts:
    kept = counts.times >= start
    return replace(counts, latencies_ns=counts.latencies_ns[kept], times=counts.times[kept])


def find_quantile(values: NDArray[np.int64], quantile: float) -> float:
    """Return a quantile of a sample, as one of its values."""
    return float(np.quantile(values, min(1.0, quantile), method="inverted_cdf"))


def check_requests(canary: TrafficCounts, settings: GuardSettings) -> GuardCheck:
    """Return whether the new version has answered enough requests in this step."""
    detail = f"{canary.answered:,} of at least {settings.min_requests:,} requests answered in this step"
    return GuardCheck("requests", "passed" if canary.answered >= settings.min_requests else "undecided", detail)


def find_verdict(checks: Sequence[GuardCheck]) -> Verdict:
    """Return the verdict of all checks together."""
    verdicts = {check.verdict for check in checks}
    return "broken" if "broken" in verdicts else "undecided" if "undecided" in verdicts else "passed"
