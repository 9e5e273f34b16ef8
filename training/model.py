"""The residual networks of He et al. (2015), https://arxiv.org/abs/1512.03385, in functional Keras layers."""

from __future__ import annotations

from typing import Literal, NamedTuple

import keras
from keras import layers

from resnet import BadInput

Shortcut = Literal["projection", "padding", "none"]

HEAD = "probabilities"  # the name of the last layer
WHITENED = "whitened_stem"  # the name of the first convolution, if its weights follow from the images
PATCH = 2  # pixels, the side of what it looks at
# Of the running statistics of batch normalisation (Goyal et al. 2017, section 5.1). With those of Keras, 0.99 and more,
# they lag behind until the end of a training on a small data set.
MOMENTUM = 0.9


class Architecture(NamedTuple):
    """The parameters of one network.

    Attributes:
        filters: Filters of every stage; the output of a bottleneck block has four times as many channels.
        strides: Stride of the first block of every stage.
        blocks: Blocks of every stage.
        bottleneck: Blocks of 1x1, 3x3 and 1x1 convolutions in place of two 3x3 ones (figure 5).
        stem: `imagenet` is a 7x7 convolution and 3x3 max-pooling, both with stride 2; `cifar` is a 3x3 convolution with
            stride 1; `whitened` is a 2x2 convolution which `training.whitening` sets, and which learns nothing.
        shortcut: How a shortcut changes shape. `projection` is a 1x1 convolution (option B of section 3.3), `padding`
            is subsampling and zeros for the new channels (option A, without parameters). `none` leaves all shortcuts
            out: a plain network.
        pooled: Every stage begins with a convolution and 2x2 max-pooling, and its blocks have one convolution: the
            networks that were the fastest to learn CIFAR-10, from Page's of 2018 to those of Jordan (2024),
            https://arxiv.org/abs/2404.00498. Strides are not used.
    """

    filters: tuple[int, ...]
    strides: tuple[int, ...]
    blocks: tuple[int, ...]
    bottleneck: bool = False
    stem: Literal["imagenet", "cifar", "whitened"] = "imagenet"
    shortcut: Shortcut = "projection"
    pooled: bool = False

    @property
    def smallest(self) -> int:
        """The smallest side of an image, in pixels: one pixel is left after all pooling."""
        return 2 ** len(self.filters) + PATCH - 1 if self.pooled else 1


def _imagenet(*blocks: int, bottleneck: bool = False) -> Architecture:
    """Return a network of table 1: each stage doubles the filters and halves the side of the feature map."""
    return Architecture((64, 128, 256, 512), (1, 2, 2, 2), blocks, bottleneck)


