"""The Keras original: the reference of every comparison, and the signature that its conversions have."""

from __future__ import annotations

import logging
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from export.parity import Predict, Probabilities

INPUT, OUTPUT = "image", "probabilities"

# TensorFlow warns of functions that are traced again. With several models and batch sizes in one process they must be.
logging.getLogger("tensorflow").setLevel(logging.ERROR)


def load(path: Path) -> Predict:
    """Return a Keras model as a function of a batch."""
    model = keras.models.load_model(path, compile=False)

    def predict(images: NDArray[np.uint8]) -> Probabilities:
        return np.asarray(model.predict_on_batch(images))

    return predict


def describe_input(model: keras.Model) -> tf.TensorSpec:
    """Return name, dtype and shape of the input of a converted model."""
    return tf.TensorSpec(model.input_shape, tf.uint8, name=INPUT)
