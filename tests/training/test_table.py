"""CSV tables of images, and what is said about those that cannot be used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resnet import BadInput
from training import data, splits

Rows = Sequence[Sequence[str]]


@pytest.fixture
def small_network() -> None:
    """Nothing is trained here."""


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a table, and an image of its own for each file that it names."""

    def write(rows: Rows, columns: str = "path,label", name: str = "train.csv", images: bool = True) -> Path:
        for row in rows if images else ():
            path = tmp_path / row[0]
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (len(list(path.parent.iterdir())),) * 3).save(path)
        table = tmp_path / name
        table.write_text("\n".join([columns, *map(",".join, rows), ""]), "utf-8")
        return table

    return write


def list_names(split: data.Split) -> list[str]:
    """Return the names of the files of a split."""
    return [path.name for path in split.paths or ()]


def test_a_table_names_files_and_classes(write: Callable[..., Path], tmp_path: Path) -> None:
    """Paths are relative to it; names may have spaces and any letters; a byte order mark is no part of a column."""
    table = write([("a b.png", '"red, round "'), ("in/ü.png", "Käse"), ("c.png", '"red, round"'), ("d.png", "Käse")])
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes())
    dataset = data.load(str(tmp_path))
    assert (dataset.name, dataset.classes) == (tmp_path.name, ("Käse", "red, round"))
    found: dict[str, int] = {}
    for split in (dataset.train, dataset.test):
        found |= zip(list_names(split), split.labels.tolist(), strict=True)
    assert found == {"a b.png": 1, "ü.png": 0, "c.png": 1, "d.png": 0}
    assert np.bincount(dataset.test.labels).tolist() == [1, 1]
    alone = data.load(str(table.rename(tmp_path / "pets.csv")))
    assert (alone.name, alone.sha256) == ("pets", dataset.sha256)


@pytest.mark.parametrize("column", [True, False], ids=["column", "test.csv"])
def test_the_test_images_may_be_named(write: Callable[..., Path], tmp_path: Path, column: bool) -> None:
    """By a column, or by a table of their own; a class may be without any."""
    train, test = [("1.png", "cat"), ("2.png", "dog"), ("3.png", "cat")], [("4.png", "dog")]
    if column:
        rows = [(*row, "train") for row in train] + [(*row, "test") for row in test]
        write(rows, "path,label,split")
    else:
        write(train)
        write(test, name="test.csv")
    dataset = data.load(str(tmp_path))
    assert (list_names(dataset.train), dataset.train.labels.tolist()) == (["1.png", "2.png", "3.png"], [0, 1, 0])
    assert (list_names(dataset.test), dataset.test.labels.tolist()) == (["4.png"], [1])


def test_a_group_is_on_one_side_only(write: Callable[..., Path], tmp_path: Path) -> None:
    """Of training and test, and of training and validation."""
    rows = [(f"{n}.png", ("cat", "dog")[n % 2], f"patient {n // 4}") for n in range(40)]
    write(rows, "path,label,group")
    dataset = data.load(str(tmp_path))
    assert dataset.train.groups is not None
    assert dataset.test.groups is not None
    assert len(dataset.test.labels) == 8
    assert not set(dataset.train.groups) & set(dataset.test.groups)
    training, validation = splits.split_validation(dataset.train, 0.25)
    assert len(validation) == 8
    assert sorted([*training, *validation]) == list(range(32))
    assert not set(dataset.train.groups[training]) & set(dataset.train.groups[validation])


def test_a_table_is_read_as_spreadsheets_write_it(write: Callable[..., Path], tmp_path: Path) -> None:
    """Spaces around values, capitals in the first row, rows of commas, and accents in either form."""
    rows = [(f"{n}.png", ' "K\u00e4se"' if n % 4 else " Ka\u0308se", f" {n // 10}") for n in range(30)]
    rows += [(f"{n}.png", " dog", f"{n // 10} ") for n in range(30)]
    table = write(rows, "Path, Label,GROUP")
    table.write_text(table.read_text("utf-8") + ",,\n", "utf-8")
    dataset = data.load(str(tmp_path))
    assert dataset.classes == ("K\u00e4se", "dog")
    assert dataset.train.groups is not None
    assert len(set(dataset.train.groups)) == 2
    assert len(dataset.train.labels) + len(dataset.test.labels) == 60


