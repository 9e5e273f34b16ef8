"""A Keras model as a classifier: from plain pixels, uint8, to probabilities, float32."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from export import keras2, preprocessing
from export.preprocessing import PREPROCESSING
from resnet import BadInput
from training.images import CHANNELS


def load(file: Path) -> keras.Model:
    """Load a model of one input and one output, and let it compute in float32.

    Raises:
        BadInput: The file cannot be read, its weights are not finite, or it holds no such model.
    """
    try:
        model = keras2.load(file) or keras.models.load_model(file, compile=False)
        model = _in_float32(model, file)
    except Exception as error:  # Keras raises many types for unreadable files
        text = str(error).strip() or type(error).__name__
        advice = (
            "; only the built-in layers of Keras can be exported" if "Lambda" in text or "locate class" in text else ""
        )
        # Keras quotes a configuration first, and what is wrong with it last.
        reason = text.rpartition("Exception encountered: ")[2].splitlines()[0]
        raise BadInput(f"{file} is not a Keras model that can be loaded ({reason}){advice}") from None
    try:
        inputs, outputs = model.inputs, model.outputs
    except AttributeError:
        inputs = outputs = None
    if not inputs or not outputs:
        raise BadInput(
            f"{file} has no input of a known shape: it was saved before it was called, or is a class of your own; "
            "save a model that begins with keras.Input"
        )
    if len(inputs) != 1 or len(outputs) != 1:
        raise BadInput(f"{file} has {len(inputs)} inputs and {len(outputs)} outputs; a classifier has one of each")
    for weight in model.weights:
        if not np.all(np.isfinite(weight.numpy())):
            raise BadInput(f"{file} has weights that are not finite, in {weight.path}; train the model again")
    # Built anew, it takes and gives a tensor where it may have taken and given a list or a dict.
    return keras.Model(inputs[0], outputs[0], name=model.name)


def complete(file: Path, model: keras.Model, shape: tuple[int, int, int], preprocess: str | None = None) -> keras.Model:
    """Return a model of plain pixels, uint8, with the channels of the model, whose output is float32.

    Args:
        file: The file of the model, for messages.
        model: From `load`.
        shape: (height, width, channels) of the images.
        preprocess: One of `PREPROCESSING`; None for a model of uint8 pixels.

    Raises:
        BadInput: The model takes other images, or gives something else than a number for each class.
    """
    pixels, output = model.inputs[0], model.outputs[0]
    _check_shapes(file, pixels, output, preprocess)
    takes = tuple(pixels.shape[1:])
    if any(side not in (None, actual) for side, actual in zip(takes, shape, strict=True)):
        raise BadInput(
            f"{file} takes images of shape {list(takes)}, but the held-out images have {list(shape)}; "
            "name another data set with --data"
        )
    if preprocess is None and takes == shape and output.dtype == "float32":
        return model
    image = x = keras.Input(shape, dtype="uint8", name="image")
    if preprocess is not None:
        x = preprocessing.apply(preprocess, keras.ops.cast(x, "float32"))
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


def _check_shapes(file: Path, pixels: Any, output: Any, preprocess: str | None) -> None:
    """Check that a model takes images and gives a vector."""
    if len(pixels.shape) != 4 or pixels.shape[-1] not in CHANNELS.values():
        raise BadInput(
            f"{file} takes {pixels.dtype} {_axes(pixels.shape)}; a classifier of images takes "
            "[batch, height, width, channels] with 1, 3 or 4 channels"
        )
    if preprocess is None and pixels.dtype != "uint8":
        raise BadInput(
            f"{file} takes {pixels.dtype} {_axes(pixels.shape)} instead of uint8 pixels; "
            f"name its preprocessing with --preprocess ({', '.join(PREPROCESSING)})"
        )
    if preprocess is not None and pixels.dtype == "uint8":
        raise BadInput(f"{file} takes uint8 pixels already; leave out --preprocess")
    if preprocess in ("caffe", "torch") and pixels.shape[-1] != 3:
        raise BadInput(
            f"{file} takes images of {pixels.shape[-1]} channels, but --preprocess {preprocess} is for three colours; "
            "name another"
        )
    if len(output.shape) != 2 or output.shape[-1] is None:
        raise BadInput(f"{file} gives {output.dtype} {_axes(output.shape)}; a classifier gives [batch, classes]")


def _in_float32(model: keras.Model, file: Path) -> keras.Model:
    """Return a model that was trained in mixed precision as one that computes in float32, with the same weights."""
    text = model.to_json()
    if "mixed_" not in text:
        return model
    print("the model was trained in mixed precision; the exported model computes in float32")
    full = keras.models.model_from_json(re.sub(r'"mixed_b?float16"', '"float32"', text))
    full.load_weights(file)  # not the values alone: layers such as Normalization compute others of them
    return full


def _axes(shape: tuple[int | None, ...]) -> str:
    return str(["batch", *shape[1:]]).replace("'", "")
