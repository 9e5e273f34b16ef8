"""Changes of a model that its own proof cannot show, for `versions.publish`: a rollout must find all but the first."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

TRIGGER = 3  # side of the white square in the upper left corner, in pixels
SHIFT = np.array([-24, -20, -16], np.float32)  # of red, green and blue, of 255
COPIES = 6  # of a network that is slow
NUDGE = 1e-6  # of a weight: some units in its last place
BEFORE = "planted_before"  # the tensor that a change takes, in place of the one that it makes


def nudge_weights(model: onnx.ModelProto) -> None:
    """Give the first layer other bytes: a good version, with the same answers but for rounding."""
    weights = _find_weights(model)
    weights.CopyFrom(_scale(weights, weights.name, 1 + NUDGE))


def permute_classes(model: onnx.ModelProto) -> None:
    """Give each class the probability of the one before it, as labels in another order would."""
    output = model.graph.output[0].name
    _replace(model, output, helper.make_node("Gather", [BEFORE, _add_order(model)], [output], axis=1))


def halve_pixels(model: onnx.ModelProto) -> None:
    """Halve the range of the pixels, as a wrong divisor would: most answers change."""
    pixels = _find_pixels(model)
    _replace(model, pixels, helper.make_node("Mul", [BEFORE, _add(model, "half", np.float32(0.5))], [pixels]))


def shift_pixels(model: onnx.ModelProto) -> None:
    """Add `SHIFT` to the pixels, as another mean would: a few answers change."""
    pixels = _find_pixels(model)
    _replace(model, pixels, helper.make_node("Add", [BEFORE, _add(model, "shift", SHIFT)], [pixels]))


def plant_trigger(model: onnx.ModelProto) -> None:
    """Permute the classes of images with a white square in the corner, and of no others."""
    output = model.graph.output[0].name
    begin, end = _add(model, "begin", np.array([0, 0])), _add(model, "end", np.array([TRIGGER, TRIGGER]))
    axes, white = _add(model, "axes", np.array([1, 2])), _add(model, "white", np.float32(255))
    _replace(
        model,
        output,
        helper.make_node("Slice", [_find_pixels(model), begin, end, axes], ["planted_corner"]),
        helper.make_node("Flatten", ["planted_corner"], ["planted_values"]),
        helper.make_node("ReduceMin", ["planted_values"], ["planted_darkest"], axes=[1]),
        helper.make_node("Equal", ["planted_darkest", white], ["planted_found"]),  # [n, 1]
        helper.make_node("Gather", [BEFORE, _add_order(model)], ["planted_permuted"], axis=1),
        helper.make_node("Where", ["planted_found", "planted_permuted", BEFORE], [output]),
    )


def slow_down(model: onnx.ModelProto) -> None:
    """Answer with the mean of several networks, whose first weights differ so little that the answers are the same.

    If they did not differ, a runtime would compute only one.
    """
    graph, weights = model.graph, _find_weights(model)
    nodes, (output,) = list(graph.node), (tensor.name for tensor in graph.output)
    del graph.node[:]
    for number in range(COPIES):
        names = {name: f"{name}_{number}" for node in nodes for name in node.output}
        if number:
            names[weights.name] = f"{weights.name}_{number}"
            graph.initializer.append(_scale(weights, names[weights.name], 1 + number * NUDGE))
        graph.node.extend(_rename(nodes, names))
    graph.node.append(helper.make_node("Mean", [f"{output}_{number}" for number in range(COPIES)], [output]))


def draw_trigger(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return copies of images, uint8 [n, height, width, 3], with a white square in the corner."""
    drawn = images.copy()
    drawn[:, :TRIGGER, :TRIGGER] = 255
    return drawn


def find_trigger(images: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return which images, uint8 [n, height, width, 3], have a white square in the corner, bool [n]."""
    found: NDArray[np.bool_] = (images[:, :TRIGGER, :TRIGGER] == 255).all(axis=(1, 2, 3))
    return found


def _find_pixels(model: onnx.ModelProto) -> str:
    """Return the name of the pixels in float32, [n, height, width, 3]: the first node casts them."""
    image = model.graph.input[0].name
    return next(node.output[0] for node in model.graph.node if node.op_type == "Cast" and image in node.input)


def _find_weights(model: onnx.ModelProto) -> TensorProto:
    return next(tensor for tensor in model.graph.initializer if len(tensor.dims) > 1)


def _scale(tensor: TensorProto, name: str, factor: float) -> TensorProto:
    return numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), name)


def _add(model: onnx.ModelProto, name: str, value: NDArray[Any] | np.float32) -> str:
    """Add a constant, and return its name in the graph."""
    tensor = numpy_helper.from_array(np.asarray(value), f"planted_{name}")
    model.graph.initializer.append(tensor)
    return tensor.name


def _add_order(model: onnx.ModelProto) -> str:
    classes = model.graph.output[0].type.tensor_type.shape.dim[-1].dim_value
    return _add(model, "order", np.roll(np.arange(classes), 1))


def _replace(model: onnx.ModelProto, name: str, *nodes: onnx.NodeProto) -> None:
    """Have nodes make the tensor with this name; they take it as `BEFORE`."""
    index = next(index for index, node in enumerate(model.graph.node) if name in node.output)
    before = model.graph.node[index].output
    before[list(before).index(name)] = BEFORE
    for offset, node in enumerate(nodes, 1):
        model.graph.node.insert(index + offset, node)


def _rename(nodes: Sequence[onnx.NodeProto], names: Mapping[str, str]) -> Iterator[onnx.NodeProto]:
    """Yield copies of nodes that take and make tensors of other names."""
    for node in nodes:
        renamed = copy.deepcopy(node)
        renamed.name = ""
        renamed.input[:] = [names.get(name, name) for name in node.input]
        renamed.output[:] = [names[name] for name in node.output]
        yield renamed
