"""A folder of JPEG and PNG files in a folder for each class: below `train` and `test`, or all together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from resnet import BadInput
from training import splits
from training.data import Dataset, ImageForm

SPLIT_NAMES = {"train", "training", "test", "testing", "val", "valid", "validation"}
LEFT_BY_SYSTEMS = {"Thumbs.db", "desktop.ini", "__MACOSX"}


def load(source: str, form: ImageForm) -> Dataset:
    """Load a folder of images; its folders, or those in its `train`, are the classes, in the order of their names.

    A class has the files in its folder and in the folders in that. Without `test`, `training.splits` chooses test
    images from each class. A folder that holds a single folder of folders stands for it, as archives often unpack.

    Raises:
        BadInput: There are fewer than two classes, a class has no images, or an image cannot be read or has a size of
            its own.
    """
    folder = _unwrap(Path(source))
    train, test = folder / "train", folder / "test"
    if not train.is_dir() and test.is_dir():
        raise BadInput(f"{folder} has a folder test but none named train; name the training images train")
    root = train if train.is_dir() else folder
    if root == folder:
        _refuse_split_names(folder)
    unused = {path.name for path in _list_folders(folder)} - {"train", "test"}
    if root == train and unused:
        print(f"{folder} has train; not used are its folders {', '.join(sorted(unused))}")
    classes = [path.name for path in _list_folders(root)]
    if len(classes) < 2:
        raise BadInput(f"{root} needs a folder of images for each of two or more classes; it has {len(classes)}")
    paths, labels = _find_images(root, classes)
    if test.is_dir():
        unknown = {path.name for path in _list_folders(test)} - set(classes)
        if unknown:
            raise BadInput(f"{test} has the class {min(unknown)!r}, which {train} does not have")
        lacking = set(classes) - {path.name for path in _list_folders(test)}
        if lacking:
            raise BadInput(f"{test} has no folder {min(lacking)!r}; add test images of each class")
        test_paths, test_labels = _find_images(test, classes)
        is_test = np.repeat([False, True], [len(paths), len(test_paths)])
        paths, labels = paths + test_paths, np.concatenate([labels, test_labels])
    else:
        is_test = splits.choose_test(str(root), labels)
    return Dataset.of_files(Path(source).resolve().name, classes, paths, labels, is_test, form)


def _unwrap(folder: Path) -> Path:
    """Return the folder with the classes, or with `train`."""
    while (
        len(inner := _list_folders(folder)) == 1 and inner[0].name not in ("train", "test") and _list_folders(inner[0])
    ):
        folder = inner[0]
    return folder


def _refuse_split_names(folder: Path) -> None:
    """Refuse to take folders of splits for classes."""
    names = sorted(path.name for path in _list_folders(folder) if path.name.lower() in SPLIT_NAMES)
    if len(names) > 1:
        raise BadInput(
            f"{folder} has the folders {' and '.join(names)}, which are no classes; name them train and test "
            "(images for validation are chosen from train)"
        )


def _find_images(folder: Path, classes: Sequence[str]) -> tuple[list[Path], NDArray[np.int32]]:
    """Return the files of all classes, and their labels."""
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files = list(_find_files(folder / name))
        if not files:
            raise BadInput(f"{folder / name} holds no images; add some, or remove it")
        paths += files
        labels += [label] * len(files)
    return paths, np.array(labels, np.int32)


def _find_files(folder: Path) -> Iterator[Path]:
    """Yield the visible files of a folder and of the folders in it, in order."""
    for path in _list_visible(folder):
        if path.is_dir():
            if path.is_symlink() and folder.resolve().is_relative_to(path.resolve()):
                raise BadInput(f"{path} is a link to a folder that it is in; remove it")
            yield from _find_files(path)
        else:
            yield path


def _list_folders(folder: Path) -> list[Path]:
    return [path for path in _list_visible(folder) if path.is_dir()]


def _list_visible(folder: Path) -> list[Path]:
    try:
        return sorted(
            path for path in folder.iterdir() if not path.name.startswith(".") and path.name not in LEFT_BY_SYSTEMS
        )
    except OSError as error:
        raise BadInput(f"{folder} cannot be read ({error.strerror})") from None
