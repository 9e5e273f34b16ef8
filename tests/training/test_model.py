"""The network is the paper's."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from training.model import ARCHITECTURES, build, residual_block


def test_resnet18_has_the_published_number_of_parameters() -> None:
    """11,689,512 trainable parameters at 1,000 classes, as torchvision's ResNet-18 has."""
    network = build(ARCHITECTURES["resnet18"], (224, 224, 3), 1000)
    assert sum(int(np.prod(weight.shape)) for weight in network.trainable_weights) == 11_689_512


@pytest.mark.parametrize(
    ("name", "rows"),
    [("resnet18", [8, 4, 2, 1]), ("resnet18-stride1", [8, 8, 8, 8])],
)
def test_stages_have_the_feature_maps_of_their_strides(name: str, rows: list[int]) -> None:
    """A 32-pixel image leaves the stem with 8 rows; each stage divides them by its stride."""
    network = build(ARCHITECTURES[name], (32, 32, 3), 10)
    outputs = [network.get_layer(f"stage{stage}_block2_relu").output for stage in (1, 2, 3, 4)]
    assert [output.shape[1:] for output in outputs] == [
        (count, count, filters) for count, filters in zip(rows, (64, 128, 256, 512), strict=True)
    ]


def test_a_block_whose_convolutions_are_zero_is_its_identity_shortcut() -> None:
    """Without a change of shape nothing lies on the shortcut: what remains is relu(x)."""
    x = keras.Input((4, 4, 8))
    block = keras.Model(x, residual_block(x, 8))
    for layer in block.layers:
        if isinstance(layer, keras.layers.Conv2D):
            layer.kernel.assign(np.zeros(layer.kernel.shape))
    value = np.random.default_rng(0).normal(size=(2, 4, 4, 8)).astype(np.float32)
    np.testing.assert_array_equal(block(value, training=False), np.maximum(value, 0))


@pytest.mark.parametrize(("filters", "stride"), [(8, 2), (16, 1), (16, 2)])
def test_a_block_that_changes_the_shape_has_a_1x1_convolution_as_shortcut(filters: int, stride: int) -> None:
    """Its kernel is 1x1 and takes the same step as the block."""
    x = keras.Input((4, 4, 8))
    block = keras.Model(x, residual_block(x, filters, stride))
    shortcut = block.get_layer("block_shortcut_conv")
    assert shortcut.kernel_size == (1, 1)
    assert shortcut.strides == (stride, stride)
    assert block.output.shape == (None, 4 // stride, 4 // stride, filters)


def test_the_network_takes_plain_pixels_and_gives_probabilities() -> None:
    """uint8 goes in, is scaled to [0, 1] inside, and comes out as float32 with a sum of 1."""
    network = build(ARCHITECTURES["tiny"], (32, 32, 3), 10)
    assert network.input.dtype == "uint8"
    scaled = keras.Model(network.input, network.get_layer("rescale").output)
    np.testing.assert_allclose(scaled(np.full((1, 32, 32, 3), 255, np.uint8)), 1.0)
    rows = np.asarray(network(np.zeros((3, 32, 32, 3), np.uint8)))
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows.sum(axis=1), 1, atol=1e-6)
