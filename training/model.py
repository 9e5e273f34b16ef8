"""The residual network of He et al. (2015), https://arxiv.org/abs/1512.03385, in functional Keras layers."""

from __future__ import annotations

from typing import NamedTuple

import keras
from keras import layers


class Architecture(NamedTuple):
    """What sets one network of the family apart: filters, stride and number of blocks of every stage."""

    filters: tuple[int, ...]
    strides: tuple[int, ...]
    blocks: tuple[int, ...]


ARCHITECTURES = {
    # Table 1 of the paper: a stage that doubles the filters halves the feature map.
    "resnet18": Architecture((64, 128, 256, 512), strides=(1, 2, 2, 2), blocks=(2, 2, 2, 2)),
    # The teaching notebook read to the letter: no stage shrinks the feature map, at 19 times the arithmetic.
    "resnet18-stride1": Architecture((64, 128, 256, 512), strides=(1, 1, 1, 1), blocks=(2, 2, 2, 2)),
}


def build(architecture: Architecture, image_shape: tuple[int, int, int], classes: int) -> keras.Model:
    """Build an untrained classifier.

    Args:
        architecture: A value of `ARCHITECTURES`, or one of your own.
        image_shape: (height, width, 3) of the images.
        classes: Number of classes, at least 2.

    Returns:
        A model from `image`, uint8 [batch, height, width, 3], to `probabilities`, float32 [batch, classes]. Scaling to
        [0, 1] is its first layer, so whoever calls it sends plain pixels.
    """
    image = keras.Input(image_shape, dtype="uint8", name="image")
    x = layers.Rescaling(1 / 255, name="rescale")(image)
    x = _convolve(x, architecture.filters[0], 7, stride=2, name="stem")
    x = layers.ReLU(name="stem_relu")(x)
    x = layers.MaxPooling2D(3, strides=2, padding="same", name="stem_pool")(x)
    for stage, (filters, stride, blocks) in enumerate(zip(*architecture, strict=True), start=1):
        for block in range(1, blocks + 1):
            x = residual_block(x, filters, stride if block == 1 else 1, name=f"stage{stage}_block{block}")
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    probabilities = layers.Dense(classes, activation="softmax", dtype="float32", name="probabilities")(x)
    return keras.Model(image, probabilities, name="resnet")


def residual_block(x: keras.KerasTensor, filters: int, stride: int = 1, name: str = "block") -> keras.KerasTensor:
    """Add two 3x3 convolutions to `x` and the shortcut around them (figure 2 of the paper).

    The shortcut is the identity, or a 1x1 convolution where the block changes the shape (option B of section 3.3).

    Args:
        x: [batch, height, width, channels].
        filters: Channels of the result.
        stride: Step of the first convolution; the result has ceil(height / stride) rows.
        name: Prefix of the layers' names.
    """
    shortcut = x
    if stride != 1 or x.shape[-1] != filters:
        shortcut = _convolve(x, filters, 1, stride, name=f"{name}_shortcut")
    y = _convolve(x, filters, 3, stride, name=f"{name}_1")
    y = layers.ReLU(name=f"{name}_1_relu")(y)
    y = _convolve(y, filters, 3, 1, name=f"{name}_2")
    y = layers.Add(name=f"{name}_add")([y, shortcut])
    return layers.ReLU(name=f"{name}_relu")(y)


def _convolve(x: keras.KerasTensor, filters: int, size: int, stride: int, name: str) -> keras.KerasTensor:
    """Convolution and batch normalisation; the latter's shift makes a bias of the former redundant.

    The running statistics move by a tenth a step (Goyal et al. 2017, section 5.1), not by Keras' hundredth, with which
    a small data set has been trained before they have caught up.
    """
    x = layers.Conv2D(
        filters,
        size,
        strides=stride,
        padding="same",
        use_bias=False,
        kernel_initializer="he_normal",
        name=f"{name}_conv",
    )(x)
    return layers.BatchNormalization(momentum=0.9, name=f"{name}_norm")(x)
