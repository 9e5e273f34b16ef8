"""Images that stand in a data set more than once are found by their pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training import data
from training.data import Dataset, Split
from training.duplicates import find_duplicates


def test_test_images_that_were_trained_on_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their files are called, in memory or not; and those of two classes."""
    shades = {"train/cat/a": 1, "train/cat/b": 1, "train/dog/c": 2, "test/cat/d": 1, "test/dog/e": 1, "test/dog/f": 3}
    for name, shade in shades.items():
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (shade, 0, 0)).save(path, compress_level=shade + len(name) % 2)
    for limit in (data.CACHE_BYTES, 0):
        monkeypatch.setattr("training.data.CACHE_BYTES", limit)
        dataset = data.load(str(tmp_path))
        found = find_duplicates(dataset)
        assert found.count_all() == {"test_in_train": 2, "across_classes": 1}
        first, other = tmp_path / "train" / "cat" / "a.png", tmp_path / "test" / "dog" / "e.png"
        assert found.describe(dataset) == [
            f"2 test images are also in train, such as {tmp_path}/test/cat/d.png = {first}: "
            "the test accuracy counts what was learned by heart",
            f"1 image is also in another class, such as {other} = {first}: no model can tell them apart",
        ]


def test_arrays_are_named_by_their_index() -> None:
    """They have no files; where nothing is double, nothing is said."""
    images = np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1)
    train = Split(images[:4], np.array([0, 1, 0, 1], np.int32))
    double = Dataset("mine", ("a", "b"), train, Split(images[3:5], np.array([1, 0], np.int32)))
    assert find_duplicates(double).describe(double) == [
        "1 test image is also in train, such as test[0] = train[3]: the test accuracy counts what was learned by heart"
    ]
    single = Dataset("mine", ("a", "b"), train, Split(images[4:], np.array([1, 0], np.int32)))
    assert find_duplicates(single).describe(single) == []
    assert find_duplicates(single).count_all() == {"test_in_train": 0, "across_classes": 0}
