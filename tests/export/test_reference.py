"""reference.npz: the images of the certificate, the original's answers to them, and those of variants."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from export import manifest, reference
from resnet import BadInput
from tests.versions import list_file, write_version

Arrays = dict[str, NDArray[Any]]

IMAGES = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
LABELS = np.array([2, 0], np.int32)
ANSWERS = np.array([[0.2, 0.3, 0.5], [0.7, 0.2, 0.1]], np.float32)


@pytest.fixture
def small_network() -> None:
    """Nothing is trained here."""


@pytest.fixture
def version(tmp_path: Path) -> Path:
    """The folder of a version."""
    return write_version(tmp_path / "models" / "colors" / "1")


def pack(**changes: NDArray[Any] | None) -> bytes:
    """Return the content of reference.npz, with other arrays, or without one."""
    arrays: Arrays = {"images": IMAGES, "labels": LABELS, "probabilities": ANSWERS, "by_class": np.array([1, 0])}
    arrays.update({name: value for name, value in changes.items() if value is not None})
    file = io.BytesIO()
    np.savez_compressed(file, **{name: value for name, value in arrays.items() if changes.get(name, value) is not None})
    return file.getvalue()


def test_what_was_written_is_read(version: Path) -> None:
    """Every array, with its type."""
    predictions = {"onnx-int8": np.array([2, 1], np.int32), "onnx-fp16": np.array([2, 0], np.int32)}
    written = reference.make(IMAGES, LABELS, ANSWERS, predictions)
    written.write(version / "written.npz")
    list_file(version, reference.NAME, (version / "written.npz").read_bytes())
    stored = reference.load(version, manifest.read(version))
    assert stored._fields == written._fields
    for before, after in zip(written[:-1], stored[:-1], strict=True):
        np.testing.assert_array_equal(before, after, strict=True)
    assert stored.predictions.keys() == predictions.keys()
    for name, classes in predictions.items():
        np.testing.assert_array_equal(stored.predictions[name], classes, strict=True)


def test_any_loader_of_numpy_reads_the_file(version: Path) -> None:
    """Without unpickling: arrays under their names."""
    with np.load(version / reference.NAME, allow_pickle=False) as arrays:
        assert set(arrays) == {"images", "labels", "probabilities", "by_class"}


def test_classes_may_have_any_signed_integers(version: Path) -> None:
    """As other tools write them."""
    list_file(version, reference.NAME, pack(labels=LABELS.astype(np.int64)))
    assert reference.load(version, manifest.read(version)).labels.dtype == np.int64


def test_the_first_images_are_of_as_many_classes_as_they_can_be() -> None:
    """Each part of the order has as many of each class as it can have; the images keep their order."""
    labels = np.array([0, 0, 0, 0, 0, 2, 2, 5], np.int32)
    images = np.zeros((8, 1, 1, 3), np.uint8)
    images[:, 0, 0, 0] = range(8)
    answers = np.eye(8, 6, dtype=np.float32)
    whole = reference.make(images, labels, answers, {"onnx-int8": np.arange(8, dtype=np.int32)})
    assert whole.by_class.tolist() == [0, 5, 7, 1, 6, 2, 3, 4]
    for count in range(1, 8):
        part = whole.choose(count)
        indices = sorted(whole.by_class[:count])
        assert part.images[:, 0, 0, 0].tolist() == part.predictions["onnx-int8"].tolist() == indices
        np.testing.assert_array_equal(part.labels, labels[indices])
        np.testing.assert_array_equal(part.probabilities, answers[indices])
    assert part.by_class.tolist() == [0, 4, 6, 1, 5, 2, 3]
    for count in (None, 8, 9):
        assert whole.choose(count) is whole


def test_a_file_that_was_changed_is_not_read(version: Path) -> None:
    """Its hash is that of the manifest, or nothing of it is used."""
    recorded = manifest.read(version)
    (version / reference.NAME).write_bytes(pack())
    with pytest.raises(BadInput, match=r"reference.npz is not the file that was exported .*; export the model again"):
        reference.load(version, recorded)


NO_IMAGES = "it holds no images with their classes"
NO_ANSWERS = "it has no float32 answer of the original to each image, for each class"
NO_CLASSES = "it has images of classes that the model does not have"
NO_ORDER = "it has no order of its images"
NO_PREDICTIONS = "it has no answer of a variant to each image"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"images": IMAGES.astype(np.int8)}, NO_IMAGES),
        ({"images": IMAGES.astype(np.float32)}, NO_IMAGES),
        ({"images": IMAGES[0], "labels": LABELS[:1]}, NO_IMAGES),
        ({"images": IMAGES[..., 0]}, NO_IMAGES),
        ({"images": IMAGES[np.newaxis], "labels": LABELS[:1]}, NO_IMAGES),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, NO_IMAGES),
        ({"labels": LABELS.astype(np.float32)}, NO_IMAGES),
        ({"labels": LABELS[:1]}, NO_IMAGES),
        ({"labels": LABELS[:, np.newaxis]}, NO_IMAGES),
        ({"labels": np.eye(2, 3, dtype=np.int32)}, NO_IMAGES),
        ({"labels": LABELS + 1}, NO_CLASSES),
        ({"labels": LABELS - 1}, NO_CLASSES),
        ({"probabilities": ANSWERS.astype(np.float64)}, NO_ANSWERS),
        ({"probabilities": ANSWERS[:1]}, NO_ANSWERS),
        ({"probabilities": ANSWERS[:, :2]}, NO_ANSWERS),
        ({"by_class": np.array([0])}, NO_ORDER),
        ({"by_class": np.array([1, 1])}, NO_ORDER),
        ({"by_class": np.array([1, 2])}, NO_ORDER),
        ({"by_class": np.array([1.0, 0.0])}, NO_ORDER),
        ({"by_class": np.array([[1, 0]])}, NO_ORDER),
        ({"predicted_onnx-int8": LABELS[:1]}, NO_PREDICTIONS),
        ({"predicted_onnx-int8": LABELS.astype(np.float32)}, NO_PREDICTIONS),
        ({"images": None}, "it lacks the array 'images'"),
        ({"labels": None}, "it lacks the array 'labels'"),
        ({"probabilities": None}, "it lacks the array 'probabilities'"),
        ({"by_class": None}, "it lacks the array 'by_class'"),
    ],
)
def test_arrays_of_another_kind_are_one_sentence(changes: dict[str, Any], reason: str, version: Path) -> None:
    """Another type, other axes, or none."""
    list_file(version, reference.NAME, pack(**changes))
    with pytest.raises(BadInput) as caught:
        reference.load(version, manifest.read(version))
    assert str(caught.value) == f"{version / reference.NAME} cannot be read ({reason})"


@pytest.mark.parametrize("change", [lambda content: content[:-30], lambda _: b"", lambda _: b"no archive"])
def test_what_is_no_archive_is_one_sentence(change: Callable[[bytes], bytes], version: Path) -> None:
    """A file that was cut short, or is something else."""
    list_file(version, reference.NAME, change(pack()))
    with pytest.raises(BadInput, match=r"reference.npz cannot be read \("):
        reference.load(version, manifest.read(version))
