"""A recipe does what its values say."""

from __future__ import annotations

import dataclasses
from typing import Any

import keras
import numpy as np
import pytest

from resnet import BadInput
from training.optimizer import compile_for, schedule
from training.recipes import RECIPES, Recipe


def rates(recipe: Recipe, steps: int) -> list[float]:
    """Return the learning rate of every step."""
    rate = schedule(recipe, steps)
    return [float(rate(step)) if callable(rate) else rate for step in range(steps)]


def test_the_paper_divides_its_learning_rate_by_ten_twice() -> None:
    """Of 64,000 steps at 32,000 and 48,000."""
    learning = rates(RECIPES["paper"], 64)
    assert learning[:33] == pytest.approx([0.1] * 33)  # Keras takes the step at the boundary to the part before it
    assert learning[33:49] == pytest.approx([0.01] * 16)
    assert learning[49:] == pytest.approx([0.001] * 15)
    assert RECIPES["paper"].epochs == round(64_000 / -(-45_000 // 128))


def test_one_cycle_rises_to_its_peak_and_falls_to_zero() -> None:
    """A fifth of the steps up, the rest down along half a cosine."""
    recipe = RECIPES["modern"]
    learning = rates(recipe, 100)
    assert learning[0] == 0
    assert np.argmax(learning) == 20
    assert learning[20] == pytest.approx(recipe.learning_rate)
    assert learning[60] == pytest.approx(recipe.learning_rate / 2)
    assert learning[-1] < 0.001 * recipe.learning_rate
    assert rates(dataclasses.replace(recipe, warmup=0), 100)[0] == pytest.approx(recipe.learning_rate)


def test_a_constant_rate_is_constant() -> None:
    """The notebook's."""
    assert set(rates(RECIPES["notebook"], 5)) == {1e-3}


def test_weight_decay_is_an_l2_penalty_on_kernels_alone() -> None:
    """Many small steps with decay end where the same steps with the penalty in the gradient end."""
    recipe = Recipe(name="", optimizer="sgd", learning_rate=1e-3, weight_decay=0.1)
    network = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="ones", name="dense")])
    compile_for(network, recipe, steps=300)
    kernel, bias = network.trainable_variables
    network.optimizer.build([kernel, bias])
    bias.assign([1.0])
    for _ in range(300):
        network.optimizer.apply([keras.ops.zeros((1, 1)), keras.ops.zeros((1,))])
    weight, velocity = 1.0, 0.0
    for _ in range(300):
        velocity = 0.9 * velocity - recipe.learning_rate * recipe.weight_decay * weight
        weight += velocity
    assert float(kernel[0, 0]) == pytest.approx(weight, abs=0.01)
    assert weight < 0.8
    assert float(bias[0]) == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, "--epochs must be from 1 to 1000000, not 0"),
        ({"learning_rate": -1.0}, r"--learning-rate must be from 0 to 1e\+30"),
        ({"learning_rate": float("nan")}, r"--learning-rate must be from 0 to 1e\+30, not nan"),
        ({"validation": 1.0}, "--validation must be from 0.001 to 0.9, not 1"),
        ({"label_smoothing": 2.0}, "--label-smoothing must be from 0 to 0.9"),
        ({"weight_average": 1.0}, "--weight-average must be from 0 to 0.9999"),
    ],
)
def test_a_value_out_of_range_is_named(values: dict[str, Any], message: str) -> None:
    """By its option, with what it may be."""
    with pytest.raises(BadInput, match=message):
        Recipe(name="", **values)
