"""The statistics of a comparison: what a number of images says of the images to come.

An image on which one of two models is right and the other wrong is discordant: `lost` counts those that only the
original gets right, `gained` those that only the variant does. All others say nothing about which model is better.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Z = 1.6448536269514722  # quantile of the normal distribution at 95 %
TINY = float(np.finfo(np.float32).tiny)  # smaller probabilities have fewer digits, and some libraries flush them to 0
MOST_EXACT = 10_000
MOST_IMAGES = 10**9  # a count above it is refused, so that arithmetic with counts never overflows


def compute_mcnemar(lost: int, gained: int) -> float:
    """Return the p value of McNemar's exact test, two-sided: that both models are equally often right.

    Source: McNemar, Psychometrika 12 (1947), with the binomial distribution in the place of its approximation; above
    `MOST_EXACT` discordant images with that approximation, corrected for continuity (Edwards, Psychometrika 13, 1948).
    """
    total, ways, tail = lost + gained, 1, 0
    if total > MOST_EXACT:
        return math.erfc(max(0, abs(lost - gained) - 1) / math.sqrt(2 * total))
    for count in range(min(lost, gained) + 1):
        tail += ways
        ways = ways * (total - count) // (count + 1)  # of choosing `count + 1` of `total`
    return min(1.0, float(2 * tail / 2**total))


def bound_drop(lost: float, gained: float, images: float) -> float:
    """Return the one-sided upper bound of the loss of accuracy, as a share, at 95 % confidence.

    It is the largest loss that a score test does not reject. If no image is discordant, it is z^2 / (n + z^2).
    Source: Tango, Statistics in Medicine 17 (1998), 891-908.
    """
    low, high = (lost - gained) / images, 1.0
    for _ in range(60):  # halvings, as many as a float has digits
        middle = (low + high) / 2
        linear = (2 * images - lost + gained) * middle - lost - gained
        rest = -gained * middle * (1 - middle)
        share = (math.sqrt(max(0.0, linear**2 - 8 * images * rest)) - linear) / (4 * images)  # of gained images
        deviation = math.sqrt(max(0.0, images * (2 * share + middle * (1 - middle))))
        if images * middle - lost + gained < Z * deviation:
            low = middle
        else:
            high = middle
    return high


def count_needed(lost: int, gained: int, images: int, drop: float) -> int | None:
    """Return how many images would show a loss of at most `drop`, with discordant ones as frequent as among `images`.

    None if no number would, because the measured loss is above that.
    """

    def shows(count: int) -> bool:
        return bound_drop(lost * count / images, gained * count / images, count) <= drop

    if not shows(MOST_IMAGES):
        return None
    low, high = 0, MOST_IMAGES
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if shows(middle) else (middle, high)
    return high


def compute_logits(probabilities: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the logits of a softmax, float64 [n, classes], up to a constant for each image: theirs have a mean of 0.

    They show differences that probabilities hide: of an image that a model is sure of, all classes but one have
    probabilities near 0.
    """
    logits = np.log(np.maximum(probabilities, TINY), dtype=np.float64)
    centred: NDArray[np.float64] = logits - logits.mean(axis=1, keepdims=True)
    return centred


def compute_cosines(expected: NDArray[np.float64], actual: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the cosine between the logits of two models, float64 [n], for each image."""
    lengths = np.linalg.norm(expected, axis=1) * np.linalg.norm(actual, axis=1)
    same = np.all(expected == actual, axis=1)  # also where both are zero, which have no angle
    cosines: NDArray[np.float64] = np.where(same, 1.0, np.sum(expected * actual, axis=1) / np.maximum(lengths, TINY))
    return cosines
