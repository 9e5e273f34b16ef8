"""The reductions of precision: whatever number of images there is to calibrate with, and whatever they do to others."""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
import onnx
import pytest

from export import half, manifest, precision
from export.export import export
from export.formats import ONNX, OPSET
from export.parity import VariantError
from export.precision import QUANTIZATIONS, Quantization, Reduction
from tests.export.sources import classifier, make_source


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph with two convolutions and a dense layer."""
    path = tmp_path_factory.mktemp("fp32")
    layers = [keras.layers.Conv2D(4, 3, activation="relu"), keras.layers.Conv2D(4, 3, activation="relu")]
    ONNX.write(classifier(*layers), ["a", "b", "c"], path, OPSET)
    return path / ONNX.path


@pytest.mark.parametrize("quantization", QUANTIZATIONS, ids=str)
@pytest.mark.parametrize("count", [1, precision.CALIBRATION_BATCH + 3])
def test_any_number_of_images_calibrates(fp32: Path, tmp_path: Path, quantization: Quantization, count: int) -> None:
    """Also one that leaves a short last batch. Weights are 8-bit, except those of the layers that the method names."""
    images = np.random.default_rng(0).integers(256, size=(count, 12, 12, 3), dtype=np.uint8)
    precision.to_int8(fp32, tmp_path / "int8.onnx", images, quantization)
    graph = onnx.load(tmp_path / "int8.onnx").graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    dequantized = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    weights = [node.input[1] for node in graph.node if node.op_type in ("Conv", "MatMul", "Gemm")]
    first, middle, last = (types[dequantized.get(name, name)] for name in weights)
    outer = onnx.TensorProto.FLOAT if quantization.outer_fp32 else onnx.TensorProto.INT8
    assert (first, middle, last) == (outer, onnx.TensorProto.INT8, outer)


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
        export(make_source(classifier(), calibration=9), tmp_path / "models" / "mine", ["int8", "fp16"])
    certificate = manifest.read(tmp_path / "models" / "mine" / "1").certificate
    assert [variant.name for variant in certificate.variants] == ["onnx", "saved_model", "onnx-fp16"]


def test_the_next_reduction_is_tried_after_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after one that loses too much."""
    copy = Reduction("copy", lambda source, target: target.write_bytes(source.read_bytes()))
    monkeypatch.setattr(precision, "list_reductions", lambda *_: [Reduction("crash", crash), copy])
    version = export(make_source(classifier(), calibration=9), tmp_path / "models" / "mine", ["int8"])
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
        export(make_source(difference()), tmp_path / "models" / "wide", ["fp16"])
    version = tmp_path / "models" / "wide" / "1"
    assert [variant.name for variant in manifest.read(version).certificate.variants] == ["onnx", "saved_model"]
    assert not (version / "model.fp16.onnx").exists()


def test_the_certificate_names_the_arithmetic(tmp_path: Path) -> None:
    """Of the variant in half precision: the others are computed by the library that serves them."""
    version = export(make_source(classifier()), tmp_path / "models" / "narrow", ["fp16"])
    variants = manifest.read(version).certificate.variants
    assert [variant.arithmetic for variant in variants] == ["", "", half.ARITHMETIC]
    assert 0 < variants[2].rows[0].max_difference < 0.01
