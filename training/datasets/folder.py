"""A folder of JPEG and PNG files: `train/CLASS/*` and `test/CLASS/*`."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.progress import track

from resnet import BadInput
from training.data import Dataset, FileImages, Split
from training.images import Resize

# Limit on the pixels of a split that are kept in memory: two splits and the training share it. A larger split stays in
# its files.
CACHE_BYTES = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 3


def load(source: str, image_size: int | None = None, resize: Resize = "bilinear") -> Dataset:
    """Load a folder of images; the folders in `train` are the classes, in alphabetical order.

    Raises:
        BadInput: There are fewer than two classes, a class has no images, or an image cannot be read or has a size of
            its own.
    """
    folder = Path(source)
    classes = tuple(path.name for path in _list_visible(folder / "train") if path.is_dir())
    if len(classes) < 2:
        raise BadInput(
            f"{folder / 'train'} needs a folder of images for each of two or more classes; it has {len(classes)}"
        )
    unknown = {path.name for path in _list_visible(folder / "test") if path.is_dir()} - set(classes)
    if unknown:
        raise BadInput(f"{folder / 'test'} has the class {min(unknown)!r}, which {folder / 'train'} does not have")
    size = None if image_size is None else (image_size, image_size)
    train, test = (_read_split(folder / split, classes, size, resize) for split in ("train", "test"))
    if train.images.shape[1:] != test.images.shape[1:]:
        raise BadInput(f"the images of {folder / 'train'} and {folder / 'test'} differ in size; pass --image-size N")
    return Dataset(folder.resolve().name, classes, train, test)


def _read_split(folder: Path, classes: Sequence[str], size: tuple[int, int] | None, resize: Resize) -> Split:
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files = [path for path in _list_visible(folder / name) if path.is_file()]
        if not files:
            raise BadInput(f"{folder / name} holds no images")
        paths += files
        labels += [label] * len(files)

    split = Split(FileImages(paths, size, resize), np.array(labels, np.int32))
    size_in_memory = math.prod(split.images.shape)
    if size_in_memory > CACHE_BYTES:
        print(f"{folder} would take {size_in_memory / 2**30:.1f} GiB of memory: its images are decoded in every epoch")
        return split
    pixels = np.empty(split.images.shape, np.uint8)
    done = 0
    for chunk in track(split.chunks(), f"reading {folder}", math.ceil(len(paths) / 1024)):
        pixels[done : done + len(chunk)] = chunk
        done += len(chunk)
    return split._replace(images=pixels)


def _list_visible(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise BadInput(f"{folder} cannot be read ({error.strerror}); it should hold one folder per class") from None
