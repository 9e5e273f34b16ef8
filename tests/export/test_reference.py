"""heldout.npz: the images of the certificate, and only those."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from export import heldout, manifest
from resnet import BadInput
from tests.versions import list_file, write_version

IMAGES = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
LABELS = np.array([2, 0], np.int32)


@pytest.fixture
def small_network() -> None:
    """Nothing is trained here."""


@pytest.fixture
def version(tmp_path: Path) -> Path:
    """The folder of a version."""
    return write_version(tmp_path / "models" / "colors" / "1")


def pack(images: NDArray[np.generic], labels: NDArray[np.generic]) -> bytes:
    """Return the content of heldout.npz."""
    file = io.BytesIO()
    np.savez_compressed(file, images=images, labels=labels)
    return file.getvalue()


def test_images_and_classes_are_those_of_the_file(version: Path) -> None:
    """Every pixel and class, with their types; classes may have any signed integers."""
    for dtype in (np.int32, np.int64):
        list_file(version, heldout.NAME, pack(IMAGES, LABELS.astype(dtype)))
        images, labels = heldout.load(version, manifest.read(version))
        np.testing.assert_array_equal(images, IMAGES, strict=True)
        np.testing.assert_array_equal(labels, LABELS.astype(dtype), strict=True)


def test_images_that_were_changed_are_not_read(version: Path) -> None:
    """Their hash is that of the manifest, or nothing of them is used."""
    recorded = manifest.read(version)
    (version / heldout.NAME).write_bytes(pack(IMAGES, LABELS))
    with pytest.raises(BadInput, match=r"heldout.npz is not the file that was exported .*; export the model again"):
        heldout.load(version, recorded)


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (IMAGES.astype(np.int8), LABELS),
        (IMAGES.astype(np.float32), LABELS),
        (IMAGES[0], LABELS[:1]),
        (IMAGES[..., 0], LABELS),
        (IMAGES[np.newaxis], LABELS[:1]),
        (IMAGES, LABELS.astype(np.float32)),
        (IMAGES, LABELS[:1]),
        (IMAGES, LABELS[:, np.newaxis]),
        (IMAGES, np.eye(2, 3, dtype=np.int32)),
    ],
)
def test_arrays_of_another_kind_are_one_sentence(
    images: NDArray[np.generic], labels: NDArray[np.generic], version: Path
) -> None:
    """Another type, other axes, or not one class for each image."""
    list_file(version, heldout.NAME, pack(images, labels))
    with pytest.raises(BadInput) as caught:
        heldout.load(version, manifest.read(version))
    assert str(caught.value) == f"{version / heldout.NAME} cannot be read (it holds no images with their classes)"
