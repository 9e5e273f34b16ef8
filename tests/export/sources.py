"""What an export needs, made of a model and noise; importing it loads TensorFlow."""

from __future__ import annotations

from pathlib import Path

import keras
import msgspec
import numpy as np

from export.export import BUDGETS
from export.source import Evidence, Source

POINT = {name: msgspec.structs.replace(budget, evidence="point") for name, budget in BUDGETS.items()}
"""Budgets that a few images can carry."""


def make_source(model: keras.Model, images: int = 8, calibration: int | None = None) -> Source:
    """Return a model with images of noise; the classes are those that the model predicts."""
    rng = np.random.default_rng(0)
    heldout, training = (
        rng.integers(256, size=(count, *model.input_shape[1:]), dtype=np.uint8) for count in (images, calibration or 1)
    )
    targets = np.asarray(model(heldout)).argmax(axis=1).astype(np.int32)
    labels = tuple(f"class {index}" for index in range(model.output_shape[-1]))
    evidence = Evidence(labels, heldout, targets, None if calibration is None else training)
    return Source(Path("model.keras"), model, evidence, None, None)


def classifier(*layers: keras.layers.Layer, side: int = 12, scale: float = 1 / 255, classes: int = 3) -> keras.Model:
    """Return a classifier of uint8 images with these layers between the scaling of pixels and the probabilities."""
    keras.utils.set_random_seed(0)
    image = keras.Input((side, side, 3), dtype="uint8")
    x = keras.layers.Rescaling(scale)(image)
    for layer in layers:
        x = layer(x)
    if len(x.shape) > 2:
        x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(image, keras.layers.Dense(classes, activation="softmax")(x))
