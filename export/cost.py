"""Size and arithmetic of an ONNX graph."""

from __future__ import annotations

import math

import onnx

from export.manifest import Cost


def measure(graph: onnx.ModelProto, nodes_converted: int) -> Cost:
    """Return the cost of an ONNX model for one image.

    Args:
        graph: The model, with a dynamic first axis.
        nodes_converted: Number of its nodes before it was simplified.
    """
    fixed = onnx.ModelProto()
    fixed.CopyFrom(graph)
    for value in (*fixed.graph.input, *fixed.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    del fixed.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(fixed, data_prop=True).graph
    shapes = {tensor.name: list(tensor.dims) for tensor in inferred.initializer}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        shapes[value.name] = [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
    return Cost(
        nodes=len(graph.graph.node),
        nodes_converted=nodes_converted,
        parameters=sum(math.prod(tensor.dims) for tensor in graph.graph.initializer),
        bytes=graph.ByteSize(),
        multiply_adds=sum(_multiply_adds(node, shapes) for node in inferred.node),
    )


def _multiply_adds(node: onnx.NodeProto, shapes: dict[str, list[int]]) -> int:
    """Count the multiply-adds of convolutions and matrix products; all others are negligible."""
    if node.op_type == "Conv":  # weights are [filters, channels of a group, height, width]
        return math.prod(shapes[node.output[0]]) * math.prod(shapes[node.input[1]][1:])
    if node.op_type in ("Gemm", "MatMul"):
        left, result = shapes[node.input[0]], shapes[node.output[0]]
        transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
        return math.prod(result) * (left[0] if transposed else left[-1])
    return 0
