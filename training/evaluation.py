"""What a trained network is worth, by the test images, which nothing else in a training uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from training import calibration
from training.batches import Batches
from training.data import Split
from training.heads import to_probabilities

BATCH = 256


def predict(network: keras.Model, split: Split, indices: NDArray[np.intp] | None = None) -> NDArray[np.float32]:
    """Return the probabilities of the images at some indices, or of all: float32 [n, classes]."""
    chosen = np.arange(len(split.labels)) if indices is None else indices
    batches = Batches(split, chosen, network.output_shape[-1], BATCH)
    return to_probabilities(np.asarray(network.predict(batches, verbose=0)))


def count_confusion(probabilities: NDArray[np.float32], labels: NDArray[np.int32]) -> NDArray[np.int_]:
    """Return the confusion matrix, [true class, predicted class].

    Args:
        probabilities: float32 [n, classes].
        labels: The right classes, int32 [n].
    """
    confusion = np.zeros((probabilities.shape[1],) * 2, int)
    np.add.at(confusion, (labels, probabilities.argmax(axis=1)), 1)
    return confusion


def evaluate(
    probabilities: NDArray[np.float32], labels: NDArray[np.int32], classes: Sequence[str], temperature: float | None
) -> dict[str, Any]:
    """Return accuracy, loss and calibration error, as metrics.json has them.

    Args:
        probabilities: float32 [n, classes].
        labels: The right classes, int32 [n].
        classes: Their names; one without images has no accuracy.
        temperature: The number by which the training divided the logits; None if it left them as they were.
    """
    confusion, of_right = count_confusion(probabilities, labels), probabilities[np.arange(len(labels)), labels]
    metrics: dict[str, Any] = {
        "accuracy": float(np.trace(confusion) / len(labels)),
        "loss": float(-np.log(np.maximum(of_right, keras.config.epsilon())).mean()),
        "class_accuracy": {
            name: float(row[label] / row.sum()) if row.any() else None
            for label, (name, row) in enumerate(zip(classes, confusion, strict=True))
        },
        "calibration_error": calibration.measure_error(probabilities, labels),
    }
    if temperature is not None:
        before = calibration.measure_error(calibration.soften(probabilities, 1 / temperature), labels)
        metrics["calibration"] = {"temperature": temperature, "error_before": before}
    return metrics
