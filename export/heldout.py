"""The held-out images of a version, from heldout.npz."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.manifest import Manifest, read_file
from resnet import BadInput
from resnet.archives import read_arrays

NAME = "heldout.npz"


def load(folder: Path, manifest: Manifest) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Return the held-out images of the version in `folder`, uint8 [n, height, width, 3], and their classes, int32 [n].

    Raises:
        BadInput: The file was changed, or holds no such arrays.
    """
    try:
        return unpack(read_arrays(io.BytesIO(read_file(folder, NAME, manifest))))
    except (ValueError, KeyError) as error:
        raise BadInput(f"{folder / NAME} cannot be read ({error})") from None


def unpack(arrays: Mapping[str, NDArray[Any]]) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
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
