"""Half precision as a GPU computes it, on a CPU: the arithmetic with which a variant in fp16 is proved.

The CPU kernels of onnxruntime compute an fp16 graph in fp32 from end to end, so that nothing overflows. Here each value
that is float16 in the graph is rounded to float16. Sums inside an operator are float32, as in the matrix units of GPUs.
"""

from __future__ import annotations

from pathlib import Path
from typing import IO

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.parity import ParityError, Predict, Probabilities

ARITHMETIC = "values rounded to float16, sums in float32"
LIMIT = float(np.finfo(np.float16).max)  # 65,504


class RangeError(ParityError):
    """A value is too large for half precision."""


def load(file: Path | IO[bytes]) -> Predict:
    """Return an ONNX file in half precision, computed as such, as a function of a batch.

    The function raises `RangeError` if a value is too large for float16.
    """
    model = onnx.load(file)
    image, answers = model.graph.input[0].name, model.graph.output[0].name
    largest = _round_values(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    def predict(images: NDArray[np.uint8]) -> Probabilities:
        probabilities: Probabilities
        probabilities, *magnitudes = session.run([answers, *largest.values()], {image: images})
        for name, magnitude in zip(largest, magnitudes, strict=True):
            if not magnitude <= LIMIT:  # NaN is above too
                raise RangeError(f"the value {name!r} exceeds {LIMIT:,.0f}, the largest number of half precision")
        return probabilities

    return predict


def _round_values(model: onnx.ModelProto) -> dict[str, str]:
    """Let a graph in half precision compute in float32, round each value to float16, and output its largest magnitude.

    Returns:
        The names of the added outputs, by the name of the value.
    """
    graph = model.graph
    inferred = onnx.shape_inference.infer_shapes(model).graph
    half = {value.name for value in inferred.value_info if value.type.tensor_type.elem_type == TensorProto.FLOAT16}
    nodes, largest = [], {}
    for node in graph.node:
        nodes.append(node)
        for attribute in node.attribute:
            _widen(attribute.t)
            if attribute.name == "to" and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.FLOAT
        for index, name in enumerate(node.output):
            if name in half:
                node.output[index] = f"{name}/exact"
                largest[name] = f"{name}/largest"
                nodes += [
                    helper.make_node("Cast", [f"{name}/exact"], [f"{name}/half"], to=TensorProto.FLOAT16),
                    helper.make_node("Cast", [f"{name}/half"], [name], to=TensorProto.FLOAT),
                    helper.make_node("Abs", [name], [f"{name}/magnitude"]),
                    helper.make_node("ReduceMax", [f"{name}/magnitude"], [largest[name]], keepdims=0),
                ]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    for tensor in graph.initializer:
        _widen(tensor)
    graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, []) for name in largest.values())
    return largest


def _widen(tensor: onnx.TensorProto) -> None:
    """Make a float16 tensor float32."""
    if tensor.data_type == TensorProto.FLOAT16:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
