"""A CSV table of image files: the columns `path` and `label`, and optionally `split` and `group`."""

from __future__ import annotations

import csv
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from resnet import BadInput
from training import splits
from training.data import Dataset, ImageForm

COLUMNS = {
    "path": "of an image, relative to the folder of the table",
    "label": "the name of its class",
    "split": "train or test",
    "group": "of images that belong together, such as those of one person",
}
NEEDED = ("path", "label")
SPLITS = ("train", "test")


class LabelledFile(NamedTuple):
    """One row of a table; without their columns, `split` and `group` are empty.

    Attributes:
        path: The image.
        label: Its class.
        split: `train`, `test`, or empty.
        group: Its group, or empty.
    """

    path: Path
    label: str
    split: str
    group: str


def load(source: str, form: ImageForm) -> Dataset:
    """Load a table, or a folder with `train.csv` and perhaps `test.csv`; classes are in the order of their names.

    Without the column `split` and `test.csv`, `training.splits` chooses test images from each class. No group is in
    both splits.

    Raises:
        BadInput: A table cannot be read, has a column of another name, or names an image that does not exist; there are
            fewer than two classes; or a group or a class is not where it should be.
    """
    path = Path(source)
    table, tests = (path / "train.csv", path / "test.csv") if path.is_dir() else (path, None)
    rows = _read(table)
    if tests and tests.is_file():
        if any(row.split for row in rows):
            raise BadInput(f"{table} has a column 'split', and {tests} is beside it; keep one of the two")
        rows = [row._replace(split="train") for row in rows] + [row._replace(split="test") for row in _read(tests)]
    classes = sorted({row.label for row in rows if row.split != "test"})
    if len(classes) < 2:
        raise BadInput(f"{table} needs images of two or more classes to train with; it has {len(classes)}")
    unknown = {row.label for row in rows} - set(classes)
    if unknown:
        raise BadInput(f"{table} has no training image of the class {min(unknown)!r}, which has test images")
    labels = np.array([classes.index(row.label) for row in rows], np.int32)
    groups = None
    if all(row.group for row in rows if row.split != "test"):
        groups = np.unique([row.group for row in rows], return_inverse=True)[1].astype(np.int32)
    if any(row.split for row in rows):
        is_test = np.array([row.split == "test" for row in rows])
        _check_splits(table, rows)
    else:
        is_test = splits.choose_test(str(table), labels, groups)
    name = path.resolve().name if path.is_dir() else path.stem
    return Dataset.of_files(name, classes, [row.path for row in rows], labels, is_test, form, groups)


def _check_splits(table: Path, rows: list[LabelledFile]) -> None:
    if all(row.split == "train" for row in rows):
        raise BadInput(f"{table} has no test images; without a column 'split' and test.csv some are chosen")
    train, test = ({row.group for row in rows if row.split == split and row.group} for split in SPLITS)
    if train & test:
        raise BadInput(f"{table}: the group {min(train & test)!r} is in train and in test; put it in one of the two")


def _read(table: Path) -> list[LabelledFile]:
    """Return the rows of a table."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            return list(_parse(table, csv.reader(file, strict=True, skipinitialspace=True)))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"{table} cannot be read ({error}); it must be a CSV table in UTF-8") from None


def _parse_header(table: Path, names: list[str]) -> list[str]:
    """Return the columns that the first row of a table names."""
    columns = [name.strip().lower() for name in names]
    known = "the columns are path and label, and optionally split and group"
    if len(columns) == 1 and ";" in columns[0]:
        raise BadInput(f"the values in {table} are separated by semicolons; separate them by commas")
    for name in columns:
        if name not in COLUMNS:
            raise BadInput(f"{table} has a column {name!r}; {known}, so remove or rename it")
        if columns.count(name) > 1:
            raise BadInput(f"{table} has a column {name!r} twice; {known}")
    for name in NEEDED:
        if name not in columns:
            raise BadInput(f"the first row of {table} names no column {name!r}; {known}")
    return columns


def _parse(table: Path, lines: Iterator[list[str]]) -> Iterator[LabelledFile]:
    columns = _parse_header(table, next(lines, []))
    for number, line in enumerate(lines, start=2):
        if not any(value.strip() for value in line):  # spreadsheets leave such rows
            continue
        if len(line) != len(columns):
            raise BadInput(f"row {number} of {table} has {len(line)} values for {len(columns)} columns")
        row = {name: value.strip() for name, value in zip(columns, line, strict=True)}
        for name in columns:
            if not row[name]:
                advice = "; an image that belongs to no other needs a group of its own" if name == "group" else ""
                raise BadInput(f"row {number} of {table} has no {name}{advice}")
        if "split" in row and row["split"] not in SPLITS:
            raise BadInput(
                f"row {number} of {table} has the split {row['split']!r}; it must be train or test "
                "(images for validation are chosen from train)"
            )
        path = table.parent / row["path"]
        if not os.path.isfile(path):  # noqa: PTH113  # Path.is_file raises for a name that is too long
            advice = "; separate folders by /" if "\\" in row["path"] else ""
            raise BadInput(f"row {number} of {table} names {row['path']!r}, but there is no file {str(path)!r}{advice}")
        label, group = (unicodedata.normalize("NFC", row.get(name, "")) for name in ("label", "group"))
        yield LabelledFile(path, label, row.get("split", ""), group)
