"""A variant in fp16 is proved in half precision, though the CPU of the export computes it in fp32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from export import half


@pytest.fixture
def small_network() -> None:
    """Nothing is trained here."""


def write_graph(path: Path, factor: float) -> onnx.ModelProto:
    """Write a graph in half precision: pixel * factor + 1 - pixel * factor."""
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT16),
        helper.make_node("Mul", ["pixels", "factor"], ["product"]),
        helper.make_node("Add", ["product", "one"], ["sum"]),
        helper.make_node("Sub", ["sum", "product"], ["difference"]),
        helper.make_node("Cast", ["difference"], ["answer"], to=TensorProto.FLOAT),
    ]
    values = {"factor": factor, "one": 1.0}
    graph = helper.make_graph(
        nodes,
        "difference",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", 4])],
        [helper.make_tensor_value_info("answer", TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(np.float16(value), name) for name, value in values.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.save(model, path)
    return model


PIXELS = np.array([[0, 1, 100, 255]], np.uint8)


def test_every_value_is_rounded_to_half_precision(tmp_path: Path) -> None:
    """From 2,048 on the spacing is 2 and more: what was added is gone. The evaluator of onnx says the same."""
    model = write_graph(tmp_path / "half.onnx", 100.0)
    (expected,) = ReferenceEvaluator(model).run(None, {"image": PIXELS})
    np.testing.assert_array_equal(expected, [[1, 1, 0, 0]])
    np.testing.assert_array_equal(half.load(tmp_path / "half.onnx")(PIXELS), expected)
    session = onnxruntime.InferenceSession(tmp_path / "half.onnx", providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, {"image": PIXELS})[0], [[1, 1, 1, 1]])  # and so proves nothing


def test_a_value_above_the_largest_of_half_precision_is_an_error(tmp_path: Path) -> None:
    """Even if the answer would be a number: it names the value."""
    write_graph(tmp_path / "half.onnx", 400.0)
    predict = half.load(tmp_path / "half.onnx")
    predict(np.minimum(PIXELS, 160))
    with pytest.raises(half.RangeError, match="the value 'product' exceeds 65,504"):
        predict(PIXELS)


@pytest.mark.parametrize(("factor", "fits"), [(65504.0, True), (-65504.0, True), (np.inf, False), (np.nan, False)])
def test_the_largest_number_of_half_precision_is_within_it(factor: float, fits: bool, tmp_path: Path) -> None:
    """On either side of zero; what is infinite or no number is not."""
    write_graph(tmp_path / "half.onnx", factor)
    predict = half.load(tmp_path / "half.onnx")
    ones = np.ones((2, 4), np.uint8)
    if fits:
        np.testing.assert_array_equal(predict(ones), np.zeros((2, 4)))
    else:
        with pytest.raises(half.RangeError, match="the value 'product' exceeds"):
            predict(ones)


def test_constants_and_other_types_of_a_graph_are_kept(tmp_path: Path) -> None:
    """A constant in half precision is one wherever it stands; an integer stays an integer."""
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT16),
        helper.make_node("Constant", [], ["factor"], value=numpy_helper.from_array(np.float16(0.5))),
        helper.make_node("Mul", ["pixels", "factor"], ["product"]),
        helper.make_node("Cast", ["product"], ["whole"], to=TensorProto.INT32),
        helper.make_node("Cast", ["whole"], ["answer"], to=TensorProto.FLOAT),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", 4])
    answer = helper.make_tensor_value_info("answer", TensorProto.FLOAT, ["batch", 4])
    graph = helper.make_graph(nodes, "half", [image], [answer])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), tmp_path / "a")
    np.testing.assert_array_equal(half.load(tmp_path / "a")(PIXELS), [[0, 0, 50, 127]])
