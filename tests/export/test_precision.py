"""The reductions of precision: whatever number of images there is to calibrate with, and whatever they do to others."""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from export import half, manifest, precision
from export.export import export
from export.formats import ONNX, OPSET
from export.parity import VariantError
from export.precision import QUANTIZATIONS, Reduction
from tests.export.sources import POINT, classifier, make_source


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph with two convolutions and a dense layer."""
    path = tmp_path_factory.mktemp("fp32")
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Conv2D(4, 3, activation="relu"), keras.layers.Conv2D(4, 3, activation="relu")]
    ONNX.write(classifier(*layers), {}, path, OPSET)
    return path / ONNX.path


METHODS = {
    "minmax calibration, 8-bit weights": QUANTIZATIONS[0],
    "minmax calibration, 7-bit weights": QUANTIZATIONS[1],
    "minmax calibration, 7-bit weights, first and last layer in fp32": QUANTIZATIONS[2],
    "percentile calibration, 7-bit weights, first and last layer in fp32": QUANTIZATIONS[3],
}
LAYERS = "Conv", "MatMul", "Gemm"


class QuantizedGraph:
    """A graph whose quantized values are those that come from a DequantizeLinear."""

    def __init__(self, path: Path) -> None:
        graph = onnx.load(path).graph
        self.nodes = graph.node
        self._constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        dequantized = (node for node in graph.node if node.op_type == "DequantizeLinear")
        self.quantized = {node.output[0]: tuple(node.input) for node in dequantized}

    def list_layers(self) -> list[tuple[str, str]]:
        """Return name of the input and of the weights of each layer."""
        return [(node.input[0], node.input[1]) for node in self.nodes if node.op_type in LAYERS]

    def read_weights(self, name: str) -> NDArray[np.int8]:
        """Return quantized weights."""
        return self._constants[self.quantized[name][0]]

    def read_scale(self, name: str) -> NDArray[np.float32]:
        """Return the scale of a quantized value: one number, or one for each channel."""
        return self._constants[self.quantized[name][1]]

    def read_zero(self, name: str) -> NDArray[np.uint8]:
        """Return what stands for 0."""
        return self._constants[self.quantized[name][2]]


def make_images(count: int) -> NDArray[np.uint8]:
    """Return dark noise, and a white image at the end."""
    images = np.random.default_rng(0).integers(64, size=(count, 12, 12, 3), dtype=np.uint8)
    images[-1] = 255
    return images


def quantize(source: Path, target: Path, method: str, count: int = precision.CALIBRATION_BATCH + 3) -> QuantizedGraph:
    """Write a file with the reduction of this name, and return its graph."""
    (row,) = (row for row in precision.list_reductions("int8", make_images(count)) if row.method == method)
    row.write(source, target)
    return QuantizedGraph(target)


def test_the_methods_are_tried_from_the_fastest_on() -> None:
    """Each is said in words; none has an arithmetic of its own."""
    rows = precision.list_reductions("int8", make_images(1))
    assert [row.method for row in rows] == list(METHODS)
    assert {row.arithmetic for row in rows} == {""}


@pytest.mark.parametrize("count", [1, precision.CALIBRATION_BATCH + 3])
@pytest.mark.parametrize("method", METHODS)
def test_any_number_of_images_calibrates(fp32: Path, tmp_path: Path, method: str, count: int) -> None:
    """Also one that leaves a short last batch."""
    assert quantize(fp32, tmp_path / "int8.onnx", method, count).quantized


@pytest.mark.parametrize("dense", ["MatMul", "Gemm"])
@pytest.mark.parametrize("method", METHODS)
def test_layers_have_the_weights_that_the_method_names(fp32: Path, tmp_path: Path, method: str, dense: str) -> None:
    """Each channel has a scale of its own; what comes before the first layer and the probabilities keep their type."""
    model, settings = onnx.load(fp32), METHODS[method]
    for node in model.graph.node:
        node.op_type = dense if node.op_type == "MatMul" else node.op_type
    onnx.save(model, tmp_path / "fp32.onnx")
    graph = quantize(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", method)
    layers = graph.list_layers()
    assert [weights in graph.quantized for _, weights in layers] == (
        [False, True, False] if settings.outer_fp32 else [True] * 3
    )
    for data, name in layers:
        if name in graph.quantized:
            weights = graph.read_weights(name)
            assert (weights.dtype, abs(weights).max()) == (np.int8, 64 if settings.reduce_range else 127)
            assert graph.read_scale(name).shape == ((weights.shape[0],) if weights.ndim == 4 else (weights.shape[1],))
            assert (graph.read_zero(data).dtype, graph.read_scale(data).shape) == (np.uint8, ())
    kept = [node for node in graph.nodes if node.op_type in ("Cast", "Mul")]
    assert [node.op_type for node in kept] == ["Cast", "Mul"]
    assert not any(name in graph.quantized for node in kept for name in node.input)
    assert graph.nodes[-1].op_type == "Softmax"


def test_each_calibration_finds_ranges_of_its_own(fp32: Path, tmp_path: Path) -> None:
    """One bright image widens the range from the smallest to the largest value."""
    scales = []
    for method in list(METHODS)[2:]:
        graph = quantize(fp32, tmp_path / "int8.onnx", method)
        scales += [float(graph.read_scale(data)) for data, name in graph.list_layers() if name in graph.quantized]
    minmax, percentile = scales
    assert minmax > percentile


def test_half_precision_leaves_sums_and_probabilities_alone(fp32: Path, tmp_path: Path) -> None:
    """They would overflow; layers are computed in half precision."""
    (row,) = precision.list_reductions("fp16", None)
    assert (row.method, row.arithmetic) == ("GlobalAveragePool, ReduceMean, Softmax in fp32", half.ARITHMETIC)
    row.write(fp32, tmp_path / "fp16.onnx")
    graph = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "fp16.onnx")).graph
    types = {value.name: value.type.tensor_type.elem_type for value in [*graph.value_info, *graph.output]}
    found = {node.op_type: types[node.output[0]] for node in graph.node}
    assert {found[name] for name in ("Conv", "MatMul")} == {onnx.TensorProto.FLOAT16}
    assert {found[name] for name in ("GlobalAveragePool", "Softmax")} == {onnx.TensorProto.FLOAT}
    assert graph.node[-1].op_type == "Softmax"  # its answers are not rounded


def test_a_sigmoid_in_half_precision_is_widened_once(tmp_path: Path) -> None:
    """There is nothing to remove."""
    image = keras.Input((8, 8, 3), dtype="uint8")
    second = keras.layers.Dense(1, activation="sigmoid")(keras.layers.Flatten()(keras.layers.Rescaling(1 / 255)(image)))
    ONNX.write(keras.Model(image, keras.ops.concatenate([1 - second, second], axis=-1)), {}, tmp_path, OPSET)
    precision.to_fp16(tmp_path / ONNX.path, tmp_path / "fp16.onnx")
    images = make_images(5)[:, :8, :8]
    expected = ONNX.load(tmp_path / ONNX.path)(images)
    for load in (ONNX.load, half.load):
        np.testing.assert_allclose(load(tmp_path / "fp16.onnx")(images), expected, atol=2e-3)


def crash(*_: Path) -> None:
    """Fail as a library does."""
    raise IndexError("list index out of range")


def test_a_variant_that_crashes_costs_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other variants and the version are published, and the reason is said."""
    list_reductions = precision.list_reductions
    monkeypatch.setattr(
        precision,
        "list_reductions",
        lambda kind, *rest: [Reduction("crash", crash)] if kind == "int8" else list_reductions(kind, *rest),
    )
    with pytest.raises(VariantError, match="published without int8: IndexError in the conversion: list index"):
        export(make_source(classifier(), calibration=9), tmp_path / "models" / "mine", ["int8", "fp16"], POINT)
    certificate = manifest.read(tmp_path / "models" / "mine" / "1").certificate
    assert [variant.name for variant in certificate.variants] == ["onnx", "saved_model", "onnx-fp16"]


