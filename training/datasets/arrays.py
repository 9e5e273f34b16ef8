"""An .npz file with the arrays that the loaders of Keras return."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from resnet import BadInput
from training.data import Dataset, Split
from training.datasets import cifar10
from training.images import Resize


def load(source: str, size: tuple[int, int] | None = None, resize: Resize = "bilinear") -> Dataset:  # noqa: ARG001
    """Load the arrays `x_train`, `y_train`, `x_test` and `y_test`, and the class names in `classes` if it is there.

    Images are RGB or grey. Without `classes` the names are the numbers; a file called cifar10.npz has the classes of
    CIFAR-10.

    Raises:
        BadInput: The file cannot be read, lacks an array, or an array has another dtype, shape or range.
    """
    path = Path(source)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise BadInput(f"{path} cannot be read ({error})") from None
    missing = {"x_train", "y_train", "x_test", "y_test"} - arrays.keys()
    if missing:
        raise BadInput(f"{path} has no array {min(missing)!r}; it needs x_train, y_train, x_test and y_test")
    splits = []
    for name in ("train", "test"):
        images, labels = arrays[f"x_{name}"], arrays[f"y_{name}"].ravel()
        if images.ndim == 3:  # as of MNIST
            images = images[..., np.newaxis]
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
            raise BadInput(
                f"{path}: x_{name} must be uint8 [n, height, width, 3], or grey without the last axis or with 1 there, "
                f"not {images.dtype} {list(arrays[f'x_{name}'].shape)}"
            )
        images = np.broadcast_to(images, (*images.shape[:3], 3))  # grey becomes RGB without a copy
        if len(labels) != len(images) or not np.issubdtype(labels.dtype, np.integer) or not len(labels):
            raise BadInput(f"{path}: y_{name} must be {len(images) or 'some'} integers, one for each of x_{name}")
        splits.append(Split(images, labels.astype(np.int32)))
    train, test = splits
    if train.images.shape[1:] != test.images.shape[1:]:
        raise BadInput(f"{path}: the images of x_train and x_test differ in size")
    present = np.unique(np.concatenate([train.labels, test.labels]))
    default = cifar10.CLASSES if path.stem == "cifar10" else tuple(str(label) for label in range(present[-1] + 1))
    classes = tuple(str(name) for name in arrays["classes"]) if "classes" in arrays else default
    if present[0] < 0 or present[-1] >= len(classes) or len(classes) < 2:
        raise BadInput(
            f"{path} has labels from {present[0]} to {present[-1]} for {len(classes)} classes; it needs two or more"
        )
    return Dataset(path.stem, classes, train, test)