@pytest.mark.parametrize(
    ("name", "message"), [(r"in\1.png", "separate folders by /"), ("x" * 300, "but there is no file")]
)
def test_a_path_that_leads_nowhere_is_refused(write: Callable[..., Path], name: str, message: str) -> None:
    """With its row."""
    with pytest.raises(BadInput, match=f"row 2 of .*{message}"):
        data.load(str(write([(name, "cat")], images=False)))


CLASSES = [("1.png", "cat"), ("2.png", "dog")]
KNOWN = "the columns are path and label, and optionally split and group"
FAULTS: dict[str, tuple[str, Rows, str]] = {
    "an unknown column": ("path,label,fold", [], f"has a column 'fold'; {KNOWN}, so remove or rename it"),
    "a column twice": ("path,label,label", [], f"has a column 'label' twice; {KNOWN}"),
    "no labels": ("path,group", [], f"the first row of .* names no column 'label'; {KNOWN}"),
    "another separator": ("path;label", [], "are separated by semicolons; separate them by commas"),
    "no line": ("", [], f"the first row of .* names no column 'path'; {KNOWN}"),
    "no group": ("path,label,group", [("1.png", "cat", " ")], "row 2 of .* has no group; an image that belongs to no"),
    "one class": ("path,label", [("1.png", "cat"), ("2.png", "cat")], "two or more classes to train with; it has 1"),
    "no images": ("path,label", [], "two or more classes to train with; it has 0"),
    "a value too few": ("path,label,group", CLASSES, "row 2 of .* has 2 values for 3 columns"),
    "an empty label": ("path,label", [("1.png", " ")], "row 2 of .* has no label"),
    "another split": ("path,label,split", [("1.png", "cat", "val")], "the split 'val'; it must be train or test"),
    "no test images": ("path,label,split", [(*row, "train") for row in CLASSES], "has no test images; without"),
    "a class for testing only": (
        "path,label,split",
        [("1.png", "cat", "train"), ("2.png", "dog", "train"), ("3.png", "emu", "test")],
        "has no training image of the class 'emu'",
    ),
    "a group on both sides": (
        "path,label,split,group",
        [("1.png", "cat", "train", "me"), ("2.png", "dog", "train", "you"), ("3.png", "cat", "test", "me")],
        "the group 'me' is in train and in test",
    ),
    "one group of all": (
        "path,label,group",
        [(*row, "me") for row in CLASSES],
        "none can be chosen: every group holds all images of a class",
    ),
    "an open quote": ("path,label", [("1.png", '"cat')], "cannot be read .*; it must be a CSV table in UTF-8"),
    "a label that is no line": (
        "path,label",
        [("1.png", "\x1b[31m"), *CLASSES, *CLASSES],
        "a name is one line of text",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_table_is_refused_in_a_sentence(write: Callable[..., Path], fault: str) -> None:
    """Which names it, and the row or column."""
    columns, rows, message = FAULTS[fault]
    with pytest.raises(BadInput, match=message):
        data.load(str(write(rows, columns)))


def test_files_that_are_not_there_are_named(write: Callable[..., Path]) -> None:
    """With the row, as the table has it."""
    table = write([("1.png", "cat"), ("in/2.png", "dog")])
    (table.parent / "in" / "2.png").unlink()
    with pytest.raises(BadInput, match=r"row 3 of .*train.csv names 'in/2.png', but there is no file '.*/in/2.png'"):
        data.load(str(table))
    table.write_bytes("path,label\n1.png,Käse\n".encode("latin-1"))
    with pytest.raises(BadInput, match="can't decode .*; it must be a CSV table in UTF-8"):
        data.load(str(table))


def test_two_ways_to_name_test_images_are_refused(write: Callable[..., Path], tmp_path: Path) -> None:
    """They may contradict each other."""
    write([(*row, "train") for row in CLASSES], "path,label,split")
    write(CLASSES, name="test.csv")
    with pytest.raises(BadInput, match=r"has a column 'split', and .*test.csv is beside it; keep one of the two"):
        data.load(str(tmp_path))
