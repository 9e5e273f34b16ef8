"""What an ONNX file may not have: weights elsewhere, operators of its maker, another input or output than declared.

protobuf keeps the fields that `protos/onnx.proto` leaves out, the weights among them: a file of 100 MB takes 50 ms, and
another 100 MB for that time. A reader of our own could skip them, but might take a file for another model than
onnxruntime does, which uses protobuf too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from google.protobuf.message import DecodeError

from export.manifest import TensorSpec
from protos import onnx_pb2

DOMAINS = ("", "ai.onnx")  # two names of the domain of the operators that ONNX defines for all models
DTYPES = {1: "float32", 2: "uint8"}  # those of a version's outputs and inputs
ORT_FORMAT = b"ORTM"  # after four bytes: onnxruntime takes the file for one of its own format, whatever else it is
MAX_NAMES = 3  # in a message


def find_faults(content: bytes, image: TensorSpec, probabilities: TensorSpec) -> Iterator[str]:
    """Yield a clause for each thing that an ONNX file may not have; its subject is the file.

    Args:
        content: The file.
        image: The only input that it may have.
        probabilities: The only output that it may have.
    """
    try:
        model = onnx_pb2.ModelProto.FromString(content)
    except DecodeError as error:
        yield f"is not an ONNX file ({error})"
        return
    if content[4:].startswith(ORT_FORMAT):
        yield "is not an ONNX file (onnxruntime takes it for one of its own format)"
        return
    if model.functions:
        yield f"defines operators: {_join({function.name for function in model.functions})}"
    if model.training_info:
        yield "holds a graph for training"
    operators, tensors = set(), set()
    for graph in _walk(model.graph):
        operators |= {f"{node.domain}.{node.op_type}" for node in graph.node if node.domain not in DOMAINS}
        tensors |= {tensor.name for tensor in _list_tensors(graph) if tensor.external_data or tensor.data_location}
    if operators:
        yield f"has operators that are not of ONNX: {_join(operators)}"
    if tensors:
        yield f"keeps weights in other files: {_join(tensors)}"
    for verb, values, declared in (
        ("takes", model.graph.input, image),
        ("returns", model.graph.output, probabilities),
    ):
        found = [_read_spec(value) for value in values]
        if found != [declared]:
            specs = " and ".join(map(_describe, found)) or "nothing"
            yield f"{verb} {specs}, its manifest says {_describe(declared)}"


def _walk(graph: onnx_pb2.GraphProto) -> Iterator[onnx_pb2.GraphProto]:
    """Yield a graph and those inside its nodes, such as branches and bodies of loops."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from _walk(inner)


def _list_tensors(graph: onnx_pb2.GraphProto) -> Iterator[onnx_pb2.TensorProto]:
    """Yield the constants of a graph and of its nodes, without those of graphs inside."""
    attributes = [attribute for node in graph.node for attribute in node.attribute]
    yield from graph.initializer
    for attribute in attributes:
        yield from (attribute.t, *attribute.tensors)
    inside = [tensor for attribute in attributes for tensor in (attribute.sparse_tensor, *attribute.sparse_tensors)]
    for sparse in (*graph.sparse_initializer, *inside):
        yield from (sparse.values, sparse.indices)


def _read_spec(value: onnx_pb2.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    shape = [axis.dim_value if axis.HasField("dim_value") else -1 for axis in tensor.shape.dim]
    return TensorSpec(value.name, DTYPES.get(tensor.elem_type, f"type {tensor.elem_type}"), shape)


def _describe(spec: TensorSpec) -> str:
    return f"{spec.name!r} ({spec.dtype} {spec.shape})"


def _join(names: Collection[str]) -> str:
    """Return the first of some names, in which a file may have put anything, and how many there are beside."""
    shown = ", ".join(repr(name) for name in sorted(names)[:MAX_NAMES])
    return f"{shown} and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else shown
