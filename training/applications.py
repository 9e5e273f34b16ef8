"""The networks of keras.applications: their names for `--model`, and the scale of pixels that each was made for."""

from __future__ import annotations

from typing import NamedTuple

import keras

from resnet import BadInput
from training import preprocessing
from training.model import MOMENTUM, classify


class Application(NamedTuple):
    """A network of keras.applications.

    Attributes:
        function: Its name there.
        preprocess: What it expects of pixels, one of `training.preprocessing.PREPROCESSING`; `identity` for those whose
            graph begins with the scaling.
    """

    function: str
    preprocess: str


APPLICATIONS = {
    # The family has networks of these names, which differ: in Keras' the first 1x1 convolution has the stride.
    **{f"keras-resnet{depth}": Application(f"ResNet{depth}", "caffe") for depth in (50, 101, 152)},
    **{f"resnet{depth}v2": Application(f"ResNet{depth}V2", "tf") for depth in (50, 101, 152)},
    **{f"vgg{depth}": Application(f"VGG{depth}", "caffe") for depth in (16, 19)},
    **{f"densenet{depth}": Application(f"DenseNet{depth}", "torch") for depth in (121, 169, 201)},
    **{
        function.lower(): Application(function, "tf")
        for function in ("MobileNet", "MobileNetV2", "InceptionV3", "InceptionResNetV2", "Xception")
    },
    **{function.lower(): Application(function, "tf") for function in ("NASNetMobile", "NASNetLarge")},
    **{f"mobilenetv3{size.lower()}": Application(f"MobileNetV3{size}", "identity") for size in ("Small", "Large")},
    **{f"efficientnetb{number}": Application(f"EfficientNetB{number}", "identity") for number in range(8)},
    **{
        f"efficientnetv2{size.lower()}": Application(f"EfficientNetV2{size}", "identity")
        for size in ("B0", "B1", "B2", "B3", "S", "M", "L")
    },
    **{
        f"convnext{size.lower()}": Application(f"ConvNeXt{size}", "identity")
        for size in ("Tiny", "Small", "Base", "Large", "XLarge")
    },
}


def build(name: str, image_shape: tuple[int, int, int], outputs: int, weights: str | None = None) -> keras.Model:
    """Build a classifier.

    Args:
        name: A key of `APPLICATIONS`.
        image_shape: (height, width, channels) of the images.
        outputs: See `training.model.classify`.
        weights: `imagenet`, a file of weights without those of the head, or None for random weights.

    Returns:
        A model from `image`, uint8 [batch, height, width, channels], to `probabilities`, float32 [batch, outputs].

    Raises:
        BadInput: The network does not take images of this shape.
    """
    row = APPLICATIONS[name]
    if row.preprocess in ("caffe", "torch") and image_shape[2] != 3:
        raise BadInput(f"--model {name} takes three colours, not {image_shape[2]}; pass --colors rgb")
    image = keras.Input(image_shape, dtype="uint8", name="image")
    pixels = preprocessing.apply(row.preprocess, image, keras.config.dtype_policy().compute_dtype)
    try:
        network = getattr(keras.applications, row.function)(
            include_top=False, weights=weights, input_tensor=pixels, input_shape=image_shape
        )
    except ValueError as error:
        if weights is not None:
            raise
        raise BadInput(
            f"--model {name} cannot be built for {image_shape[1]}x{image_shape[0]} pixels: {error}"
        ) from None
    for layer in network.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = MOMENTUM
    return keras.Model(image, classify(network.outputs[0], outputs), name=name)
