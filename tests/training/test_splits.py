"""What is set aside for testing and validation: from each class, the same every time, and whole groups."""

from __future__ import annotations

import numpy as np
import pytest

from resnet import BadInput
from training import splits
from training.data import Split


@pytest.fixture
def small_network() -> None:
    """Nothing is trained here."""


def test_each_class_gives_its_share(capsys: pytest.CaptureFixture[str]) -> None:
    """At least one image, but never its last, which is said; which ones does not depend on the other classes."""
    labels = np.repeat(np.arange(4, dtype=np.int32), [50, 3, 2, 1])
    chosen = splits.choose_test("mine", labels)
    assert np.bincount(labels[chosen], minlength=4).tolist() == [10, 1, 1, 0]
    assert "no test image of 1 of the 4 classes: each has one image only" in capsys.readouterr().out
    np.testing.assert_array_equal(splits.choose_test("mine", labels), chosen)
    assert np.flatnonzero(chosen)[:10].tolist() != list(range(10))


@pytest.mark.parametrize("sizes", [[4] * 20, [1, 2, 3, 4, 5] * 6, [30, *[2] * 30], [5, 5]], ids=str)
def test_groups_are_not_split(sizes: list[int]) -> None:
    """The share is met as nearly as groups allow, in each class, and each class keeps images to train with."""
    groups = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    labels = np.arange(len(groups), dtype=np.int32) % 2
    chosen = splits.choose_test("mine", labels, groups)
    assert not set(groups[chosen]) & set(groups[~chosen])
    assert np.all(np.bincount(labels[~chosen], minlength=2) > 0)
    found, largest = np.bincount(labels[chosen], minlength=2), max(sizes)
    assert np.all(np.abs(found - splits.TEST_SHARE * np.bincount(labels)) <= largest / 2)


def test_validation_images_without_groups_are_those_of_earlier_versions() -> None:
    """A run of an earlier version goes on with the same ones."""
    order = np.random.default_rng(0).permutation(30)
    training, validation = splits.split_validation(
        Split(np.zeros((30, 1, 1, 1), np.uint8), np.zeros(30, np.int32)), 0.1
    )
    assert (validation.tolist(), training.tolist()) == (order[:3].tolist(), order[3:].tolist())


def test_each_class_has_images_to_learn_from() -> None:
    """Also one of whose few images chance would take all for validation."""
    labels = np.array([0] * 20 + [1, 2, 3, 4], np.int32)
    examples = Split(np.zeros((len(labels), 1, 1, 1), np.uint8), labels)
    training, validation = splits.split_validation(examples, 0.5)
    assert set(labels[training].tolist()) == {0, 1, 2, 3, 4}
    assert set(labels[validation].tolist()) == {0}
    assert sorted([*training, *validation]) == list(range(len(labels)))


def test_one_group_leaves_nothing_for_validation() -> None:
    """It is said before the training."""
    labels = np.array([0, 1, 0, 1], np.int32)
    examples = Split(np.zeros((4, 1, 1, 1), np.uint8), labels, groups=np.zeros(4, np.int32))
    with pytest.raises(BadInput, match="for validation: every group holds all images of a class"):
        splits.split_validation(examples, 0.5)
