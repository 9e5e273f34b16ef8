"""The ONNX file in int8 of a network that was trained with its rounding: its scales are those that were learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import onnx
import tensorflow as tf
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from export.formats import onnx as onnx_format
from training.quantization import LEVELS, FakeQuantize, rebuild

LARGEST = {8: 127, 7: 64}  # what stands for the largest weight of a channel, by bits; onnxruntime has these too
WEIGHTED = {"Conv": 0, "MatMul": 1, "Gemm": 1}  # operators with weights, and the axis of the output channels in these

# Operators whose output has no other values than their input, and perhaps 0.
TRANSPARENT = ("Flatten", "MaxPool", "Pad", "Reshape", "Squeeze", "Transpose")


def write(network: keras.Model, target: Path, opset: int, largest: int = LARGEST[8]) -> None:
    """Write a network as QDQ graph: uint8 activations with the learned scales, int8 weights with one for each channel.

    Args:
        network: From `training.quantization.quantize`, with input and output of a classifier.
        target: The file to write.
        opset: Operator set.
        largest: The whole number that stands for the largest weight of a channel.
    """
    onnx_format.write(_with_operators(network), {}, target, opset)
    model = onnx.load(target)
    _quantize_weights(model.graph, largest)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, target)


class _FakeQuantizeOperator(keras.layers.Layer):  # type: ignore[misc]  # Keras has no types
    """What a `FakeQuantize` computes, as the one operator of TensorFlow that tf2onnx makes a pair of QDQ of."""

    def __init__(self, layer: FakeQuantize) -> None:
        super().__init__(name=layer.name)
        scale, zero = (float(value) for value in layer.find_grid())
        self._low, self._high = -zero * scale, (LEVELS - zero) * scale

    def call(self, x: Any) -> Any:
        return tf.quantization.fake_quant_with_min_max_args(x, self._low, self._high)


def _with_operators(network: keras.Model) -> keras.Model:
    """Return the same network with `_FakeQuantizeOperator`."""

    def call(step: Any, *args: Any, **kwargs: Any) -> Any:
        return (_FakeQuantizeOperator(step) if isinstance(step, FakeQuantize) else step)(*args, **kwargs)

    return rebuild(network, call)


def _quantize_weights(graph: onnx.GraphProto, largest: int) -> None:
    """Replace the weights of layers whose input is in uint8 by int8, and their biases by int32."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    added: list[onnx.NodeProto] = []

    def replace(node: onnx.NodeProto, index: int, whole: NDArray[Any], scale: NDArray[np.float32], axis: int) -> None:
        name = f"{node.name}/{node.input[index]}"
        parts = {f"{name}/quantized": whole, f"{name}/scale": scale, f"{name}/zero": np.zeros(scale.shape, whole.dtype)}
        graph.initializer.extend(numpy_helper.from_array(value, key) for key, value in parts.items())
        added.append(helper.make_node("DequantizeLinear", list(parts), [f"{name}/float"], name, axis=axis))
        node.input[index] = f"{name}/float"

    for node in graph.node:
        if node.op_type not in WEIGHTED or node.input[1] not in constants:
            continue
        maker = makers.get(node.input[0])
        while maker is not None and maker.op_type in TRANSPARENT:
            maker = makers.get(maker.input[0])
        if maker is None or maker.op_type != "DequantizeLinear":
            continue
        axis = WEIGHTED[node.op_type]
        weights = numpy_helper.to_array(constants[node.input[1]])
        others = tuple(other for other in range(weights.ndim) if other != axis)
        scale = np.maximum(abs(weights).max(axis=others), np.float32(1e-12)) / np.float32(largest)
        whole = np.rint(weights / np.expand_dims(scale, others)).astype(np.int8)
        replace(node, 1, whole, scale, axis)
        if node.op_type == "Conv" and len(node.input) > 2:
            scale = scale * numpy_helper.to_array(constants[maker.input[1]])
            bias = numpy_helper.to_array(constants[node.input[2]])
            replace(node, 2, np.rint(bias / scale).astype(np.int32), scale, 0)
    nodes = [*added, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
