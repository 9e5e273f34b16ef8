"""An .npz file with the arrays that the loaders of Keras return."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resnet import BadInput
from resnet.archives import read_arrays
from training.data import Dataset, ImageForm, Split
from training.datasets import cifar10
from training.images import CHANNELS

MAX_CLASSES = 2**16  # without names


def load(source: str, form: ImageForm) -> Dataset:  # noqa: ARG001
    """Load the arrays `x_train`, `y_train`, `x_test` and `y_test`, and the class names in `classes` if it is there.

    Images are grey, RGB or RGBA, and keep their channels. Without `classes` the names are the numbers; a file called
    cifar10.npz has the classes of CIFAR-10.

    Raises:
        BadInput: The file cannot be read, lacks an array, or an array has another dtype, shape or range.
    """
    path = Path(source)
    try:
        arrays = read_arrays(path)
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read ({error})") from None
    missing = {"x_train", "y_train", "x_test", "y_test"} - arrays.keys()
    if missing:
        raise BadInput(f"{path} has no array {min(missing)!r}; it needs x_train, y_train, x_test and y_test")
    splits = []
    for name in ("train", "test"):
        images, labels = arrays[f"x_{name}"], arrays[f"y_{name}"].ravel()
        if images.ndim == 3:  # as of MNIST
            images = images[..., np.newaxis]
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in CHANNELS.values():
            raise BadInput(
                f"{path}: x_{name} must be uint8 [n, height, width, channels] with 1, 3 or 4 channels, or [n, height, "
                f"width] of grey, not {images.dtype} {list(arrays[f'x_{name}'].shape)}"
            )
        if 0 in images.shape[1:3]:
            raise BadInput(f"{path}: the images of x_{name} have no pixels")
        if len(labels) != len(images) or not np.issubdtype(labels.dtype, np.integer) or not len(labels):
            raise BadInput(f"{path}: y_{name} must be {len(images) or 'some'} integers, one for each of x_{name}")
        splits.append((images, labels))
    (train_images, train_labels), (test_images, test_labels) = splits
    if train_images.shape[1:] != test_images.shape[1:]:
        raise BadInput(f"{path}: the images of x_train and x_test differ in size or colours")
    first = min(int(train_labels.min()), int(test_labels.min()))
    last = max(int(train_labels.max()), int(test_labels.max()))
    classes = _name_classes(path, arrays.get("classes"), last)
    if first < 0 or last >= len(classes) or len(classes) < 2:
        raise BadInput(f"{path} has labels from {first} to {last} for {len(classes)} classes; it needs two or more")
    train, test = (Split(images, labels.astype(np.int32)) for images, labels in splits)
    return Dataset(path.stem, classes, train, test)


def _name_classes(path: Path, names: NDArray[Any] | None, last: int) -> tuple[str, ...]:
    """Return the names of the classes.

    Args:
        path: The file.
        names: Its array `classes`, if it has one.
        last: The largest label.
    """
    if names is None:
        return cifar10.CLASSES if path.stem == "cifar10" else tuple(map(str, range(min(last + 1, MAX_CLASSES))))
    try:
        if names.ndim != 1 or names.dtype.kind not in "SUiu":
            raise ValueError(f"it is {names.dtype} {list(names.shape)}")
        return tuple(name.decode() if isinstance(name, bytes) else str(name) for name in names.tolist())
    except ValueError as error:
        raise BadInput(f"{path}: classes must be a list of names ({error})") from None
