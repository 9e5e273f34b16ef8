"""Labelled images in two splits, and the table of the data sets that `--data` accepts.

A data set is a row of `LOADERS` and a module with what `LoaderModule` says.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import math
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from resnet import BadInput
from resnet.files import read_file
from training.images import InvalidImage, Pixels, Resize, convert, count_channels, decode

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")  # a terminal would obey it
CHUNK, CHUNK_BYTES = 1024, 2**28  # images that are decoded at a time, and their pixels
# Limit on the pixels of a split that are kept in memory: two splits and the training share it. A larger split stays in
# its files.
CACHE_BYTES = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 3


class ImageForm(NamedTuple):
    """What the images of a data set become.

    Attributes:
        size: (height, width) to which image files are resized; None requires that all have one size.
        resize: The rule to resize by.
        channels: 1 for grey, 3 for RGB, 4 for RGBA; None keeps what the data have, see `find_channels`.
    """

    size: tuple[int, int] | None = None
    resize: Resize = "bilinear"
    channels: int | None = None


AS_THEY_ARE = ImageForm()


class FileImages:
    """Images that stay in their files: each is decoded whenever it is indexed, by all cores.

    Attributes:
        shape: (n, height, width, channels), as of the array in whose place it is used.
    """

    def __init__(self, paths: Sequence[Path], form: ImageForm) -> None:
        """Read the first image, whose size is that of all.

        Args:
            paths: JPEG or PNG files, at least one.
            form: What they become; RGB if it names no channels.

        Raises:
            BadInput: An image cannot be read or has another size: here the first one, on indexing any other.
        """
        self._paths, self._form = paths, form
        self._pool = ThreadPoolExecutor(os.cpu_count())  # Pillow decodes outside the interpreter lock
        self.shape: tuple[int, ...] = ()
        self.shape = (len(paths), *self._read(paths[0]).shape)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, indices: NDArray[np.intp]) -> Pixels:
        return np.stack(list(self._pool.map(self._read, [self._paths[index] for index in indices])))

    def decode(self) -> Pixels | FileImages:
        """Return all images as an array if they fit into memory, else as they are."""
        from rich import get_console
        from rich.progress import Progress

        folder, total = os.path.commonpath([path.absolute() for path in self._paths]), math.prod(self.shape)
        if total > CACHE_BYTES:
            print(f"{folder} would take {total / 2**30:.1f} GiB of memory: its images are decoded in every epoch")
            return self
        pixels = np.empty(self.shape, np.uint8)
        step = find_chunk(self.shape)
        starts = range(0, len(self), step)
        # It ends its display even at an unreadable image. In a notebook it would need a package of its own.
        with Progress(disable=get_console().is_jupyter) as progress:
            for start in progress.track(starts, description=f"reading {folder}"):
                end = min(start + step, len(self))
                pixels[start:end] = self[np.arange(start, end)]
        return pixels

    def _read(self, path: Path) -> Pixels:
        try:
            image = decode(read_file(path), self._form.size, self._form.resize, self._form.channels or 3)
        except InvalidImage as error:
            raise _refuse(path, error) from None
        if self.shape and image.shape != self.shape[1:]:
            raise BadInput(
                f"{path} has {image.shape[1]}x{image.shape[0]} pixels and {self._paths[0]} has "
                f"{self.shape[2]}x{self.shape[1]}; pass --image-size to resize all"
            )
        return image


def find_chunk(shape: tuple[int, ...]) -> int:
    """Return how many of the images of a split, [n, height, width, channels], to decode at a time."""
    return max(1, min(CHUNK, CHUNK_BYTES // math.prod(shape[1:])))


def find_channels(paths: Sequence[Path]) -> int:
    """Return the channels for image files: 1 if all are grey, 4 if all have an alpha channel, else 3.

    Raises:
        BadInput: A file that is looked at is no image.
    """
    found: int | None = None
    for path in paths:
        try:
            channels = count_channels(read_file(path))
        except InvalidImage as error:
            raise _refuse(path, error) from None
        if channels == 3 or found not in (None, channels):
            return 3
        found = channels
    return found or 3


def _refuse(path: Path, error: InvalidImage) -> BadInput:
    return BadInput(f"{path} {error}" + ("" if ";" in str(error) else "; replace or remove it"))


class Split(NamedTuple):
    """Images with their labels.

    Attributes:
        images: uint8 [n, height, width, channels].
        labels: Their classes, int32 [n].
        groups: Numbers of groups of images, int32 [n], such as those of one patient: what is set aside takes whole
            groups. None if each image stands for itself.
        paths: Their files; None if they come from elsewhere.
    """

    images: Pixels | FileImages
    labels: NDArray[np.int32]
    groups: NDArray[np.int32] | None = None
    paths: Sequence[Path] | None = None

    def chunks(self) -> Iterator[Pixels]:
        """Yield all images in order, some at a time."""
        step = find_chunk(self.images.shape)
        for start in range(0, len(self.labels), step):
            yield self.images[np.arange(start, min(start + step, len(self.labels)))]

    def decode(self) -> Split:
        """Return the split with its images in memory, if they fit."""
        return self._replace(images=self.images.decode()) if isinstance(self.images, FileImages) else self

    def convert(self, channels: int | None) -> Split:
        """Return the split with this number of channels, if its images are in memory; None keeps what they have."""
        if channels is None or isinstance(self.images, FileImages):
            return self
        return self._replace(images=convert(self.images, channels))

    def take(self, indices: NDArray[np.intp]) -> Split:
        """Return the examples at these indices, in this order."""
        return Split(
            self.images[indices],
            self.labels[indices],
            self.groups if self.groups is None else self.groups[indices],
            self.paths if self.paths is None else [self.paths[int(index)] for index in indices],
        )


def check_names(classes: Sequence[str], origin: str) -> None:
    """Check that the names of classes can be written to a file, one per line, and tell the classes apart.

    Args:
        classes: The names.
        origin: Where they come from, for the message.

    Raises:
        BadInput: A name is empty, has a line break, a control character of a terminal or bytes that are not UTF-8, or
            stands for two classes.
    """
    for name in classes:
        if name.splitlines() != [name] or CONTROL.search(name) or name != name.encode("utf-8", "replace").decode():
            raise BadInput(f"{origin} has the class {name!r}; a name is one line of text, so rename it")
    alike = [unicodedata.normalize("NFC", name) for name in classes]  # an accent may be a character of its own
    if len(set(alike)) < len(alike):
        twice = next(name for name in alike if alike.count(name) > 1)
        raise BadInput(f"{origin} has the class {twice!r} twice; rename one of the two")


class Digests(NamedTuple):
    """Hashes of a data set.

    Attributes:
        sha256: Of class names, pixels, labels and groups of both splits, in order.
        train: Of the pixels of each training image.
        test: Of the pixels of each test image.
    """

    sha256: str
    train: list[bytes]
    test: list[bytes]


@dataclass(frozen=True)
class Dataset:
    """A training and a test split over the same classes.

    Raises:
        BadInput: The name of a class cannot be used; see `check_names`.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split

    def __post_init__(self) -> None:
        check_names(self.classes, f"the data set {self.name!r}")

    @classmethod
    def of_files(
        cls,
        name: str,
        classes: Sequence[str],
        paths: Sequence[Path],
        labels: NDArray[np.int32],
        is_test: NDArray[np.bool_],
        form: ImageForm,
        groups: NDArray[np.int32] | None = None,
    ) -> Dataset:
        """Return a data set of image files.

        Args:
            name: Its name.
            classes: Names of the classes.
            paths: The files, some of either split.
            labels: Their classes, int32 [n].
            is_test: Which of them are test images, [n].
            form: What the images become.
            groups: Groups of the images, int32 [n]; see `Split`.

        Raises:
            BadInput: An image cannot be read, or the splits differ in size.
        """
        form = form._replace(channels=form.channels or find_channels(paths))
        splits = []
        for chosen in (np.flatnonzero(~is_test), np.flatnonzero(is_test)):
            files = [paths[index] for index in chosen.tolist()]
            group = None if groups is None else groups[chosen]
            splits.append(Split(FileImages(files, form), labels[chosen], group, files))
        train, test = splits
        if train.images.shape[1:] != test.images.shape[1:]:
            raise BadInput(f"the images of {name!r} to train and to test with differ in size; pass --image-size")
        return cls(name, tuple(classes), train, test)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of every image."""
        height, width, channels = self.train.images.shape[1:]
        return height, width, channels

    @property
    def sha256(self) -> str:
        """Hash of class names, pixels, labels and groups of both splits, in order."""
        return self.digests.sha256

    @cached_property
    def digests(self) -> Digests:
        """The hashes of the data set and of its images, which take one pass over the pixels."""
        whole, images = hashlib.sha256("\n".join(self.classes).encode()), list[list[bytes]]()
        for split in (self.train, self.test):
            whole.update(repr(split.images.shape).encode())
            images.append([])
            for pixels in map(np.ascontiguousarray, split.chunks()):
                whole.update(pixels.data)
                images[-1] += [hashlib.blake2b(image.data, digest_size=16).digest() for image in pixels]
            whole.update(np.ascontiguousarray(split.labels.astype("<i4")).data)
            if split.groups is not None:
                whole.update(np.ascontiguousarray(split.groups.astype("<i4")).data)
        return Digests(whole.hexdigest(), *images)


class LoaderModule(Protocol):
    """What the module of a data set has."""

    def load(self, source: str, form: ImageForm) -> Dataset:
        """Return the data set, images in files as `FileImages` in this form; see `load` of this module."""
        ...


class Loader(NamedTuple):
    """One kind of data set: the module that loads it, and the values of `--data` that mean it.

    Attributes:
        module: Its module, imported when it is used.
        meaning: What the help and the error message call it.
        name: A name that means it; empty if it has none.
        suffix: The suffix of files that mean it; empty if none do.
        holds: A file whose presence makes a folder mean it; `.` accepts any folder, empty accepts none.
    """

    module: str
    meaning: str
    name: str = ""
    suffix: str = ""
    holds: str = ""

    def reads(self, path: Path) -> bool:
        """Return whether a file or folder is of this kind."""
        if path.is_dir():
            return bool(self.holds) and (self.holds == "." or (path / self.holds).is_file())
        return bool(self.suffix) and path.suffix.lower() == self.suffix and path.is_file()


LOADERS = (
    Loader("training.datasets.digits", "digits", name="digits"),
    Loader("training.datasets.cifar10", "cifar10", name="cifar10", holds="data_batch_1"),
    Loader("training.datasets.arrays", "an .npz file", suffix=".npz"),
    Loader("training.datasets.table", "a .csv file of paths and labels", suffix=".csv", holds="train.csv"),
    Loader("training.datasets.folder", "a folder of images", holds="."),
)
"""All data sets. A name goes before a path; of paths the first row that reads it counts, so any folder comes last."""

SOURCES = ", ".join(loader.meaning for loader in LOADERS)
"""What `--data` accepts, for help texts and messages."""


def load(source: str, form: ImageForm = AS_THEY_ARE, decode: bool = True) -> Dataset:
    """Load a data set by name or path.

    Args:
        source: `digits`, `cifar10`, a folder of JPEG or PNG files with a folder for each class, or with `train.csv`,
            any other CSV table of them, the unpacked folder `cifar-10-batches-py`, or an .npz file with the arrays of
            the loaders of Keras.
        form: What its images become. Only image files are resized.
        decode: Decode all image files, if they fit into memory. Otherwise an image is decoded when it is used.

    Raises:
        BadInput: The data set is unknown, unreadable, or has fewer than two classes.
    """
    loader = next((row for row in LOADERS if row.name and row.name == source), None)
    loader = loader or next((row for row in LOADERS if row.reads(Path(source))), None)
    if loader is None or not source:
        path = Path(source)
        looks_like_path = path.suffix or len(path.parts) > 1
        problem = "is unknown" if path.exists() or not looks_like_path else "does not exist"
        raise BadInput(f"--data {source!r} {problem}; choose one of: {SOURCES}")
    dataset = cast(LoaderModule, importlib.import_module(loader.module)).load(source, form)
    train, test = (split.convert(form.channels) for split in (dataset.train, dataset.test))
    if decode:
        train, test = train.decode(), test.decode()
    return dataclasses.replace(dataset, train=train, test=test)
