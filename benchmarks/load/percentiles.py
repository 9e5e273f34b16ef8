"""Percentiles of raw samples, with their confidence intervals."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A percentile and its confidence interval.

    Attributes:
        value: The percentile of the samples.
        low: Lower bound; None where there are too few samples to know it.
        high: Upper bound; None where there are too few samples to know it.
    """

    value: float
    low: float | None
    high: float | None


def estimate(samples: NDArray[np.float64], percent: float, confidence: float = CONFIDENCE) -> Estimate:
    """Return a percentile of `samples` with its confidence interval.

    The bounds are samples themselves: the number of samples below the true percentile follows the binomial
    distribution, whatever the distribution of the samples is (David and Nagaraja, Order Statistics, 3rd ed., section
    7.1). This assumes independent samples; requests that shared a batch are not quite, so the true interval may be a
    little wider.

    Args:
        samples: At least one, in any order.
        percent: Between 0 and 100, exclusive.
        confidence: Probability that the interval contains the true percentile.
    """
    ranked, share = np.sort(samples), percent / 100
    count = len(ranked)
    below = np.cumsum(_binomial(count, share))  # at index k: the probability that at most k samples lie below
    tail = (1 - confidence) / 2
    low = int(np.searchsorted(below, tail))  # the largest rank with at most `tail` before it
    high = int(np.searchsorted(below, 1 - tail)) + 1
    return Estimate(
        float(ranked[max(0, math.ceil(share * count) - 1)]),
        float(ranked[low - 1]) if low >= 1 else None,
        float(ranked[high - 1]) if high <= count else None,
    )


def _binomial(count: int, share: float) -> NDArray[np.float64]:
    """Return the probability of each number of successes, 0 to `count`."""
    log_factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, count + 1)))])
    successes = np.arange(count + 1)
    log_ways = log_factorials[-1] - log_factorials - log_factorials[::-1]
    probabilities: NDArray[np.float64] = np.exp(
        log_ways + successes * math.log(share) + successes[::-1] * math.log(1 - share)
    )
    return probabilities
