"""Two classes by one output: what it is trained towards, and what it says of both."""

from __future__ import annotations

import dataclasses

import keras
import numpy as np
import pytest

from resnet import BadInput
from training import heads, model
from training.batches import Batches
from training.data import Split
from training.optimizer import compile_for
from training.recipes import RECIPES


def test_a_sigmoid_is_for_two_classes() -> None:
    """A softmax has an output for each class."""
    assert [heads.count_outputs("sigmoid", 2), heads.count_outputs("softmax", 2)] == [1, 2]
    with pytest.raises(BadInput, match="--head sigmoid is for two classes, and the data have 3"):
        heads.count_outputs("sigmoid", 3)


def test_one_output_is_the_probability_of_the_second_class() -> None:
    """Of more outputs, each is that of its class."""
    answers = np.array([[0.25], [1.0]], np.float32)
    assert heads.to_probabilities(answers).tolist() == [[0.75, 0.25], [0.0, 1.0]]
    both = np.array([[0.5, 0.5]], np.float32)
    assert heads.to_probabilities(both) is both


def test_a_network_of_one_output_ends_in_a_sigmoid(small_network: str) -> None:
    """One of more outputs in a softmax."""
    activations = []
    for outputs in (1, 2):
        network = model.build(model.ARCHITECTURES[small_network], (8, 9, 4), outputs)
        assert (network.input_shape, network.output_shape) == ((None, 8, 9, 4), (None, outputs))
        activations.append(network.layers[-1].activation)
    assert activations == [keras.activations.sigmoid, keras.activations.softmax]


def test_both_heads_have_the_same_loss() -> None:
    """The cross-entropy of the probabilities of both classes, smoothed and weighted; and the same accuracy."""
    images = np.random.default_rng(0).integers(256, size=(8, 2, 2, 1), dtype=np.uint8)
    split = Split(images, np.arange(8, dtype=np.int32) % 2)
    recipe = dataclasses.replace(RECIPES["notebook"], label_smoothing=0.2, learning_rate=0.0)
    kernel, bias = np.float32([[1], [-2], [3], [-1]]), np.float32([0.5])
    found = []
    for outputs, activation in ((1, "sigmoid"), (2, "softmax")):
        dense = keras.layers.Dense(outputs, activation)
        layers = [keras.layers.Rescaling(1 / 255), keras.layers.Flatten(), dense]
        network = keras.Sequential([keras.Input((2, 2, 1)), *layers])
        dense.set_weights([np.hstack([0 * kernel, kernel])[:, -outputs:], np.hstack([0 * bias, bias])[-outputs:]])
        compile_for(network, recipe, 1)
        network.run_eagerly = True
        batches = Batches(split, np.arange(8), outputs, 8)
        history = network.fit(batches, epochs=1, class_weight={0: 0.5, 1: 2.0}, verbose=0).history
        found.append([history["loss"][0], history["accuracy"][0]])
    np.testing.assert_allclose(*found, rtol=1e-5)
