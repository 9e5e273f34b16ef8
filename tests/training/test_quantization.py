"""Training in the arithmetic of int8: what is rounded, how, and what a run folder has of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from numpy.typing import NDArray

from resnet import cli
from training.quantization import FakeQuantize, QuantizedLayer, quantize, restore
from training.recipes import RECIPES
from training.run_folder import RunFolder
from training.train import TrainingSettings, train

SIDE = 8


def make_images(count: int = 4) -> NDArray[np.uint8]:
    """Return noise."""
    return np.random.default_rng(0).integers(256, size=(count, SIDE, SIDE, 3), dtype=np.uint8)


def make_network(build: Callable[[Any], Any]) -> keras.Model:
    """Return a classifier around some layers, with weights and statistics of normalization that differ by channel."""
    keras.utils.set_random_seed(0)
    image = keras.Input((SIDE, SIDE, 3), dtype="uint8", name="image")
    x = build(layers.Rescaling(1 / 255, name="rescale")(image))
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    model = keras.Model(image, layers.Dense(3, activation="softmax", name="probabilities")(x))
    rng = np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.set_weights([rng.uniform(0.5, 2, weight.shape) for weight in layer.get_weights()])
    return model


def list_rounded(network: keras.Model) -> set[str]:
    """Return the names of the layers whose outputs are rounded."""
    return {layer.name.removesuffix("_uint8") for layer in network.layers if isinstance(layer, FakeQuantize)}


def list_folded(network: keras.Model) -> dict[str, bool]:
    """Return whether a normalization is folded into each layer with int8 weights."""
    quantized = (layer for layer in network.layers if isinstance(layer, QuantizedLayer))
    return {layer.name: layer.norm is not None for layer in quantized}


def residual(x: Any) -> Any:
    """Append a block: what is normalized and added has a range of its own before it is cut off."""
    x = layers.ReLU(name="relu1")(layers.Conv2D(4, 3, padding="same", name="conv1")(x))
    y = layers.BatchNormalization(name="norm")(layers.Conv2D(4, 3, padding="same", use_bias=False, name="conv2")(x))
    return layers.ReLU(name="relu2")(layers.Add(name="add")([x, y]))


def separable(x: Any) -> Any:
    """Append what MobileNet consists of: the padding before a depthwise convolution has no range of its own."""
    x = layers.Conv2D(6, 1, name="expand")(x)
    x = layers.ReLU(6.0, name="relu6")(x)
    x = layers.ZeroPadding2D(1, name="zeros")(x)
    x = layers.DepthwiseConv2D(3, strides=2, depth_multiplier=2, use_bias=False, name="depthwise")(x)
    x = layers.BatchNormalization(name="norm")(x)
    return layers.Activation("relu6", name="cut")(x)


def swish(x: Any) -> Any:
    """Append a gate that has no int8 kernel: its sigmoid stays in float, what a convolution reads does not."""
    x = layers.Conv2D(4, 3, name="conv1")(x)
    gated = layers.Multiply(name="gate")([x, layers.Activation("sigmoid", name="sigmoid")(x)])
    return layers.Conv2D(4, 3, activation="relu", name="conv2")(gated)


def preactivated(x: Any) -> Any:
    """Append a normalization that no convolution comes right before, and one whose convolution others read too."""
    x = layers.Activation("relu", name="relu1")(layers.BatchNormalization(name="norm1")(x))
    x = layers.Conv2D(4, 3, name="conv")(x)
    return layers.Add(name="add")([x, layers.BatchNormalization(name="norm2")(x)])


def shared(x: Any) -> Any:
    """Append one layer twice."""
    twice = layers.Conv2D(3, 3, padding="same", name="conv")
    return twice(layers.ReLU(name="relu")(twice(x)))


def test_a_network_of_one_layer_is_quantized() -> None:
    """One range is as good as several."""
    image = keras.Input((SIDE, SIDE, 3), dtype="uint8", name="image")
    x = layers.Rescaling(1 / 255, name="rescale")(image)
    model = keras.Model(image, layers.Dense(3, "softmax", name="probabilities")(layers.Flatten(name="flat")(x)))
    network = quantize(model, make_images())
    assert list_rounded(network) == {"rescale"}
    np.testing.assert_allclose(network(make_images()), model(make_images()), atol=0.02)


@pytest.mark.parametrize(
    ("build", "rounded", "folded"),
    [
        (residual, {"rescale", "relu1", "norm", "relu2", "pool"}, {"conv1": False, "conv2": True}),
        (separable, {"rescale", "relu6", "cut", "pool"}, {"expand": False, "depthwise": True}),
        (swish, {"rescale", "conv1", "gate", "conv2", "pool"}, {"conv1": False, "conv2": False}),
        (shared, {"rescale", "conv", "relu", "pool"}, {"conv": False}),
        (preactivated, {"relu1", "conv", "norm2", "add", "pool"}, {"conv": False}),
    ],
)
def test_what_int8_kernels_read_and_write_is_rounded(
    build: Callable[[Any], Any], rounded: set[str], folded: dict[str, bool]
) -> None:
    """Nothing inside a kernel is, nor what comes before and after all kernels; and little changes by it."""
    model = make_network(build)
    images = make_images()
    expected = model(images)
    network = quantize(model, images)
    assert list_rounded(network) == rounded
    assert list_folded(network) == folded | {"probabilities": False}
    np.testing.assert_allclose(network(images), expected, atol=0.02)
    assert np.any(network(images) != expected)
    np.testing.assert_array_equal(restore(network)(images), expected)


@pytest.mark.parametrize(
    "layer",
    [
        layers.Conv2D(5, 3, strides=2, padding="same"),
        layers.Conv2D(6, 3, groups=3, dilation_rate=2, use_bias=False),
        layers.DepthwiseConv2D(3, depth_multiplier=2),
        layers.Dense(5),
    ],
)
def test_weights_have_255_values_and_a_scale_for_each_channel(layer: layers.Layer) -> None:
    """After normalization is folded into them: the layer computes what it and its normalization do with these."""
    x = np.random.default_rng(0).normal(size=(2, 7, 7, 3)).astype(np.float32)
    norm = layers.BatchNormalization()
    norm(layer(x))
    rng = np.random.default_rng(1)
    norm.set_weights([rng.uniform(0.5, 2, weight.shape) for weight in norm.get_weights()])
    quantized = QuantizedLayer(layer, norm)
    actual = np.asarray(quantized(x))
    gamma, beta, mean, variance = norm.get_weights()
    factor = gamma / np.sqrt(variance + norm.epsilon)
    kernel, *bias = layer.get_weights()
    flat = (kernel.reshape(-1, len(gamma)) if kernel.shape[-1] == len(gamma) else kernel.reshape(9, -1)) * factor
    scale = abs(flat).max(axis=0) / 127
    whole = np.rint(flat / scale)
    assert abs(whole).max(axis=0).tolist() == [127] * len(gamma)
    layer.set_weights([(whole * scale).reshape(kernel.shape), *(0 * each for each in bias)])
    shift = ((bias[0] if bias else 0) - mean) * factor + beta
    np.testing.assert_allclose(actual, np.asarray(layer(x)) + shift, rtol=1e-4, atol=1e-4)


def test_gradients_pass_what_is_rounded_and_move_the_ends_of_the_range() -> None:
    """Inside the range a value has all of the gradient; outside, its end of the range has."""
    layer = FakeQuantize(-1.0, 1.55)
    x = tf.constant([-2.0, -0.503, 0.0, 0.777, 5.0, 6.0])
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x)
        total = tf.reduce_sum(y)
    scale = 0.01
    np.testing.assert_allclose(y, [-1.0, -0.5, 0.0, 0.78, 1.55, 1.55], atol=scale / 100)
    gradient, low, high = tape.gradient(total, [x, layer.low, layer.high])
    np.testing.assert_allclose(gradient, [0, 1, 1, 1, 0, 0], atol=1e-5)
    # A step that is longer by d has also moved the values inside by the error of their rounding, in steps.
    error = (0.003 + 0.003) / scale / 255
    assert (float(low), float(high)) == (pytest.approx(1 - error, abs=1e-3), pytest.approx(2 + error, abs=1e-3))


def test_a_range_holds_zero_and_that_of_a_relu_begins_there() -> None:
    """So that padding is exact, and no value of a uint8 is wasted; a tensor of zeros has a scale too."""
    for layer, zero in ((FakeQuantize(0.0, 2.55), 0), (FakeQuantize(0.5, 2.55), 0), (FakeQuantize(0.0, 0.0), 0)):
        assert np.asarray(layer(np.zeros(1, np.float32))) == [0]
        assert float(layer.find_grid()[1]) == zero
        assert [weight.name for weight in layer.trainable_weights] == ["high"]
    assert len(FakeQuantize(-1.0, 1.0).trainable_weights) == 0  # it is not built
    below = FakeQuantize(-2.55, 0.0)
    np.testing.assert_allclose(below(np.array([-2.0, 0.0], np.float32)), [-2, 0], atol=1e-6)


def test_a_run_folder_has_the_model_in_float_and_as_it_was_trained(run: Path, tmp_path: Path) -> None:
    """The same weights are in both, those of the best epoch; they stay when there is nothing to do on resuming."""
    recipe = dataclasses.replace(RECIPES["quantize"], epochs=1, patience=1, fuse=False)
    settings = TrainingSettings(data="digits", model="", recipe=recipe, images=256, source=str(run))
    folder = RunFolder(tmp_path / "run")
    metrics = train(settings, folder.folder)
    model, network = keras.models.load_model(folder.model), keras.models.load_model(folder.quantized)
    assert not any(isinstance(layer, FakeQuantize | QuantizedLayer) for layer in model.layers)
    assert list_folded(network).keys() == {layer.name for layer in model.layers if hasattr(layer, "kernel")}
    assert metrics["accuracy"] > 0.5
    with np.load(folder.folder / "heldout.npz") as heldout:
        images = heldout["images"][:32]
    np.testing.assert_allclose(restore(network)(images), model(images), atol=1e-6)
    np.testing.assert_allclose(network(images), model(images), atol=0.05)
    start = keras.models.load_model(run / "model.keras")
    assert not np.array_equal(model.get_layer("stem_conv").kernel, start.get_layer("stem_conv").kernel)
    assert train(settings, folder.folder, resume=True)["accuracy"] == metrics["accuracy"]
    again = keras.models.load_model(folder.quantized)
    for left, right in zip(network.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quantize", "int8"], "--quantize and the recipes finetune and quantize are for a network that has learned"),
        (["--quantize", "int4", "--from", "runs/digits"], "--quantize must be one of int8, not 'int4'"),
        (
            ["--quantize", "int8", "--from", "runs/digits", "--precision", "mixed_bfloat16"],
            "--quantize rounds float32 values to 8 bits; leave out --precision",
        ),
    ],
)
def test_what_cannot_be_quantized_is_one_sentence(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, and no run folder."""
    assert cli.main(["train", *arguments, "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
