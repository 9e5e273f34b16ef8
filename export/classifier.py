"""A Keras model as a classifier: from plain pixels, uint8, to probabilities, float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from resnet import BadInput
from training import model_file, preprocessing


def complete(file: Path, model: keras.Model, shape: tuple[int, int, int], preprocess: str | None = None) -> keras.Model:
    """Return a model of plain pixels, uint8, with the channels of the model, whose output is float32.

    Args:
        file: The file of the model, for messages.
        model: From `training.model_file.load`.
        shape: (height, width, channels) of the images.
        preprocess: One of `training.preprocessing.PREPROCESSING`; None for a model of uint8 pixels.

    Raises:
        BadInput: The model takes other images, or gives something else than a number for each class.
    """
    model_file.check_shapes(file, model, preprocess)
    pixels, output = model.inputs[0], model.outputs[0]
    takes = tuple(pixels.shape[1:])
    if any(side not in (None, actual) for side, actual in zip(takes, shape, strict=True)):
        raise BadInput(
            f"{file} takes images of shape {list(takes)}, but the held-out images have {list(shape)}; "
            "name another data set with --data"
        )
    if preprocess is None and takes == shape and output.dtype == "float32":
        return model
    image = keras.Input(shape, dtype="uint8", name="image")
    x = preprocessing.apply(preprocess, image)
    return keras.Model(image, keras.ops.cast(model(x), "float32"), name=model.name)


def end_in_probabilities(file: Path, model: keras.Model, images: NDArray[np.uint8], logits: bool) -> keras.Model:
    """Return a model that gives a probability for each class.

    Args:
        file: The file of the model, for messages.
        model: From `complete`. One with a single output gives the probability, or the logit, of the second class.
        images: Images to test the outputs with, uint8 [n, height, width, channels].
        logits: The outputs are logits.

    Raises:
        BadInput: The outputs are not what `logits` says.
    """
    answers = np.asarray(model.predict_on_batch(images))
    single = answers.shape[1] == 1
    if not np.all(np.isfinite(answers)):
        raise BadInput(f"{file} gives outputs that are not finite numbers; train the model again")
    probable = bool(np.all(answers >= 0)) and (
        bool(np.all(answers <= 1)) if single else np.allclose(answers.sum(axis=1), 1, atol=1e-3)
    )
    if logits and probable:
        raise BadInput(f"{file} ends in probabilities already: leave out --logits, which would change them")
    if not logits and not probable:
        fault = "are not between 0 and 1" if single else "are negative or do not add up to 1"
        raise BadInput(
            f"{file} does not end in probabilities: its outputs {fault}; "
            f"if they are logits, --logits appends a {'sigmoid' if single else 'softmax'}"
        )
    image, y = model.inputs[0], model.outputs[0]
    if single:
        second = keras.ops.sigmoid(y) if logits else y
        y = keras.ops.concatenate([1 - second, second], axis=-1)
    elif logits:
        y = keras.layers.Softmax(name="probabilities")(y)
    else:
        return model
    return keras.Model(image, y, name=model.name)


def ends_in_softmax(model: keras.Model) -> bool:
    """Return whether the probabilities of a model are a softmax, and not, for one, those of a sigmoid."""
    operation: Any = model.outputs[0]._keras_history.operation
    while type(operation).__name__ == "Cast":  # `complete` adds one
        operation = operation.input._keras_history.operation
    if isinstance(operation, keras.Model):
        return ends_in_softmax(operation)
    is_softmax = type(operation).__name__ == "Softmax"  # a layer, or the operation of keras.ops
    return is_softmax or getattr(operation, "activation", None) is keras.activations.softmax
