"""The held-out images of a version, from heldout.npz."""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.manifest import Manifest, read_file
from resnet import BadInput

NAME = "heldout.npz"
UNREADABLE = (OSError, ValueError, KeyError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error)


def load(folder: Path, manifest: Manifest) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Return the held-out images of the version in `folder`, uint8 [n, height, width, 3], and their classes, int32 [n].

    Raises:
        BadInput: The file was changed, or holds no such arrays.
    """
    file = io.BytesIO(read_file(folder, NAME, manifest))
    try:
        check_size(file)
        with np.load(file) as arrays:  # which runs no code: it refuses pickles
            images, labels = arrays["images"], arrays["labels"]
    except UNREADABLE as error:
        raise BadInput(f"{folder / NAME} cannot be read ({error})") from None
    if images.dtype != np.uint8 or images.ndim != 4 or labels.dtype.kind != "i" or labels.shape != images.shape[:1]:
        raise BadInput(f"{folder / NAME} holds no images with their classes")
    return images, labels


def check_size(file: io.BytesIO | Path) -> None:
    """Check that the content of a ZIP archive fits in the memory of this machine.

    Raises:
        ValueError: It does not.
    """
    with zipfile.ZipFile(file) as archive:
        size = sum(member.file_size for member in archive.infolist())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory:
        raise ValueError(
            f"it unpacks to {size / 1e9:,.3g} GB, more than the {memory / 1e9:,.3g} GB of memory of this machine"
        )
