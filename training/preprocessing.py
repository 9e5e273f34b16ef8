"""The preprocessing that models of float input expect; it becomes part of the model.

Loading this module needs no Keras, so that the command line can list the kinds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import keras

PREPROCESSING = {
    "identity": "0 to 255",  # EfficientNet
    "unit": "0 to 1",
    "tf": "-1 to 1",  # MobileNetV2, ResNet50V2
    "torch": "normalised by ImageNet's mean and deviation",  # DenseNet
    "caffe": "BGR minus ImageNet's mean",  # ResNet50
}
"""What each kind makes of RGB pixels, by its name; `tf`, `torch` and `caffe` are the modes of keras.applications."""


def apply(kind: str | None, image: keras.KerasTensor, dtype: str = "float32") -> keras.KerasTensor:
    """Return the input that a model of this kind expects.

    Args:
        kind: One of `PREPROCESSING`; None for a model of pixels as they are.
        image: Pixels, uint8 [batch, height, width, channels].
        dtype: The dtype of the input.
    """
    import keras

    if kind is None:
        return image
    pixels = keras.ops.cast(image, dtype)
    if kind == "identity":
        return pixels
    if kind == "unit":
        return keras.layers.Rescaling(1 / 255)(pixels)
    return keras.applications.imagenet_utils.preprocess_input(pixels, data_format="channels_last", mode=kind)