def _cifar(depth: int) -> Architecture:
    """Return a network of section 4.2: 6n + 2 layers, and shortcuts without parameters."""
    return Architecture((16, 32, 64), (1, 2, 2), ((depth - 2) // 6,) * 3, stem="cifar", shortcut="padding")


RESNETS = {
    "resnet18": _imagenet(2, 2, 2, 2),
    "resnet34": _imagenet(3, 4, 6, 3),
    "resnet50": _imagenet(3, 4, 6, 3, bottleneck=True),
    "resnet101": _imagenet(3, 4, 23, 3, bottleneck=True),
    "resnet152": _imagenet(3, 8, 36, 3, bottleneck=True),
    "resnet18-cifar": _imagenet(2, 2, 2, 2)._replace(stem="cifar"),
    # Half the filters and half the depth: of the sizes that two cores can train in an hour, wide beats deep, because
    # wide layers use the cores better.
    "resnet10-narrow": Architecture((32, 64, 128, 256), (1, 2, 2, 2), (1, 1, 1, 1), stem="cifar"),
    # What two cores can train best in an hour: large feature maps cost most of it, and pooling comes early.
    "resnet8-pooled": Architecture((64, 256, 256), (1, 1, 1), (1, 1, 1), stem="whitened", pooled=True),
    # The teaching notebook taken literally: no stage shrinks the feature map, which takes 19 times the arithmetic.
    "resnet18-stride1": _imagenet(2, 2, 2, 2)._replace(strides=(1, 1, 1, 1)),
    **{f"resnet{depth}": _cifar(depth) for depth in (20, 32, 44, 56, 110)},
}

# Each residual network and its plain twin, which has the same layers without shortcuts.
ARCHITECTURES = RESNETS | {
    name.replace("resnet", "plain"): architecture._replace(shortcut="none") for name, architecture in RESNETS.items()
}


def build(
    architecture: Architecture,
    image_shape: tuple[int, int, int],
    outputs: int,
    zero_scale: bool = False,
    name: str = "resnet",
) -> keras.Model:
    """Build an untrained classifier.

    Args:
        architecture: A value of `ARCHITECTURES`, or one of your own.
        image_shape: (height, width, channels) of the images.
        outputs: Number of classes, at least 2; or 1 for a sigmoid, the probability of the second of two classes.
        zero_scale: Initialise the scale of the last batch normalisation of every residual block with zero, so that the
            block starts as its shortcut (Goyal et al. 2017, section 5.1). A plain network has no shortcuts and ignores
            it; so does a pooled one, in which a ReLU follows, and no gradient would pass.
        name: The name of the model.

    Returns:
        A model from `image`, uint8 [batch, height, width, channels], to `probabilities`, float32 [batch, outputs]. Its
        first layer scales pixels to [0, 1], so that callers pass plain pixels.

    Raises:
        BadInput: The images are smaller than `architecture.smallest`.
    """
    if min(image_shape[:2]) < architecture.smallest:
        raise BadInput(
            f"--model {name} takes images of {architecture.smallest}x{architecture.smallest} pixels or more, not "
            f"{image_shape[1]}x{image_shape[0]}; image files are enlarged by --image-size {architecture.smallest}"
        )
    image = keras.Input(image_shape, dtype="uint8", name="image")
    x = layers.Rescaling(1 / 255, name="rescale")(image)
    if architecture.stem == "whitened":
        filters = 2 * PATCH * PATCH * image_shape[2]
        x = layers.Conv2D(filters, PATCH, trainable=False, name=WHITENED)(x)
    else:
        size, stride = (7, 2) if architecture.stem == "imagenet" else (3, 1)
        x = _convolve(x, architecture.filters[0], size, stride, name="stem")
    x = layers.ReLU(name="stem_relu")(x)
    if architecture.stem == "imagenet":
        x = layers.MaxPooling2D(3, strides=2, padding="same", name="stem_pool")(x)
    stages = zip(architecture.filters, architecture.strides, architecture.blocks, strict=True)
    for stage, (filters, first_stride, blocks) in enumerate(stages, start=1):
        if architecture.pooled:
            x = _convolve(x, filters, 3, 1, name=f"stage{stage}", pool=True)
            x = layers.ReLU(name=f"stage{stage}_relu")(x)
        for block in range(1, blocks + 1):
            block_name = f"stage{stage}_block{block}"
            if architecture.pooled:
                x = _append_single(x, filters, architecture.shortcut, block_name)
            else:
                stride = first_stride if block == 1 else 1
                x = residual_block(
                    x, filters, stride, architecture.bottleneck, architecture.shortcut, zero_scale, block_name
                )
    return keras.Model(image, classify(x, outputs), name=name)


def classify(x: keras.KerasTensor, outputs: int) -> keras.KerasTensor:
    """Append the head of every network that is trained here.

    Args:
        x: Features, [batch, channels], or a sequence or map of them, [batch, …, channels], which is averaged.
        outputs: A probability for each class, at least 2; or 1, that of the second of two.

    Returns:
        float32 [batch, outputs], from the layer `HEAD`.
    """
    if len(x.shape) > 2:
        pool = layers.GlobalAveragePooling1D if len(x.shape) == 3 else layers.GlobalAveragePooling2D
        x = pool(name="pool")(x)
    activation = "softmax" if outputs > 1 else "sigmoid"
    return layers.Dense(outputs, activation=activation, dtype="float32", name=HEAD)(x)


def residual_block(
    x: keras.KerasTensor,
    filters: int,
    stride: int = 1,
    bottleneck: bool = False,
    shortcut: Shortcut = "projection",
    zero_scale: bool = False,
    name: str = "block",
) -> keras.KerasTensor:
    """Append a residual block: convolutions, and a shortcut around them that is the identity if the shape stays.

    Args:
        x: [batch, height, width, channels].
        filters: Channels of the 3x3 convolutions.
        stride: Stride of the block; the output has ceil(height / stride) rows.
        bottleneck: 1x1, 3x3 and 1x1 convolutions and 4 * filters channels (figure 5 of the paper), in place of two 3x3
            convolutions and `filters` channels (figure 2). The 3x3 convolution has the stride, as in every
            implementation since Facebook's of 2016; in the paper the first 1x1 convolution has it.
        shortcut: See `Architecture`.
        zero_scale: See `build`.
        name: Prefix of the layer names.
    """
    zero_scale = zero_scale and shortcut != "none"
    if bottleneck:
        y = _convolve(x, filters, 1, 1, name=f"{name}_1")
        y = layers.ReLU(name=f"{name}_1_relu")(y)
        y = _convolve(y, filters, 3, stride, name=f"{name}_2")
        y = layers.ReLU(name=f"{name}_2_relu")(y)
        y = _convolve(y, 4 * filters, 1, 1, name=f"{name}_3", zero_scale=zero_scale)
    else:
        y = _convolve(x, filters, 3, stride, name=f"{name}_1")
        y = layers.ReLU(name=f"{name}_1_relu")(y)
        y = _convolve(y, filters, 3, 1, name=f"{name}_2", zero_scale=zero_scale)
    if shortcut != "none":
        y = layers.Add(name=f"{name}_add")([y, _match_shape(x, y.shape[-1], stride, shortcut, name)])
    return layers.ReLU(name=f"{name}_relu")(y)


def _append_single(x: keras.KerasTensor, filters: int, shortcut: Shortcut, name: str) -> keras.KerasTensor:
    """Append a residual block of one 3x3 convolution, whose input has its shape."""
    y = _convolve(x, filters, 3, 1, name=f"{name}_1")
    y = layers.ReLU(name=f"{name}_1_relu")(y)
    return y if shortcut == "none" else layers.Add(name=f"{name}_add")([x, y])


def _match_shape(x: keras.KerasTensor, filters: int, stride: int, shortcut: Shortcut, name: str) -> keras.KerasTensor:
    """Return `x` with the shape of the output of its block."""
    missing = filters - x.shape[-1]
    if stride == 1 and not missing:
        return x
    if shortcut == "projection":
        return _convolve(x, filters, 1, stride, name=f"{name}_shortcut")
    x = layers.AveragePooling2D(1, strides=stride, name=f"{name}_shortcut")(x)
    return keras.ops.pad(x, ((0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2)))


def _convolve(
    x: keras.KerasTensor,
    filters: int,
    size: int,
    stride: int,
    name: str,
    zero_scale: bool = False,
    pool: bool = False,
) -> keras.KerasTensor:
    """Append a convolution, 2x2 max-pooling or none, and batch normalisation.

    The shift of the normalisation makes a bias of the convolution redundant.
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
    if pool:
        x = layers.MaxPooling2D(2, name=f"{name}_pool")(x)
    scale = "zeros" if zero_scale else "ones"
    return layers.BatchNormalization(momentum=MOMENTUM, gamma_initializer=scale, name=f"{name}_norm")(x)
