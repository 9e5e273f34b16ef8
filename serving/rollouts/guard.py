"""The guard of a rollout: what was counted, to the verdict of each check. All functions are pure.

A check is broken only if its bound says so, at a confidence that withstands many looks: chance alone ends no rollout.
It has passed only if the bound of the other side says that, or if there were enough requests; until then, the step
lasts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Verdict = Literal["undecided", "passed", "broken"]

# Normal quantiles. A step looks at its checks up to some thousand times, though hardly at new evidence: in simulations,
# 3.3 (one side: 0.05 %) ends fewer than one of a hundred rollouts of an equal version. 1.645 is 95 % on one side.
BREAKS, PASSES = 3.3, 1.645
MIN_IMAGES = 50  # before these, one chance difference weighs too much


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
    """

    answered: int
    failed: int
    latencies_ns: NDArray[np.int64]


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
    return Interval(max(0.0, middle - half), min(1.0, middle + half))


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
    share, usual = wilson(canary.failed, total, BREAKS), wilson(stable.failed, others, BREAKS)
    detail = f"{canary.failed:,} of {total:,} requests failed, {stable.failed:,} of {others:,} of the stable version"
    if share.low > usual.high + settings.max_failures:
        allowed = f"at most {usual.high:.2%} + {settings.max_failures:.2%} are allowed"
        return GuardCheck("failures", "broken", f"{detail}: at least {share.low:.2%}, {allowed}")
    return GuardCheck("failures", "passed", detail)


def check_latency(
    name: str, quantile: float, canary: TrafficCounts, stable: TrafficCounts, settings: GuardSettings
) -> GuardCheck:
    """Return whether the requests of the new version take no longer than those of the stable one.

    Of the requests of the new version, more than `1 - quantile` must not take longer than the stable version's quantile
    times what is allowed. So no distribution is assumed.

    Args:
        name: Of the check.
        quantile: 0 to 1.
        canary: Requests of the new version.
        stable: Requests of the stable version, at about the same time.
        settings: What is allowed.
    """
    ours, theirs = canary.latencies_ns, stable.latencies_ns
    if not len(ours) or not len(theirs):
        return GuardCheck(name, "undecided", "nothing to compare yet")
    # The stable version's quantile may be larger than that of the sample: its upper bound is compared.
    limit = settings.max_slowdown * find_quantile(
        theirs, wilson(round(quantile * len(theirs)), len(theirs), BREAKS).high
    )
    slow = int(np.count_nonzero(ours > limit))
    detail = (
        f"{find_quantile(ours, quantile) / 1e6:.2f} ms, {find_quantile(theirs, quantile) / 1e6:.2f} ms of the stable "
        "version"
    )
    if wilson(slow, len(ours), BREAKS).low > 1 - quantile:
        allowed = f"{slow:,} of {len(ours):,} requests took longer than {limit / 1e6:.2f} ms"
        return GuardCheck(name, "broken", f"{detail}: {allowed}, {settings.max_slowdown:g} times its upper bound")
    return GuardCheck(name, "passed", detail)


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
