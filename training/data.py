"""Labelled images: the embedded digits, CIFAR-10, arrays, or a folder of image files."""

from __future__ import annotations

import hashlib
import math
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track

from resnet import BadInput
from training.images import InvalidImage, Pixels, decode

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# Of the pixels of a split: what takes more stays in its files, for two splits and the training share the memory.
CACHE_BYTES = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 3
CIFAR10_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))


class FileImages:
    """Images that stay in their files: decoded by all cores, each time they are asked for.

    Attributes:
        shape: (n, height, width, 3), as that of the array they stand for.
    """

    def __init__(self, paths: Sequence[Path], size: tuple[int, int] | None) -> None:
        """Prepare to read.

        Args:
            paths: JPEG or PNG files, at least one.
            size: (height, width) to resize all to; None requires that they share a size.

        Raises:
            BadInput: The first image, or later any that is asked for, cannot be read or has another size.
        """
        self._paths, self._size = paths, size
        self._pool = ThreadPoolExecutor(os.cpu_count())  # Pillow decodes outside the interpreter lock
        self.shape: tuple[int, ...] = ()
        self.shape = (len(paths), *self._read(paths[0]).shape)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, indices: NDArray[np.intp]) -> Pixels:
        return np.stack(list(self._pool.map(self._read, [self._paths[index] for index in indices])))

    def _read(self, path: Path) -> Pixels:
        try:
            image = decode(path.read_bytes(), self._size)
        except (InvalidImage, OSError) as error:
            raise BadInput(f"{path} {error}") from None
        if self.shape and image.shape != self.shape[1:]:
            raise BadInput(
                f"{path} has {image.shape[1]}x{image.shape[0]} pixels and {self._paths[0]} has "
                f"{self.shape[2]}x{self.shape[1]}; pass --image-size N to resize all to N by N"
            )
        return image


class Split(NamedTuple):
    """Images, uint8 [n, height, width, 3], and their classes, int32 [n]."""

    images: Pixels | FileImages
    labels: NDArray[np.int32]

    def chunks(self, size: int = 1024) -> Iterator[Pixels]:
        """Read all images in order, so many at a time."""
        for start in range(0, len(self.labels), size):
            yield self.images[np.arange(start, min(start + size, len(self.labels)))]

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

    @cached_property
    def sha256(self) -> str:
        """Hash of class names, pixels and labels of both splits, in order."""
        digest = hashlib.sha256("\n".join(self.classes).encode())
        for split in (self.train, self.test):
            digest.update(repr(split.images.shape).encode())
            for pixels in split.chunks():
                digest.update(np.ascontiguousarray(pixels).data)
            digest.update(np.ascontiguousarray(split.labels.astype("<i4")).data)
        return digest.hexdigest()


def load(name: str, image_size: int | None = None) -> Dataset:
    """Load a data set by name or path.

    Args:
        name: `digits`, `cifar10`, a folder `train/CLASS/*` + `test/CLASS/*` of JPEG or PNG files, the unpacked
            `cifar-10-batches-py` folder, or an .npz file with the arrays of Keras' loaders.
        image_size: Side in pixels to which the images of a folder are resized, None keeps their common size; other
            data sets keep theirs.

    Raises:
        BadInput: The data set is unknown, unreadable, or has fewer than two classes.
    """
    folder = Path(name)
    if name in LOADERS:
        dataset = LOADERS[name]()
    elif (folder / CIFAR10_BATCHES[0]).is_file():
        dataset = _read_cifar10_batches(folder)
    elif folder.is_dir():
        return _read_folder(folder, image_size)
    elif folder.suffix == ".npz" and folder.is_file():
        dataset = _read_arrays(folder)
    else:
        raise BadInput(
            f"--data {name!r} is neither a data set ({', '.join(LOADERS)}) nor a folder of images nor an .npz file"
        )
    return dataset


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


def _read_arrays(path: Path) -> Dataset:
    """Read an .npz file with `x_train`, `y_train`, `x_test`, `y_test`, and perhaps the names of the `classes`."""
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
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise BadInput(f"{path}: x_{name} must be uint8 [n, height, width, 3], not {images.dtype} {images.shape}")
        if len(labels) != len(images) or not np.issubdtype(labels.dtype, np.integer) or not len(labels):
            raise BadInput(f"{path}: y_{name} must be {len(images) or 'some'} integers, one for each of x_{name}")
        splits.append(Split(images, labels.astype(np.int32)))
    train, test = splits
    if train.images.shape[1:] != test.images.shape[1:]:
        raise BadInput(f"{path}: the images of x_train and x_test differ in size")
    seen = np.unique(np.concatenate([train.labels, test.labels]))
    known = CIFAR10_CLASSES if path.stem == "cifar10" else tuple(str(label) for label in range(seen[-1] + 1))
    classes = tuple(str(name) for name in arrays["classes"]) if "classes" in arrays else known
    if seen[0] < 0 or seen[-1] >= len(classes) or len(classes) < 2:
        raise BadInput(
            f"{path} has labels from {seen[0]} to {seen[-1]} for {len(classes)} classes; it needs two or more"
        )
    return Dataset(path.stem, classes, train, test)


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

    split = Split(FileImages(paths, size), np.array(labels, np.int32))
    size_in_memory = math.prod(split.images.shape)
    if size_in_memory > CACHE_BYTES:
        print(f"{folder} would take {size_in_memory / 2**30:.1f} GiB: its images are decoded anew in every epoch")
        return split
    pixels = np.empty(split.images.shape, np.uint8)
    done = 0
    for chunk in track(split.chunks(), f"reading {folder}", math.ceil(len(paths) / 1024)):
        pixels[done : done + len(chunk)] = chunk
        done += len(chunk)
    return split._replace(images=pixels)


def _visible(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise BadInput(f"{folder} cannot be read ({error.strerror}); it should hold one folder per class") from None
