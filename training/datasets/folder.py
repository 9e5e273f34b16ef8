"""A folder of JPEG and PNG files: `train/CLASS/*` and `test/CLASS/*`, also in folders of a class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from resnet import BadInput
from training.data import Dataset, FileImages, Split
from training.images import Resize


def load(source: str, size: tuple[int, int] | None = None, resize: Resize = "bilinear") -> Dataset:
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
    train, test = (_read_split(folder / split, classes, size, resize) for split in ("train", "test"))
    if train.images.shape[1:] != test.images.shape[1:]:
        raise BadInput(f"the images of {folder / 'train'} and {folder / 'test'} differ in size; pass --image-size N")
    return Dataset(folder.resolve().name, classes, train, test)


def _read_split(folder: Path, classes: Sequence[str], size: tuple[int, int] | None, resize: Resize) -> Split:
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files = list(_find_files(folder / name))
        if not files:
            raise BadInput(f"{folder / name} holds no images")
        paths += files
        labels += [label] * len(files)
    return Split(FileImages(paths, size, resize), np.array(labels, np.int32))


def _find_files(folder: Path) -> Iterator[Path]:
    """Yield the visible files of a folder and of the folders in it, in order."""
    for path in _list_visible(folder):
        if path.is_dir():
            yield from _find_files(path)
        else:
            yield path


def _list_visible(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise BadInput(f"{folder} cannot be read ({error.strerror}); it should hold one folder per class") from None
