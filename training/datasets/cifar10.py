"""CIFAR-10 (Krizhevsky, 2009): downloaded by Keras, or read from the unpacked folder `cifar-10-batches-py`."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from resnet import BadInput
from training.data import Dataset, ImageForm, Split

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TRAINING_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST_BATCH = "test_batch"


def load(source: str, form: ImageForm) -> Dataset:  # noqa: ARG001
    """Load CIFAR-10 from a folder of its original batches, or with the name `cifar10` through Keras.

    Raises:
        BadInput: The download failed, or a batch cannot be read.
    """
    folder = Path(source)
    return _read(folder) if source != "cifar10" and folder.is_dir() else _download()


def _download() -> Dataset:
    """Load the copy in Keras' cache folder, which Keras downloads first if it is not there."""
    import keras

    try:
        (train_images, train_labels), (test_images, test_labels) = keras.datasets.cifar10.load_data()
    except Exception as error:  # Keras raises a bare Exception when the download fails
        raise BadInput(
            f"CIFAR-10 could not be downloaded ({error}); --data also takes a folder with an unpacked copy"
        ) from error
    return Dataset(
        "cifar10",
        CLASSES,
        Split(train_images, train_labels.ravel().astype(np.int32)),
        Split(test_images, test_labels.ravel().astype(np.int32)),
    )


def _read(folder: Path) -> Dataset:
    return Dataset("cifar10", CLASSES, _read_batches(folder, TRAINING_BATCHES), _read_batches(folder, [TEST_BATCH]))


def _read_batches(folder: Path, names: Sequence[str]) -> Split:
    """Read pickled batches, whose rows hold all red values of an image, then all green, then all blue ones."""
    images, labels = [], []
    for name in names:
        try:
            batch = pickle.loads((folder / name).read_bytes(), encoding="bytes")
            pixels, classes = np.asarray(batch[b"data"]), np.array(batch[b"labels"], np.int32)
            if pixels.dtype != np.uint8 or pixels.shape != (len(classes), 3 * 32 * 32):
                raise ValueError(f"{pixels.dtype} {list(pixels.shape)} for {len(classes)} labels")
            if not 0 <= classes.min() <= classes.max() < len(CLASSES):
                raise ValueError(f"labels from {classes.min()} to {classes.max()}")
        except Exception as error:  # a pickle can raise anything
            raise BadInput(f"{folder / name} is not a CIFAR-10 batch ({error}); unpack the archive again") from None
        images.append(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels.append(classes)
    return Split(np.concatenate(images), np.concatenate(labels))
