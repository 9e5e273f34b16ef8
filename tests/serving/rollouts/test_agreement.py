"""What is counted when answers are compared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resnet import BadInput
from serving.rollouts.agreement import WORST, Agreement
from serving.rollouts.images import ImageFolder
from serving.runtimes.base import Images, Probabilities

LABELS = ("red", "green", "blue")


def answers(*rows: tuple[float, float, float]) -> Probabilities:
    """Return probabilities."""
    return np.array(rows, np.float32)


def pictures(count: int, value: int = 0) -> Images:
    """Return images of one color."""
    return np.full((count, 2, 2, 3), value, np.uint8)


def test_images_are_counted_by_the_class_that_was_given() -> None:
    """And those with the same one."""
    agreement = Agreement(LABELS)
    given = answers((0.5, 0.3, 0.2), (0.5, 0.3, 0.2), (0, 0, 1))
    agreement.add("a", 1, pictures(3), given, answers((0.5, 0.3, 0.2), (0.3, 0.5, 0.2), (0, 0, 1)))
    agreement.add("b", 2, pictures(1), answers((0, 1, 0)), answers((0, 1, 0)))
    counts = agreement.counts()
    assert counts.images.tolist() == [2, 1, 1]
    assert counts.same.tolist() == [1, 1, 1]
    assert counts.max_difference == pytest.approx(0.2)
    worst = counts.worst[0]
    assert (worst.request_id, worst.image, worst.version, worst.answer, worst.other_answer) == (
        "a",
        1,
        1,
        "red",
        "green",
    )


def test_another_class_differs_more_than_any_probability() -> None:
    """Also where that differs by more."""
    agreement = Agreement(LABELS)
    agreement.add("same", 1, pictures(1), answers((1, 0, 0)), answers((0.5, 0.25, 0.25)))
    agreement.add("other", 1, pictures(1), answers((0.34, 0.33, 0.33)), answers((0.33, 0.34, 0.33)))
    assert [one.request_id for one in agreement.counts().worst] == ["other", "same"]


def test_the_ten_requests_that_differ_most_are_kept_each_once() -> None:
    """With the image that differs most, wherever it was in the request."""
    agreement = Agreement(LABELS)
    for number in range(30):
        difference = (number * 7 % 30) / 100
        agreement.add(f"r{number}", 1, pictures(1), answers((1, 0, 0)), answers((1 - difference, difference, 0)))
    agreement.add("r0", 1, pictures(2), answers(*[(1, 0, 0)] * 2), answers((0.9, 0.1, 0), (0.6, 0.4, 0)), first=32)
    worst = agreement.counts().worst
    assert len(worst) == WORST
    assert (worst[0].request_id, worst[0].image) == ("r0", 33)
    assert [one.difference for one in worst] == sorted((one.difference for one in worst), reverse=True)
    agreement.add("r0", 1, pictures(1), answers((1, 0, 0)), answers((0.99, 0.01, 0)), first=34)
    assert agreement.counts().worst == worst


def test_an_answer_that_is_no_number_differs_most() -> None:
    """It has no class that could be the same."""
    agreement = Agreement(LABELS)
    agreement.add("nan", 1, pictures(1), answers((1, 0, 0)), answers((float("nan"),) * 3))  # whose argmax is 0
    agreement.add("both", 1, pictures(1), answers((float("nan"),) * 3), answers((float("nan"),) * 3))
    counts = agreement.counts()
    assert counts.max_difference == 1
    assert counts.same.sum() == 0


def test_images_are_kept_where_that_was_asked_for(tmp_path: Path) -> None:
    """Those of the worst requests only; whatever their ids are, no file leaves the folder."""
    folder = ImageFolder(tmp_path / "kept")
    agreement = Agreement(LABELS, folder)
    for number in range(2 * WORST):
        name = f"../../{'ä' * 300}/{number}"
        agreement.add(name, 1, pictures(1, number), answers((1, 0, 0)), answers((1 - number / 100, number / 100, 0)))
    kept = sorted((tmp_path / "kept").iterdir())
    assert kept == sorted(folder.find(one.request_id, one.image) for one in agreement.counts().worst)
    values = {int(np.asarray(Image.open(path))[0, 0, 0]) for path in kept}
    assert values == set(range(WORST, 2 * WORST))
    assert list(tmp_path.iterdir()) == [tmp_path / "kept"]


def test_grey_images_are_kept_as_such(tmp_path: Path) -> None:
    """Pillow takes no last axis of 1."""
    folder, pixels = ImageFolder(tmp_path), np.arange(6, dtype=np.uint8).reshape(2, 3, 1)
    folder.keep("a", 0, pixels)
    with Image.open(folder.find("a", 0)) as image:
        assert np.asarray(image).tolist() == pixels[..., 0].tolist()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """At once; one that vanishes later costs a warning only."""
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match=r"--keep-images .*file/kept cannot be written: Not a directory"):
        ImageFolder(tmp_path / "file" / "kept")
    folder = ImageFolder(tmp_path / "kept")
    (tmp_path / "kept").rmdir()
    folder.keep("a", 0, pictures(1)[0])
    folder.remove("a", 0)
