"""ONNX: converted by tf2onnx, simplified by onnxslim, run by onnxruntime."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

import keras
import numpy as np
import onnx
import onnxruntime
import onnxslim
import tensorflow as tf
import tf2onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from export import cost
from export.formats import operators  # noqa: F401  # tf2onnx finds them once they are imported
from export.manifest import Cost
from export.original import INPUT, OUTPUT, describe_input
from export.parity import Predict, Probabilities
from resnet import BadInput

logging.getLogger("tf2onnx").setLevel(logging.CRITICAL)  # `write` names what cannot be converted


def write(model: keras.Model, metadata: Mapping[str, str], path: Path, opset: int) -> Cost:
    """Write an ONNX file with input `image`, output `probabilities` and a dynamic first axis called `batch`.

    Args:
        model: The classifier.
        metadata: What the file says of itself, in its `metadata_props`.
        path: The file to write.
        opset: Operator set.

    Returns:
        The cost of the graph.

    Raises:
        BadInput: A layer uses an operator that ONNX does not have.
    """
    graph = _convert(model, opset)
    nodes_converted = len(graph.graph.node)
    graph = onnxslim.slim(graph)  # removes the layout changes that tf2onnx leaves around 1x1 feature maps
    for value in (*graph.graph.input, *graph.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    producer = f"keras {keras.__version__}, tf2onnx {tf2onnx.__version__}"
    onnx.helper.set_model_props(graph, {**metadata, "producer": producer})
    onnx.checker.check_model(graph, full_check=True)
    onnx.save(graph, path)
    return cost.measure(graph, nodes_converted)


def _convert(model: keras.Model, opset: int) -> onnx.ModelProto:
    signature = [describe_input(model)]
    function = tf.function(lambda image: {OUTPUT: model(image, training=False)}, input_signature=signature)
    eager = tf.config.functions_run_eagerly()
    # Keras wraps a convolution in groups in a function of its own, which XLA must compile: trace what is in it.
    tf.config.run_functions_eagerly(True)
    try:
        concrete = function.get_concrete_function()
    finally:
        tf.config.run_functions_eagerly(eager)
    converted: onnx.ModelProto
    converted, _ = tf2onnx.convert.from_function(function, signature, opset=opset)
    graph = converted.graph
    # tf2onnx makes an input of each constant tensor of a layer, such as the mean of a Normalization.
    constants = {inner.name: outer for outer, inner in concrete.graph.captures if outer.dtype != tf.resource}
    graph.initializer.extend(numpy_helper.from_array(value.numpy(), name) for name, value in constants.items())
    for value in [value for value in graph.input if value.name in constants]:
        graph.input.remove(value)
    for node in graph.node:
        if not onnx.defs.has(node.op_type, opset, node.domain):
            raise BadInput(
                f"the layer {_find_layer(model, node.name)!r} cannot be converted: ONNX has no operator like "
                f"TensorFlow's {node.op_type}; replace the layer, or move it out of the model"
            )
    return converted


def _find_layer(model: keras.Model, path: str) -> str:
    """Return the name of the layer that an operator belongs to; its path consists of names of scopes."""
    names = {layer.name for layer in model._flatten_layers()}
    scopes = [name for part in reversed(path.split("/")) for name in (part, re.sub(r"_\d+$", "", part))]
    return next((name for name in scopes if name in names), path)


def load(path: Path) -> Predict:
    """Return an ONNX file, run by onnxruntime on the CPU, as a function of a batch."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def predict(images: NDArray[np.uint8]) -> Probabilities:
        probabilities: Probabilities = session.run([OUTPUT], {INPUT: images})[0]
        return probabilities

    return predict
