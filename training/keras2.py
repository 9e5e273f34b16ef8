"""Model files of tf.keras 2. Keras 3 reads them in part only: what it calls otherwise is translated here."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import h5py
import keras

FUNCTIONS = ("TFOpLambda", "SlicingOpLambda")  # what tf.keras 2 makes of `x + 1`; Keras 3 has nothing like them
RANDOM = tuple(f"Random{kind}" for kind in ("Flip", "Zoom", "Rotation", "Translation", "Contrast", "Brightness"))
# What tf.keras 2 writes of a layer, and Keras 3 does not know: it changes nothing, or follows from the rest.
UNKNOWN = {
    "DepthwiseConv2D": ("groups",),
    "Conv2DTranspose": ("groups",),
    "SeparableConv2D": ("groups", "kernel_initializer", "kernel_regularizer", "kernel_constraint"),
    "SpatialDropout2D": ("trainable", "noise_shape"),
    **dict.fromkeys(RANDOM, ("rng_type",)),
    **dict.fromkeys(("LSTM", "GRU", "SimpleRNN", "ConvLSTM1D", "Bidirectional"), ("time_major",)),
}


def load(file: Path) -> keras.Model | None:
    """Return the model of an .h5 or .keras file of tf.keras 2, computing in float32; None for any other file.

    Raises:
        Exception: The file is broken, or has layers that Keras 3 does not know. Keras raises many types.
    """
    description = _read_description(file)
    if description is None:
        return None
    model = keras.saving.deserialize_keras_object(_translate(description))
    model.load_weights(file)
    return model


def _read_description(file: Path) -> Any:
    """Return the layers of a model as JSON; None unless the file is of tf.keras 2."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            version = json.loads(archive.read("metadata.json"))["keras_version"]
            return json.loads(archive.read("config.json")) if version.startswith("2.") else None
    if not h5py.is_hdf5(file):
        return None
    with h5py.File(file) as store:
        version = store.attrs.get("keras_version", "")
        return json.loads(store.attrs["model_config"]) if version.startswith("2.") else None


def _translate(value: Any) -> Any:
    """Return a part of a description in the words of Keras 3."""
    if isinstance(value, list):
        return [_translate(item) for item in value]
    if not isinstance(value, dict):
        return value
    value = {key: _translate(item) for key, item in value.items() if key != "compile_config"}
    kind, config = value.get("class_name"), value.get("config")
    if kind in FUNCTIONS:
        raise ValueError(f"{value['name']!r} is a {kind}: a function of TensorFlow between the layers")
    if kind == "Policy":
        return "float32"
    if kind in ("Model", "Functional"):
        _renumber(config["layers"])
        value |= {"class_name": "Functional", "module": "keras.src.models.functional"}
    elif kind == "Sequential":
        value["module"] = "keras"
    elif isinstance(config, dict) and "dtype" in config:
        value |= {"config": _translate_layer(str(kind), config), "module": "keras.layers"}
    return value


def _translate_layer(kind: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of a layer in the words of Keras 3."""
    if "hard_sigmoid" in map(_name_function, config.values()):
        raise ValueError(f"{config['name']!r} computes hard_sigmoid, whose slope is another one in Keras 3")
    shape = config.pop("batch_input_shape", None)
    if kind == "InputLayer":
        return config | {"batch_shape": shape}
    if str(config["dtype"]).startswith("mixed_"):
        config["dtype"] = "float32"
    if kind == "BatchNormalization" and isinstance(config["axis"], list):
        (config["axis"],) = config["axis"]
    for key in UNKNOWN.get(kind, ()):
        config.pop(key, None)
    return config


def _name_function(value: Any) -> Any:
    """Return the name of a function that is written as a name or as an object."""
    return value.get("config") if isinstance(value, dict) and value.get("class_name") == "function" else value


def _renumber(layers: list[dict[str, Any]]) -> None:
    """Count the calls of a model inside a model from 0; in tf.keras 2 the first is number 1."""
    models = {layer["name"] for layer in layers if layer["class_name"] in ("Functional", "Sequential")}
    for layer in layers:
        for call in layer["inbound_nodes"]:
            for origin in call:
                if origin[0] in models:
                    origin[1] -= 1
