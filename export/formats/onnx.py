"""ONNX: converted by tf2onnx, simplified by onnxslim, run by onnxruntime."""

from __future__ import annotations

import json
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
from export.manifest import Cost
from export.original import INPUT, OUTPUT, describe_input
from export.parity import Predict, Probabilities


def write(model: keras.Model, labels: Sequence[str], path: Path, opset: int) -> Cost:
    """Write an ONNX file with input `image`, output `probabilities` and a dynamic first axis called `batch`.

    Args:
        model: The classifier.
        labels: Names of the classes; they become metadata of the file.
        path: The file to write.
        opset: Operator set.

    Returns:
        The cost of the graph.
    """
    signature = [describe_input(model)]
    function = tf.function(lambda image: {OUTPUT: model(image, training=False)}, input_signature=signature)
    graph, _ = tf2onnx.convert.from_function(function, signature, opset=opset)
    nodes_converted = len(graph.graph.node)
    graph = onnxslim.slim(graph)  # removes the layout changes that tf2onnx leaves around 1x1 feature maps
    for value in (*graph.graph.input, *graph.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    metadata = {
        "labels": json.dumps(list(labels)),
        "input": "RGB pixels of 0 to 255",
        "producer": f"keras {keras.__version__}, tf2onnx {tf2onnx.__version__}",
    }
    onnx.helper.set_model_props(graph, metadata)
    onnx.checker.check_model(graph, full_check=True)
    onnx.save(graph, path)
    return cost.measure(graph, nodes_converted)


def load(path: Path) -> Predict:
    """Return an ONNX file, run by onnxruntime on the CPU, as a function of a batch."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def predict(images: NDArray[np.uint8]) -> Probabilities:
        probabilities: Probabilities = session.run([OUTPUT], {INPUT: images})[0]
        return probabilities

    return predict
