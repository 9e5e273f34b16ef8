"""SavedModel: the format of TensorFlow and TensorFlow Serving."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from export.original import INPUT, OUTPUT, describe_input
from export.parity import Predict, Probabilities


def write(model: keras.Model, metadata: Mapping[str, str], path: Path, opset: int) -> None:  # noqa: ARG001
    """Write a SavedModel whose signature `serving_default` maps `image` to `probabilities`."""
    archive = keras.export.ExportArchive()
    archive.track(model)
    archive.add_endpoint("serve", lambda image: {OUTPUT: model(image, training=False)}, [describe_input(model)])
    archive.write_out(str(path), verbose=False)


def load(path: Path) -> Predict:
    """Return the `serving_default` signature of a SavedModel as a function of a batch."""
    signature = tf.saved_model.load(str(path)).signatures["serving_default"]

    def predict(images: NDArray[np.uint8]) -> Probabilities:
        probabilities: Probabilities = signature(**{INPUT: tf.constant(images)})[OUTPUT].numpy()
        return probabilities

    return predict
