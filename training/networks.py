"""All networks that `--model` names: those of He et al., and those of keras.applications."""

from __future__ import annotations

import keras

from resnet import BadInput
from training import applications, model
from training.applications import APPLICATIONS
from training.model import ARCHITECTURES


def check_name(name: str) -> None:
    """Raise `BadInput` if there is no network of this name."""
    if name not in ARCHITECTURES and name not in APPLICATIONS:
        raise BadInput(
            f"--model {name!r} is unknown; choose one of {', '.join(ARCHITECTURES)}, "
            f"or of keras.applications: {', '.join(APPLICATIONS)}"
        )


def build(name: str, image_shape: tuple[int, int, int], classes: int, zero_scale: bool = False) -> keras.Model:
    """Build an untrained network.

    Args:
        name: Its name, which `check_name` accepts.
        image_shape: (height, width, 3) of the images.
        classes: Number of classes.
        zero_scale: See `training.model.build`; the networks of keras.applications ignore it.

    Returns:
        A model from `image`, uint8 [batch, height, width, 3], to `probabilities`, float32 [batch, classes].

    Raises:
        BadInput: The network does not take images of this size.
    """
    if name in APPLICATIONS:
        return applications.build(name, image_shape, classes)
    return model.build(ARCHITECTURES[name], image_shape, classes, zero_scale)
