"""The two heads of a classifier: a softmax over all classes, or a sigmoid for the second of two."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from resnet import BadInput

HEADS = ("softmax", "sigmoid")


def count_outputs(head: str | None, classes: int) -> int:
    """Return the number of outputs of a network: one for each class, or 1, the probability of the second of two.

    Without a head there is one for each class.

    Raises:
        BadInput: A sigmoid does not fit the number of classes.
    """
    if head == "sigmoid" and classes != 2:
        raise BadInput(f"--head sigmoid is for two classes, and the data have {classes}; leave it out")
    return 1 if head == "sigmoid" else classes


def make_targets(outputs: int) -> NDArray[np.float32]:
    """Return what a network with so many outputs should answer to each class: float32 [classes, outputs]."""
    return np.eye(outputs, dtype=np.float32) if outputs > 1 else np.array([[0], [1]], np.float32)


def to_probabilities(answers: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the probability of each class, float32 [n, classes], from the answers of a network, [n, outputs]."""
    return np.concatenate([1 - answers, answers], axis=1) if answers.shape[1] == 1 else answers
