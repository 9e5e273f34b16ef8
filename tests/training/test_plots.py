"""Pictures are for people, and never cost a training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.data import Split
from training.plots import MATRIX_CLASSES, PAIRS, plot_confusion, plot_curves, plot_mistakes
from training.run_folder import RunFolder


def test_the_errors_of_many_classes_are_a_short_list(tmp_path: Path) -> None:
    """Of a thousand classes a matrix would take gigabytes, and nobody could read it."""
    classes = 1000
    confusion = np.diag(np.full(classes, 9))
    confusion[np.arange(classes - 1), np.arange(1, classes)] = np.arange(classes - 1)
    plot_confusion(confusion, tuple(f"class {index}" for index in range(classes)), RunFolder(tmp_path))
    with Image.open(tmp_path / "confusion.png") as picture:
        assert picture.width == 1200
        assert 120 * 0.2 * PAIRS < picture.height < 1500


def test_many_classes_without_errors_are_an_empty_list(tmp_path: Path) -> None:
    """There is a picture all the same."""
    classes = MATRIX_CLASSES + 1
    plot_confusion(np.eye(classes, dtype=int), tuple(map(str, range(classes))), RunFolder(tmp_path))
    assert (tmp_path / "confusion.png").exists()


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_mistakes_of_all_colours_are_drawn(channels: int, tmp_path: Path) -> None:
    """Grey ones in grey, not in false colours."""
    test = Split(np.full((2, 8, 8, channels), 128, np.uint8), np.array([0, 1], np.int32))
    plot_mistakes(test, np.array([[0, 1], [1, 0]], np.float32), ("cat", "dog"), RunFolder(tmp_path))
    with Image.open(tmp_path / "mistakes.png") as picture:
        colours = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert np.ptp(colours, axis=1).max() == 0
    assert (colours == 128).any()


@pytest.mark.parametrize("name", ["a $price$ tag", r"$\frac$", "$", "\\", "猫"])
@pytest.mark.parametrize("others", [1, MATRIX_CLASSES])
def test_a_name_is_text_whatever_it_contains(
    name: str,
    others: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    """Two dollars do not make a formula, and letters that the font lacks are no warning."""
    classes = (name, *(f"class {index}" for index in range(others)))
    count = len(classes)
    test = Split(np.zeros((count, 8, 8, 3), np.uint8), np.arange(count, dtype=np.int32))
    probabilities = np.roll(np.eye(count, dtype=np.float32), 1, axis=1)
    plot_confusion(np.roll(np.eye(count, dtype=int), 1, axis=1), classes, RunFolder(tmp_path))
    plot_mistakes(test, probabilities, classes, RunFolder(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"confusion.png", "mistakes.png"}
    assert "not drawn" not in capsys.readouterr().out
    assert not list(recwarn)


def test_a_picture_that_cannot_be_drawn_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And leaves nothing half-written."""
    plot_curves([{"epoch": 1}], RunFolder(tmp_path))
    assert "curves.png was not drawn: 'accuracy'" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
