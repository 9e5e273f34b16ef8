"""What a Keras model ends in: the logits of a softmax are compared too, those of a sigmoid are not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import keras
import msgspec
import numpy as np
import onnx
import pytest
from keras import layers

from export import classifier, manifest
from export.certificate import Budget
from export.export import BUDGETS, export
from tests.export.sources import make_source

SOFTMAXES: dict[str, Callable[[keras.KerasTensor], keras.KerasTensor]] = {
    "a dense layer": layers.Dense(3, activation="softmax"),
    "an activation": lambda x: layers.Activation("softmax")(layers.Dense(3)(x)),
    "a layer": lambda x: layers.Softmax()(layers.Dense(3)(x)),
    "an operation": lambda x: keras.ops.softmax(layers.Dense(3)(x)),
    "a cast": lambda x: keras.ops.cast(layers.Dense(3, activation="softmax")(x), "float32"),
    "a model": keras.Sequential([layers.Dense(3, activation="softmax")]),
}


def build(end: Callable[[keras.KerasTensor], keras.KerasTensor]) -> keras.Model:
    """Return a model that ends so."""
    keras.utils.set_random_seed(0)
    image = keras.Input((8, 8, 3), dtype="uint8")
    return keras.Model(image, end(layers.Flatten()(layers.Rescaling(1 / 255)(image))))


@pytest.mark.parametrize("kind", SOFTMAXES)
def test_a_softmax_is_recognized_wherever_it_is(kind: str) -> None:
    """In a layer, an operation or a model inside; a cast behind it changes nothing."""
    assert classifier.ends_in_softmax(build(SOFTMAXES[kind]))


def test_a_softmax_that_is_appended_is_recognized_and_a_sigmoid_is_none() -> None:
    """Of the two probabilities of a sigmoid one is rounded: it is 1 less the other."""
    images = np.zeros((2, 8, 8, 3), np.uint8)
    logits, sigmoid = build(layers.Dense(3)), build(layers.Dense(1, activation="sigmoid"))
    assert not classifier.ends_in_softmax(logits)
    file = Path("mine.keras")
    assert classifier.ends_in_softmax(classifier.end_in_probabilities(file, logits, images, logits=True))
    assert not classifier.ends_in_softmax(classifier.end_in_probabilities(file, sigmoid, images, logits=False))


def test_the_budget_of_a_sigmoid_has_no_limit_of_logits(tmp_path: Path) -> None:
    """That of a softmax has one; the ONNX file says the same as the certificate."""
    sigmoid = build(layers.Dense(1, activation="sigmoid"))
    pair = classifier.end_in_probabilities(Path("mine.keras"), sigmoid, np.zeros((2, 8, 8, 3), np.uint8), logits=False)
    without = msgspec.structs.replace(BUDGETS["fp32"], max_logit_difference=None)
    softmax = build(layers.Dense(3, activation="softmax"))
    for name, model, budget in (("softmax", softmax, BUDGETS["fp32"]), ("sigmoid", pair, without)):
        version = export(make_source(model), tmp_path / "models" / name)
        variants = manifest.read(version).certificate.variants
        assert [variant.budget for variant in variants] == [budget, budget]
        texts = {entry.key: entry.value for entry in onnx.load(version / "model.onnx").metadata_props}
        assert Budget(**json.loads(texts["budget"])) == budget
