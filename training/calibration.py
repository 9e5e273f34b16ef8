"""Calibrated confidence: of the answers that a network is 80 % sure of, 80 % should be right.

Temperature scaling divides the logits by one number, which changes no predicted class (Guo et al., On Calibration of
Modern Neural Networks, 2017). Needs only numpy until `fit_temperature` is called: export and server use the measure.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

LEAST_IMAGES = 20  # to fit a temperature to: with fewer, a share of right answers says little
BINS = 15  # of confidence, as Guo et al. count them
MOST = 20.0  # the largest temperature, and the inverse of the least
TINY = float(np.finfo(np.float32).tiny)


class Reliability(NamedTuple):
    """Confidence and accuracy of the answers in `BINS` bins of equal width, by confidence.

    Attributes:
        counts: Answers in each bin, int64 [BINS].
        confidence: Sum of their confidence, float64 [BINS].
        right: Number of right ones among them, float64 [BINS].
    """

    counts: NDArray[np.int64]
    confidence: NDArray[np.float64]
    right: NDArray[np.float64]

    @property
    def error(self) -> float:
        """The expected calibration error, 0 to 1: the distance of confidence and accuracy, over all answers."""
        return float(np.abs(self.confidence - self.right).sum() / max(1, self.counts.sum()))


def measure_reliability(probabilities: NDArray[np.float32], labels: NDArray[np.int32]) -> Reliability:
    """Count the answers by confidence, without those that are no numbers.

    Args:
        probabilities: float32 [n, classes].
        labels: The right classes, int32 [n].
    """
    finite = np.isfinite(probabilities).all(axis=1)
    probabilities, labels = probabilities[finite], labels[finite]
    confidence, right = probabilities.max(axis=1).astype(np.float64), probabilities.argmax(axis=1) == labels
    bins = np.clip(np.ceil(confidence * BINS) - 1, 0, BINS - 1).astype(int)
    counts, sums, hits = (np.bincount(bins, weights, BINS) for weights in (None, confidence, right))
    return Reliability(counts.astype(np.int64), sums.astype(np.float64), hits.astype(np.float64))


def measure_error(probabilities: NDArray[np.float32], labels: NDArray[np.int32]) -> float:
    """Return the expected calibration error, as `Reliability.error`; NaN if a probability is not finite."""
    if not np.all(np.isfinite(probabilities)):
        return math.nan
    return measure_reliability(probabilities, labels).error


def fit_temperature(probabilities: NDArray[np.float32], labels: NDArray[np.int32]) -> float:
    """Return the temperature that makes the right classes most probable, from 1 / `MOST` to `MOST`; 1 for no numbers.

    A network that errs on none of a few images would become as good as certain of everything. So the target is not 1,
    but (n + 1) / (n + 2) for n images, as in Platt, Probabilistic Outputs for Support Vector Machines (1999).

    Args:
        probabilities: float32 [n, classes], for images that the network was not trained on.
        labels: The right classes, int32 [n].
    """
    from scipy.optimize import minimize_scalar

    count, classes = probabilities.shape
    if not np.all(np.isfinite(probabilities)):
        return 1.0
    targets = np.full((count, classes), 1 / (count + 2) / (classes - 1))
    targets[np.arange(count), labels] = (count + 1) / (count + 2)

    def compute_loss(log_temperature: float) -> float:
        return -float((targets * _log_soften(probabilities, math.exp(log_temperature))).sum() / count)

    limit = math.log(MOST)
    return math.exp(minimize_scalar(compute_loss, bounds=(-limit, limit), method="bounded").x)


def soften(probabilities: NDArray[np.float32], temperature: float) -> NDArray[np.float32]:
    """Return the probabilities, float32 [n, classes], that the logits make when divided by a temperature."""
    return np.exp(_log_soften(probabilities, temperature)).astype(np.float32)


def _log_soften(probabilities: NDArray[np.float32], temperature: float) -> NDArray[np.float64]:
    logits = np.log(np.maximum(probabilities, TINY), dtype=np.float64) / temperature
    logits -= logits.max(axis=1, keepdims=True)
    scaled: NDArray[np.float64] = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return scaled


def fold_temperature(network: Any, temperature: float) -> None:
    """Divide the logits of a Keras network by a temperature, in place: kernel and bias of its last layer make them."""
    head = network.layers[-1]
    head.set_weights([weight / np.float32(temperature) for weight in head.get_weights()])
