"""All networks that `--model` names: those of He et al., and those of keras.applications."""

from __future__ import annotations

import keras
import numpy as np

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


def build(name: str, image_shape: tuple[int, int, int], outputs: int, zero_scale: bool = False) -> keras.Model:
    """Build an untrained network.

    Args:
        name: Its name, which `check_name` accepts.
        image_shape: (height, width, channels) of the images.
        outputs: See `training.model.classify`.
        zero_scale: See `training.model.build`; the networks of keras.applications ignore it.

    Returns:
        A model from `image`, uint8 [batch, height, width, channels], to `probabilities`, float32 [batch, outputs].

    Raises:
        BadInput: The network does not take images of this shape.
    """
    if name in APPLICATIONS:
        return applications.build(name, image_shape, outputs)
    return model.build(ARCHITECTURES[name], image_shape, outputs, zero_scale, name)


def reseed(network: keras.Model, seed: int, epoch: int) -> None:
    """Have dropout and other random layers draw from a seed and an epoch, whatever they drew before."""
    for index, layer in enumerate(network.layers):
        for generator in layer._seed_generators:
            generator.state.assign(np.random.default_rng((seed, epoch, index)).integers(2**32, size=2, dtype=np.uint32))
