"""Labelled images, in memory: the embedded digits, CIFAR-10, or a folder of image files."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track

from resnet import BadInput
from training.images import InvalidImage, Pixels, decode

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))


class Split(NamedTuple):
    """Images, uint8 [n, height, width, 3], and their classes, int32 [n]."""

    images: Pixels
    labels: NDArray[np.int32]

    def take(self, indices: NDArray[np.intp]) -> Split:
        """Return the given examples, in the given order."""
        return Split(self.images[indices], self.labels[indices])


@dataclass(frozen=True)
class Dataset:
    """A training and a test split over the same classes."""

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, 3) of every image."""
        height, width, channels = self.train.images.shape[1:]
        return height, width, channels

    def sha256(self) -> str:
        """Hash class names, pixels and labels of both splits, in order."""
        digest = hashlib.sha256("\n".join(self.classes).encode())
        for split in (self.train, self.test):
            digest.update(repr(split.images.shape).encode())
            digest.update(np.ascontiguousarray(split.images).data)
            digest.update(np.ascontiguousarray(split.labels.astype("<i4")).data)
        return digest.hexdigest()


def load(name: str, image_size: int | None = None) -> Dataset:
    """Load a data set by name or path.

    Args:
        name: `digits`, `cifar10`, a folder `train/CLASS/*` + `test/CLASS/*` of JPEG or PNG files, or the unpacked
            `cifar-10-batches-py` folder.
        image_size: Side in pixels to which the images of a folder are resized; None keeps their common size.

    Raises:
        BadInput: The data set is unknown, unreadable, or has fewer than two classes.
    """
    folder = Path(name)
    if name in LOADERS:
        if image_size is not None:
            raise BadInput(f"--image-size is for folders of images; {name!r} has 32x32 pixels")
        return LOADERS[name]()
    if (folder / CIFAR10_BATCHES[0]).is_file():
        return _read_cifar10_batches(folder)
    if folder.is_dir():
        return _read_folder(folder, image_size)
    raise BadInput(f"--data {name!r} is neither a data set ({', '.join(LOADERS)}) nor a folder of images")


def load_digits() -> Dataset:
    """Load scikit-learn's 1,797 handwritten digits, enlarged to 32x32 RGB; every fifth image is for testing."""
    from sklearn.datasets import load_digits as load_sklearn_digits

    digits = load_sklearn_digits()
    grey = [Image.fromarray(np.uint8(image * (255 / 16))) for image in digits.images]  # 8x8, values 0 to 16
    large = [image.resize((32, 32), Image.Resampling.BILINEAR).convert("RGB") for image in grey]
    everything = Split(np.stack([np.asarray(image) for image in large]), digits.target.astype(np.int32))
    # The set is ordered by writer, and the file's last part holds other writers than its first: shuffle before the cut.
    order = np.random.default_rng(0).permutation(len(large))
    test = order[::5]
    train = np.setdiff1d(order, test)
    return Dataset("digits", tuple(str(digit) for digit in range(10)), everything.take(train), everything.take(test))


def load_cifar10() -> Dataset:
    """Load CIFAR-10 (Krizhevsky, 2009) through Keras, which keeps a copy in its cache folder."""
    import keras

    try:
        (train_images, train_labels), (test_images, test_labels) = keras.datasets.cifar10.load_data()
    except Exception as error:  # Keras raises a bare Exception when the download fails
        raise BadInput(
            f"CIFAR-10 could not be downloaded ({error}); --data also takes a folder that holds an unpacked copy"
        ) from error
    return Dataset(
        "cifar10",
        CIFAR10_CLASSES,
        Split(train_images, train_labels.ravel().astype(np.int32)),
        Split(test_images, test_labels.ravel().astype(np.int32)),
    )


LOADERS: dict[str, Callable[[], Dataset]] = {"digits": load_digits, "cifar10": load_cifar10}


def _read_cifar10_batches(folder: Path) -> Dataset:
    """Read the original distribution: pickled batches of planar RGB rows."""

    def read(names: Sequence[str]) -> Split:
        images, labels = [], []
        for name in names:
            try:
                batch = pickle.loads((folder / name).read_bytes(), encoding="bytes")
                images.append(batch[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
                labels.append(np.array(batch[b"labels"], np.int32))
            except (OSError, pickle.UnpicklingError, EOFError, KeyError, ValueError) as error:
                raise BadInput(f"{folder / name} is not a CIFAR-10 batch ({error}); unpack the archive again") from None
        return Split(np.concatenate(images), np.concatenate(labels))

    return Dataset("cifar10", CIFAR10_CLASSES, read(CIFAR10_BATCHES), read(["test_batch"]))


def _read_folder(folder: Path, image_size: int | None) -> Dataset:
    classes = tuple(path.name for path in _visible(folder / "train") if path.is_dir())
    if len(classes) < 2:
        raise BadInput(
            f"{folder / 'train'} needs a folder of images for each of two or more classes; it has {len(classes)}"
        )
    unknown = {path.name for path in _visible(folder / "test") if path.is_dir()} - set(classes)
    if unknown:
        raise BadInput(f"{folder / 'test'} has the class {min(unknown)!r}, which {folder / 'train'} does not have")
    size = None if image_size is None else (image_size, image_size)
    train, test = (_read_split(folder / split, classes, size) for split in ("train", "test"))
    if train.images.shape[1:] != test.images.shape[1:]:
        raise BadInput(f"the images of {folder / 'train'} and {folder / 'test'} differ in size; pass --image-size N")
    return Dataset(folder.resolve().name, classes, train, test)


def _read_split(folder: Path, classes: Sequence[str], size: tuple[int, int] | None) -> Split:
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files = [path for path in _visible(folder / name) if path.is_file()]
        if not files:
            raise BadInput(f"{folder / name} holds no images")
        paths += files
        labels += [label] * len(files)

    def read(path: Path) -> Pixels:
        try:
            return decode(path.read_bytes(), size)
        except (InvalidImage, OSError) as error:
            raise BadInput(f"{path} {error}") from None

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes outside the interpreter lock
        images = list(track(pool.map(read, paths), f"reading {folder}", len(paths)))
    first = images[0].shape
    for path, image in zip(paths, images, strict=True):
        if image.shape != first:
            raise BadInput(
                f"{path} has {image.shape[1]}x{image.shape[0]} pixels and {paths[0]} has {first[1]}x{first[0]}; "
                "pass --image-size N to resize all to N by N"
            )
    return Split(np.stack(images), np.array(labels, np.int32))


def _visible(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise BadInput(f"{folder} cannot be read ({error.strerror}); it should hold one folder per class") from None