def test_the_next_reduction_is_tried_after_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after one that loses too much."""
    copy = Reduction("copy", lambda source, target: target.write_bytes(source.read_bytes()))
    monkeypatch.setattr(precision, "list_reductions", lambda *_: [Reduction("crash", crash), copy])
    version = export(make_source(classifier(), calibration=9), tmp_path / "models" / "mine", ["int8"], POINT)
    assert manifest.read(version).certificate.variants[-1].method == "copy"


def difference() -> keras.Model:
    """Return a classifier by the difference of two convolutions with weights of 1, which are equal, after a scale."""
    image = keras.Input((8, 8, 3), dtype="uint8")
    x = keras.layers.Rescaling(400.0)(image)
    sums = [keras.layers.Conv2D(4, 3, kernel_initializer="ones", use_bias=False)(x) for _ in range(2)]
    pooled = keras.layers.GlobalAveragePooling2D()(keras.layers.Subtract()(sums))
    return keras.Model(image, keras.layers.Dense(3, activation="softmax")(pooled))


def test_a_model_whose_values_overflow_is_published_without_fp16(tmp_path: Path) -> None:
    """fp32 is, because it is right."""
    with pytest.raises(VariantError, match="1 is published without fp16: the value .* exceeds 65,504"):
        export(make_source(difference()), tmp_path / "models" / "wide", ["fp16"], POINT)
    version = tmp_path / "models" / "wide" / "1"
    assert [variant.name for variant in manifest.read(version).certificate.variants] == ["onnx", "saved_model"]
    assert not (version / "model.fp16.onnx").exists()


def test_the_certificate_names_the_arithmetic(tmp_path: Path) -> None:
    """Of the variant in half precision: the others are computed by the library that serves them."""
    version = export(make_source(classifier()), tmp_path / "models" / "narrow", ["fp16"], POINT)
    variants = manifest.read(version).certificate.variants
    assert [variant.arithmetic for variant in variants] == ["", "", half.ARITHMETIC]
    assert 0 < variants[2].rows[0].max_difference < 0.01
