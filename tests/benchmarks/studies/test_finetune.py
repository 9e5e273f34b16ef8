"""What is fine-tuned on has nothing of what was learned before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.studies import finetune
from benchmarks.studies.finetune import CLASSES, write_few, write_nine


@pytest.fixture
def cifar10(tmp_path: Path) -> Path:
    """Six images of each class for training, and two for the test; each has a colour of its own."""
    for number, name in enumerate(CLASSES):
        for split, count in (("train", 6), ("test", 2)):
            folder = tmp_path / "cifar10" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (4, 4), (number, index, len(split))).save(folder / f"{index}.png")
    return tmp_path / "cifar10"


def read_colors(folder: Path) -> set[tuple[int, ...]]:
    """Return the colours of all images in a folder."""
    return {tuple(np.asarray(Image.open(file))[0, 0].tolist()) for file in folder.rglob("*.png")}


def test_three_new_classes_are_made_of_images_that_were_kept_back(
    cifar10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trucks, inverted cars, and cars blended with ships: few for training, and all there are for the test."""
    monkeypatch.setattr(finetune, "KEPT_BACK", 2)
    monkeypatch.setattr(finetune, "FEW", 1)
    nine, few = tmp_path / "nine", tmp_path / "few"
    write_nine(cifar10, nine)
    write_few(cifar10, few)
    car, ship, truck = (CLASSES.index(name) for name in ("automobile", "ship", "truck"))
    train, test = len("train"), len("test")
    learned = {(number, index, train) for number in range(10) if number != truck for index in range(2, 6)}
    assert read_colors(nine / "train") == learned
    assert read_colors(nine / "test") == {
        (number, index, test) for number in range(10) if number != truck for index in (0, 1)
    }
    assert {folder.name for folder in (few / "train").iterdir()} == {"truck", "inverted", "blended"}
    assert read_colors(few / "train" / "truck") == {(truck, 0, train)}
    assert read_colors(few / "train" / "inverted") == {(255 - car, 255, 255 - train)}
    assert read_colors(few / "train" / "blended") == {((car + ship) // 2, 0, train)}
    assert read_colors(few / "test" / "truck") == {(truck, 0, test), (truck, 1, test)}
    assert read_colors(few / "test" / "inverted") == {(255 - car, 255 - index, 255 - test) for index in (0, 1)}
    assert len(read_colors(few / "test" / "blended")) == 1  # the first car with the second ship, and the reverse
