"""Files with Keras classifiers: how they are found, loaded and checked."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import keras
import numpy as np

from resnet import BadInput
from training import keras2
from training.images import CHANNELS
from training.preprocessing import PREPROCESSING


def find(path: Path) -> Path:
    """Return the file of a model: that of a run folder, or the file that was named.

    Raises:
        BadInput: There is none, or it is empty.
    """
    if not path.exists():
        raise BadInput(f"{path} does not exist; it should be a run folder of `resnet train` or a .keras file")
    file = path / "model.keras" if path.is_dir() else path
    if (path / "saved_model.pb").exists():
        if file.exists():
            raise BadInput(f"{path} is a version that `resnet export` wrote; name the model in it, {file}")
        raise BadInput(f"{path} is a SavedModel, which has no layers; save the model with model.save('NAME.keras')")
    if not file.is_file():
        raise BadInput(f"{path} holds no model.keras; finish its training with `resnet train ... --resume`")
    if not file.stat().st_size:
        raise BadInput(f"{file} is empty; save the model again")
    return file


def load(file: Path) -> keras.Model:
    """Load a model of one input and one output, and let it compute in float32.

    Raises:
        BadInput: The file cannot be read, its weights are not finite, or it holds no such model.
    """
    if file.suffix == ".keras" and not zipfile.is_zipfile(file):
        raise BadInput(f"{file} is not a .keras file, or a damaged one; save or copy it again")
    try:
        model = keras2.load(file) or keras.models.load_model(file, compile=False)
        model = _in_float32(model, file)
    except Exception as error:  # Keras raises many types for unreadable files
        text = str(error).strip() or type(error).__name__
        advice = "; only the built-in layers of Keras can be used" if "Lambda" in text or "locate class" in text else ""
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


def check_shapes(file: Path, model: keras.Model, preprocess: str | None) -> None:
    """Check that a model takes images and gives a vector.

    Args:
        file: The file of the model, for messages.
        model: From `load`.
        preprocess: One of `PREPROCESSING`; None for a model of uint8 pixels.

    Raises:
        BadInput: It does not, or not without, or with, this preprocessing.
    """
    pixels, output = model.inputs[0], model.outputs[0]
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
    print(f"{file} was trained in mixed precision; its model is loaded in float32")
    full = keras.models.model_from_json(re.sub(r'"mixed_b?float16"', '"float32"', text))
    full.load_weights(file)  # not the values alone: layers such as Normalization compute others of them
    return full


def _axes(shape: tuple[Any, ...]) -> str:
    return str(["batch", *shape[1:]]).replace("'", "")
