"""reference.npz: the held-out images of a version, and the answers of the Keras original to them.

With it, anyone can compare a converted model with the original, without Keras and TensorFlow.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from export.manifest import Manifest, read_file
from resnet import BadInput
from resnet.archives import read_arrays

NAME = "reference.npz"
PREDICTED = "predicted_"  # and the name of a variant


class Reference(NamedTuple):
    """Held-out images and the original's answers.

    Attributes:
        images: uint8 [n, height, width, channels].
        labels: Their classes, int32 [n].
        probabilities: The answers of the Keras original, float32 [n, classes].
        by_class: Order of the images that takes one of each class in turn, int32 [n]: the first k of it are spread as
            evenly over the classes as k images can be.
        predictions: The classes that a variant in lower precision answered when it was certified, int32 [n], by the
            name of the variant.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int32]
    probabilities: NDArray[np.float32]
    by_class: NDArray[np.int32]
    predictions: Mapping[str, NDArray[np.int32]]

    def write(self, path: Path) -> None:
        """Write the file."""
        arrays: dict[str, Any] = {name: value for name, value in self._asdict().items() if name != "predictions"}
        arrays |= {f"{PREDICTED}{name}": classes for name, classes in self.predictions.items()}
        with path.open("wb") as file:
            np.savez_compressed(file, **arrays)

    def choose(self, count: int | None) -> Reference:
        """Return the first `count` images of `by_class`; None or a larger number returns all."""
        if count is None or count >= len(self.labels):
            return self
        chosen = np.sort(self.by_class[:count])
        predictions = {name: classes[chosen] for name, classes in self.predictions.items()}
        return make(self.images[chosen], self.labels[chosen], self.probabilities[chosen], predictions)


def make(
    images: NDArray[np.uint8],
    labels: NDArray[np.int32],
    probabilities: NDArray[np.float32],
    predictions: Mapping[str, NDArray[np.int32]] | None = None,
) -> Reference:
    """Return a reference, with the order of its images; the arguments are as in `Reference`."""
    ranks = np.empty(len(labels), np.int32)  # of each image among those of its class
    for label in np.unique(labels):
        of_class = labels == label
        ranks[of_class] = np.arange(of_class.sum())
    return Reference(images, labels, probabilities, np.lexsort((labels, ranks)).astype(np.int32), predictions or {})


def load(folder: Path, manifest: Manifest) -> Reference:
    """Return the reference of the version in `folder`.

    Raises:
        BadInput: The file was changed, or holds no such arrays.
    """
    try:
        arrays = read_arrays(io.BytesIO(read_file(folder, NAME, manifest)))
        images, labels = unpack_images(arrays)
        answers, by_class = arrays["probabilities"], arrays["by_class"]
        if answers.dtype != np.float32 or answers.shape != (len(images), manifest.output.shape[1]):
            raise ValueError("it has no float32 answer of the original to each image, for each class")
        if labels.min() < 0 or labels.max() >= answers.shape[1]:
            raise ValueError("it has images of classes that the model does not have")
        if by_class.dtype.kind != "i" or not np.array_equal(np.sort(by_class), np.arange(len(images))):
            raise ValueError("it has no order of its images")
        predictions = {
            name.removeprefix(PREDICTED): classes for name, classes in arrays.items() if name.startswith(PREDICTED)
        }
        if any(classes.dtype.kind != "i" or classes.shape != labels.shape for classes in predictions.values()):
            raise ValueError("it has no answer of a variant to each image")
    except KeyError as error:
        raise BadInput(f"{folder / NAME} cannot be read (it lacks the array {error})") from None
    except ValueError as error:
        raise BadInput(f"{folder / NAME} cannot be read ({error})") from None
    return Reference(images, labels, answers, by_class, predictions)


def unpack_images(arrays: Mapping[str, NDArray[Any]]) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Return the arrays `images` and `labels`.

    Raises:
        KeyError: One is missing.
        ValueError: There are no images, or there is not one class for each.
    """
    images, labels = arrays["images"], arrays["labels"]
    if (
        images.dtype != np.uint8
        or images.ndim != 4
        or not images.size
        or labels.dtype.kind != "i"
        or labels.shape != images.shape[:1]
    ):
        raise ValueError("it holds no images with their classes")
    return images, labels
