"""Every image is seen once an epoch, changed as the recipe says and in no other way."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from numpy.typing import NDArray

from training.batches import Batches, TrainingBatches, augment
from training.data import Split
from training.images import Pixels
from training.recipes import Recipe


@pytest.fixture(scope="module")
def images() -> Pixels:
    """Images of noise, in which no part looks like another."""
    return np.random.default_rng(1).integers(256, size=(50, 16, 16, 3), dtype=np.uint8)


def changed(images: Pixels, **values: Any) -> Pixels:
    """Augment with one value of a recipe."""
    return augment(images, Recipe(name="", **values), np.random.default_rng(0))


def test_without_augmentation_nothing_changes(images: Pixels) -> None:
    """Not a bit."""
    np.testing.assert_array_equal(changed(images), images)


def test_flip_mirrors_each_image_in_every_other_epoch(images: Pixels) -> None:
    """From left to right, half of them in the first; the others stay."""
    split = Split(images, np.arange(50, dtype=np.int32))
    batches = TrainingBatches(split, np.arange(50), 50, Recipe(name="", batch_size=50, flip=True), seed=3)
    mirrored = []
    for epoch in range(3):
        batches.begin(epoch)
        shown, targets = batches[0]
        before = images[targets.argmax(axis=1)]
        turned = np.array([np.array_equal(after, image[:, ::-1]) for after, image in zip(shown, before, strict=True)])
        np.testing.assert_array_equal(shown[~turned], before[~turned])
        mirrored.append(set(targets.argmax(axis=1)[turned].tolist()))
    assert mirrored[0] == mirrored[2] == set(range(50)) - mirrored[1]
    assert 15 < len(mirrored[0]) < 35


def test_crop_moves_images_by_up_to_its_share(images: Pixels) -> None:
    """An eighth of 16 pixels is 2: what comes out is a window of the image with 2 more pixels on each side."""
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")
    moves = set()
    for wide, after in zip(padded, changed(images, crop=0.125), strict=True):
        matches = [
            (row, column)
            for row in range(5)
            for column in range(5)
            if np.array_equal(wide[row : row + 16, column : column + 16], after)
        ]
        assert len(matches) == 1
        moves.update(matches)
    assert len(moves) > 15


def test_cutout_greys_a_square(images: Pixels) -> None:
    """Of at most a quarter of the side, wherever its centre lies; all else stays."""
    result = changed(images, cutout=0.25)
    holes = (result != images).any(axis=3)
    assert (result[holes] == 128).all()
    assert holes.any(axis=(1, 2)).all()
    assert holes.any(axis=1).sum(axis=1).max() <= 4
    assert holes.any(axis=2).sum(axis=1).max() <= 4


def test_an_epoch_sees_every_image_once_and_the_next_in_another_order(images: Pixels) -> None:
    """And each epoch is the same whenever it is begun, augmentation and all: that is what resuming needs."""
    split = Split(images, np.arange(50, dtype=np.int32))
    chosen = np.arange(5, 50)
    recipe = Recipe(name="", batch_size=16, flip=True, crop=0.25)
    batches = TrainingBatches(split, chosen, 50, recipe, seed=3)

    def labels(epoch: int) -> NDArray[np.intp]:
        batches.begin(epoch)
        return np.concatenate([batches[index][1].argmax(axis=1) for index in range(len(batches))])

    assert len(batches) == 3
    assert sorted(labels(0)) == list(chosen)
    assert sorted(labels(1)) == list(chosen)
    assert labels(0).tolist() != labels(1).tolist()
    batches.begin(1)
    first = batches[1][0]
    fresh = TrainingBatches(split, chosen, 50, recipe, seed=3)
    fresh.begin(1)
    np.testing.assert_array_equal(fresh[1][0], first)
    fresh.begin(2)
    assert not np.array_equal(fresh[1][0], first)


def test_several_threads_change_nothing(images: Pixels) -> None:
    """What a network has learned after two epochs, to the bit."""
    split = Split(images, np.arange(50, dtype=np.int32) % 7)
    recipe = Recipe(name="", batch_size=4, flip=True, crop=0.25, cutout=0.5)

    def train(workers: int) -> NDArray[np.float32]:
        keras.utils.set_random_seed(0)
        batches = TrainingBatches(split, np.arange(50), 7, recipe, seed=3, workers=workers)
        network = keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(7, activation="softmax")])
        network.compile("sgd", "categorical_crossentropy")
        begin = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, _: batches.begin(epoch))
        network.fit(batches, epochs=2, shuffle=False, callbacks=[begin], verbose=0)
        weights: NDArray[np.float32] = network.get_weights()[0]
        return weights

    np.testing.assert_array_equal(train(3), train(1))


def test_validation_images_come_as_they_are(images: Pixels) -> None:
    """In order, with their classes one-hot."""
    batches = Batches(Split(images, np.arange(50, dtype=np.int32) % 7), np.array([4, 8, 15]), 7, batch_size=2)
    assert len(batches) == 2
    np.testing.assert_array_equal(batches[0][0], images[[4, 8]])
    np.testing.assert_array_equal(batches[1][1], np.eye(7, dtype=np.float32)[[1]])
