"""A network that was trained with its rounding: the int8 file computes what it learned to compute."""

from __future__ import annotations

import shutil
from pathlib import Path

import keras
import numpy as np
import onnx
import pytest
from keras import layers
from numpy.typing import NDArray
from onnx import numpy_helper

from export import export, manifest, precision, quantized, source
from export.formats import ONNX, OPSET
from tests.export.sources import POINT, make_source
from training.quantization import FakeQuantize, QuantizedLayer, quantize, restore

SIDE = 12


def make_images(count: int) -> NDArray[np.uint8]:
    """Return noise."""
    return np.random.default_rng(0).integers(256, size=(count, SIDE, SIDE, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def network() -> keras.Model:
    """A network of all that int8 kernels know, with ranges that some steps of training have moved."""
    keras.utils.set_random_seed(0)
    image = keras.Input((SIDE, SIDE, 3), dtype="uint8", name="image")
    x = layers.Rescaling(1 / 127.5, offset=-1)(image)
    x = layers.BatchNormalization(name="norm")(layers.Conv2D(8, 3, use_bias=False, padding="same", name="conv")(x))
    x = layers.MaxPooling2D(2)(layers.ReLU()(x))
    y = layers.ReLU(6.0)(layers.DepthwiseConv2D(3, padding="same")(x))
    y = layers.Conv2D(8, 1, name="pointwise")(y)
    x = layers.ReLU()(layers.Add()([x, y]))
    x = layers.Conv2D(8, 3, strides=2, padding="same", groups=2, activation="relu")(x)
    x = layers.GlobalAveragePooling2D()(x)
    model = keras.Model(image, layers.Dense(3, activation="softmax", name="probabilities")(x))
    trained = quantize(model, make_images(16))
    trained.compile(keras.optimizers.Adam(1e-2), "sparse_categorical_crossentropy")
    images = make_images(64)
    trained.fit(images, images.mean(axis=(1, 2)).argmax(axis=1), batch_size=16, epochs=2, verbose=0)
    return trained


def test_the_file_answers_as_the_network_that_was_trained(network: keras.Model, tmp_path: Path) -> None:
    """Sums in another order let few values round to their other neighbour; rounding itself changes much more."""
    images = make_images(64)
    expected, exact = (np.asarray(model.predict_on_batch(images)) for model in (network, restore(network)))
    quantized.write(network, tmp_path / "int8.onnx", OPSET)
    answers = ONNX.load(tmp_path / "int8.onnx")(images)
    assert abs(answers - expected).mean() < 0.1 * abs(exact - expected).mean()
    quantized.write(network, tmp_path / "int7.onnx", OPSET, quantized.LARGEST[7])
    difference = abs(ONNX.load(tmp_path / "int7.onnx")(images) - expected).mean()
    assert abs(answers - expected).mean() < difference < 3 * abs(exact - expected).mean()


@pytest.mark.parametrize(("bits", "largest"), [(8, 127), (7, 64)])
def test_the_file_has_the_learned_scales(network: keras.Model, tmp_path: Path, bits: int, largest: int) -> None:
    """Those of activations are those of the network, every layer has int8 weights and an int32 bias."""
    quantized.write(network, tmp_path / "int8.onnx", OPSET, quantized.LARGEST[bits])
    graph = onnx.load(tmp_path / "int8.onnx").graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    learned = [layer.find_grid() for layer in network.layers if isinstance(layer, FakeQuantize)]
    written = [node.input for node in graph.node if node.op_type == "QuantizeLinear"]
    assert sorted((float(constants[scale]), int(constants[zero])) for _, scale, zero in written) == [
        (pytest.approx(scale), zero) for scale, zero in sorted((float(scale), int(zero)) for scale, zero in learned)
    ]
    assert all(constants[zero].dtype == np.uint8 for _, _, zero in written)
    makers = {node.output[0]: node for node in graph.node}
    weighted = [node for node in graph.node if node.op_type in ("Conv", "MatMul")]
    assert len(weighted) == sum(isinstance(layer, QuantizedLayer) for layer in network.layers)
    for node in weighted:
        whole, scale, zero = (constants[name] for name in makers[node.input[1]].input)
        channels = whole.shape[0 if node.op_type == "Conv" else 1]
        assert (whole.dtype, abs(whole).max(), scale.shape, zero.any()) == (np.int8, largest, (channels,), False)
        for bias in node.input[2:]:
            assert constants[makers[bias].input[0]].dtype == np.int32
    # The weights of the folded layer, channel by channel.
    layer = network.get_layer("conv")
    scales = constants[makers[weighted[0].input[1]].input[1]]
    kernel = np.asarray(layer._fold()[0])
    np.testing.assert_allclose(scales, abs(kernel).max(axis=(0, 1, 2)) / largest, rtol=1e-5)


def test_learned_ranges_are_tried_before_others(network: keras.Model) -> None:
    """With 7 bits for CPUs on which products of 8-bit values overflow; calibration is what remains."""
    methods = [row.method for row in precision.list_reductions("int8", make_images(1), network)]
    calibrated = [row.method for row in precision.list_reductions("int8", make_images(1))]
    assert methods == ["learned ranges, 8-bit weights", "learned ranges, 7-bit weights", *calibrated]
    assert len(precision.list_reductions("fp16", None, network)) == 1


def test_a_run_folder_is_exported_with_what_it_learned(network: keras.Model, tmp_path: Path) -> None:
    """The original is the model in float; other formats do not know of the rounding."""
    run, made = tmp_path / "run", make_source(restore(network), calibration=4)
    run.mkdir()
    made.model.save(run / "model.keras")
    network.save(run / "quantized.keras")
    (run / "labels.txt").write_text("".join(f"{label}\n" for label in made.evidence.labels))
    np.savez(run / "heldout.npz", images=made.evidence.images, labels=made.evidence.targets)
    np.savez(run / "calibration.npz", images=made.evidence.calibration)
    loaded = source.load(run)
    assert loaded.quantized is not None
    version = export.export(loaded, tmp_path / "models" / "mine", ["int8"], POINT)
    exact, _, reduced = manifest.read(Path(version)).certificate.variants
    assert (exact.rows[0].max_difference < 1e-5, reduced.method) == (True, "learned ranges, 8-bit weights")
    shutil.copy(run / "model.keras", run / "other.keras")
    assert source.load(run / "other.keras").quantized is None
