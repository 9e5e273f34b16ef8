"""Keras to SavedModel and ONNX, and how each of the three is loaded and called."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import keras
import numpy as np
import onnx
import onnxruntime
import onnxslim
import tensorflow as tf
import tf2onnx
from numpy.typing import NDArray

from export import cost
from export.manifest import Cost, Variant
from export.parity import Predict, Probabilities

INPUT, OUTPUT = "image", "probabilities"
NEWEST_OPSET = 18  # that tf2onnx 1.17 converts to
OPSET = 17  # with the newest it leaves a Transpose before global pooling

# It warns that functions are traced again; with several models and batch sizes in one process they have to be.
logging.getLogger("tensorflow").setLevel(logging.ERROR)


def to_saved_model(model: keras.Model, folder: Path) -> None:
    """Write a SavedModel whose signature `serving_default` maps `image` to `probabilities`."""
    archive = keras.export.ExportArchive()
    archive.track(model)
    archive.add_endpoint("serve", lambda image: {OUTPUT: model(image, training=False)}, [_signature(model)])
    archive.write_out(str(folder), verbose=False)


def to_onnx(model: keras.Model, labels: Sequence[str], path: Path, opset: int = OPSET) -> Cost:
    """Write an ONNX file with input `image`, output `probabilities` and a free first axis called `batch`.

    Args:
        model: The classifier.
        labels: Names of its classes; they travel in the metadata of the file.
        path: The file to write.
        opset: Operator set.

    Returns:
        What the graph costs.
    """
    function = tf.function(lambda image: {OUTPUT: model(image, training=False)}, input_signature=[_signature(model)])
    graph, _ = tf2onnx.convert.from_function(function, [_signature(model)], opset=opset)
    converted = len(graph.graph.node)
    graph = onnxslim.slim(graph)  # joins the layout changes that tf2onnx leaves around 1x1 feature maps
    for value in (*graph.graph.input, *graph.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    metadata = {
        "labels": json.dumps(list(labels)),
        "preprocessing": "RGB, bilinear",
        "producer": f"keras {keras.__version__}, tf2onnx {tf2onnx.__version__}",
    }
    onnx.helper.set_model_props(graph, metadata)
    onnx.checker.check_model(graph, full_check=True)
    onnx.save(graph, path)
    return cost.measure(graph, converted)


def load_keras(path: Path) -> Predict:
    """Return the original as a function of a batch."""
    model = keras.models.load_model(path, compile=False)

    def predict(images: NDArray[np.uint8]) -> Probabilities:
        return np.asarray(model.predict_on_batch(images))

    return predict


def load_variant(folder: Path, variant: Variant) -> Predict:
    """Return a converted model of the version in `folder` as a function of a batch."""
    return load_saved_model(folder) if variant.path == "." else load_onnx(folder / variant.path)


def load_saved_model(folder: Path) -> Predict:
    """Return the `serving_default` signature of a SavedModel as a function of a batch."""
    signature = tf.saved_model.load(str(folder)).signatures["serving_default"]

    def predict(images: NDArray[np.uint8]) -> Probabilities:
        result: Probabilities = signature(**{INPUT: tf.constant(images)})[OUTPUT].numpy()
        return result

    return predict


def load_onnx(path: Path) -> Predict:
    """Return an ONNX file, run by onnxruntime on the CPU, as a function of a batch."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def predict(images: NDArray[np.uint8]) -> Probabilities:
        result: Probabilities = session.run([OUTPUT], {INPUT: images})[0]
        return result

    return predict


def _signature(model: keras.Model) -> tf.TensorSpec:
    return tf.TensorSpec(model.input_shape, tf.uint8, name=INPUT)
