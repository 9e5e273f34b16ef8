"""The networks are the paper's."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from resnet import BadInput
from training.family import PUBLISHED, count_parameters
from training.model import ARCHITECTURES, RESNETS, Architecture, build, residual_block

DEEP = ("resnet110", "resnet101", "resnet152")  # more blocks of the same kinds


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
def test_an_imagenet_network_has_the_published_number_of_parameters(name: str) -> None:
    """To the digit, at 1,000 classes, as torchvision has them."""
    assert f"{count_parameters(name):,}" == PUBLISHED[name]


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_a_cifar_network_has_the_published_number_of_parameters(depth: int, millions: float) -> None:
    """As far as table 6 of the paper gives them."""
    digits = 1 if depth == 110 else 2
    assert round(count_parameters(f"resnet{depth}") / 1e6, digits) == millions
    assert PUBLISHED[f"resnet{depth}"] == f"{millions}M"


@pytest.mark.parametrize(("name", "depth"), [("resnet20", 20), ("resnet56", 56), ("resnet8-pooled", 8)])
def test_depth_counts_the_layers_with_weights(name: str, depth: int) -> None:
    """Convolutions on the main path and the dense layer."""
    network = build(ARCHITECTURES[name], (32, 32, 3), 10)
    weighted = [layer for layer in network.layers if isinstance(layer, keras.layers.Conv2D | keras.layers.Dense)]
    assert len(weighted) == depth


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("resnet18", [8, 4, 2, 1]),
        ("resnet50", [8, 4, 2, 1]),
        ("resnet18-cifar", [32, 16, 8, 4]),
        ("resnet18-stride1", [8, 8, 8, 8]),
        ("resnet20", [32, 16, 8]),
        ("plain20", [32, 16, 8]),
        ("resnet8-pooled", [15, 7, 3]),
    ],
)
def test_stages_have_the_feature_maps_of_their_strides(name: str, rows: list[int]) -> None:
    """The stem divides a 32-pixel image by its stride, and each stage by its own."""
    architecture = ARCHITECTURES[name]
    network = build(architecture, (32, 32, 3), 10)
    widen = 4 if architecture.bottleneck else 1
    for stage, (count, filters) in enumerate(zip(rows, architecture.filters, strict=True), start=1):
        last = f"stage{stage}_block1_add" if architecture.pooled else f"stage{stage}_block2_relu"
        output = network.get_layer(last).output
        assert output.shape[1:] == (count, count, widen * filters)


@pytest.mark.parametrize("name", [name for name in RESNETS if name not in DEEP])
def test_a_plain_twin_has_the_same_layers_without_shortcuts(name: str) -> None:
    """Its convolutions are those of the main path, one by one; nothing is added to anything."""
    residual, plain = (build(ARCHITECTURES[kind], (32, 32, 3), 10) for kind in (name, name.replace("resnet", "plain")))

    def convolutions(network: keras.Model) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
        layers = (layer for layer in network.layers if isinstance(layer, keras.layers.Conv2D))
        return [(layer.name, layer.kernel.shape, layer.strides) for layer in layers if "shortcut" not in layer.name]

    assert sorted(convolutions(plain)) == sorted(convolutions(residual))
    assert not [layer for layer in plain.layers if isinstance(layer, keras.layers.Add)]
    assert not [layer.name for layer in plain.layers if "shortcut" in layer.name]


@pytest.mark.parametrize("bottleneck", [False, True])
def test_a_block_whose_convolutions_are_zero_is_its_identity_shortcut(bottleneck: bool) -> None:
    """Without a change of shape nothing lies on the shortcut: what remains is relu(x)."""
    x = keras.Input((4, 4, 8))
    block = keras.Model(x, residual_block(x, 2 if bottleneck else 8, bottleneck=bottleneck))
    for layer in block.layers:
        if isinstance(layer, keras.layers.Conv2D):
            layer.kernel.assign(np.zeros(layer.kernel.shape))
    value = np.random.default_rng(0).normal(size=(2, 4, 4, 8)).astype(np.float32)
    np.testing.assert_array_equal(block(value, training=False), np.maximum(value, 0))


def test_a_pooled_network_needs_a_pixel_after_all_pooling() -> None:
    """Of 9 pixels the stem leaves 8, and three poolings 1; of 8 they would leave none."""
    pooled = ARCHITECTURES["resnet8-pooled"]
    assert build(pooled, (9, 20, 1), 2).get_layer("stage3_block1_add").output.shape == (None, 1, 2, 256)
    with pytest.raises(BadInput, match="takes images of 9x9 pixels or more, not 20x8; .* by --image-size 9"):
        build(pooled, (8, 20, 3), 2, name="small")


def test_a_block_with_zero_scale_starts_as_its_shortcut() -> None:
    """And one of a plain network, which has none, would start dead: there the scale stays one."""
    x = keras.Input((4, 4, 8))
    value = np.random.default_rng(0).normal(size=(2, 4, 4, 8)).astype(np.float32)
    residual = keras.Model(x, residual_block(x, 8, zero_scale=True))
    np.testing.assert_array_equal(residual(value, training=False), np.maximum(value, 0))
    plain = keras.Model(x, residual_block(x, 8, shortcut="none", zero_scale=True))
    assert np.any(plain(value, training=False))


@pytest.mark.parametrize(("filters", "stride"), [(8, 2), (16, 1), (16, 2)])
def test_a_projection_is_a_1x1_convolution_with_the_step_of_its_block(filters: int, stride: int) -> None:
    """Option B of the paper."""
    x = keras.Input((4, 4, 8))
    block = keras.Model(x, residual_block(x, filters, stride))
    shortcut = block.get_layer("block_shortcut_conv")
    assert shortcut.kernel_size == (1, 1)
    assert shortcut.strides == (stride, stride)
    assert block.output.shape == (None, 4 // stride, 4 // stride, filters)


def test_a_padded_shortcut_steps_over_pixels_and_adds_empty_channels() -> None:
    """Option A of the paper."""
    x = keras.Input((4, 4, 8))
    block = keras.Model(x, residual_block(x, 16, 2, shortcut="padding"))
    for layer in block.layers:
        if isinstance(layer, keras.layers.Conv2D):
            layer.kernel.assign(np.zeros(layer.kernel.shape))
    value = np.random.default_rng(0).uniform(size=(2, 4, 4, 8)).astype(np.float32)
    result = np.asarray(block(value, training=False))
    np.testing.assert_array_equal(result[..., 4:12], value[:, ::2, ::2])
    assert not result[..., :4].any()
    assert not result[..., 12:].any()


def test_the_stride_of_a_bottleneck_is_that_of_its_3x3_convolution() -> None:
    """A 1x1 convolution with a stride of 2 would not look at three pixels of four."""
    x = keras.Input((4, 4, 8))
    block = keras.Model(x, residual_block(x, 4, 2, bottleneck=True))
    convolutions = [block.get_layer(f"block_{number}_conv") for number in (1, 2, 3)]
    assert [(layer.kernel_size[0], layer.strides[0]) for layer in convolutions] == [(1, 1), (3, 2), (1, 1)]


def test_the_network_takes_plain_pixels_and_gives_probabilities() -> None:
    """uint8 goes in, is scaled to [0, 1] inside, and comes out as float32 with a sum of 1."""
    network = build(Architecture((8, 16), (1, 2), (1, 1)), (32, 32, 3), 10)
    assert network.input.dtype == "uint8"
    scaled = keras.Model(network.input, network.get_layer("rescale").output)
    np.testing.assert_allclose(scaled(np.full((1, 32, 32, 3), 255, np.uint8)), 1.0)
    rows = np.asarray(network(np.zeros((3, 32, 32, 3), np.uint8)))
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows.sum(axis=1), 1, atol=1e-6)
