"""A first layer that whitens: it turns the pixels of a patch into uncorrelated values of equal variance.

It need not be learned, for it follows from the images alone: Coates et al. (2011), https://proceedings.mlr.press/v15/coates11a.html,
and as the first layer of a network Page (2018) and Jordan (2024), https://arxiv.org/abs/2404.00498.
"""

from __future__ import annotations

import math

import keras
import numpy as np
from numpy.typing import NDArray

from training.model import WHITENED

# Added to the variances, of pixels in [0, 1]: what the eye does not see is not blown up to the size of the rest.
NOISE = 5e-4
PATCHES = 500_000  # about as many are looked at


def whiten(network: keras.Model, images: NDArray[np.uint8]) -> None:
    """Set the weights of the first convolution of a network, if it is to whiten.

    Args:
        network: From `training.model.build`.
        images: Training images, uint8 [n, height, width, channels].
    """
    if WHITENED not in {layer.name for layer in network.layers}:
        return
    layer = network.get_layer(WHITENED)
    side, _, channels, filters = layer.kernel.shape
    step = math.ceil(math.sqrt(images[..., 0].size / PATCHES))
    windows = np.lib.stride_tricks.sliding_window_view(images / np.float32(255), (side, side), axis=(1, 2))
    patches = windows[:, ::step, ::step].transpose(0, 1, 2, 4, 5, 3).reshape(-1, side * side * channels)
    variances, directions = np.linalg.eigh(np.cov(patches, rowvar=False))
    rows = (directions / np.sqrt(variances + NOISE)).T
    rows = np.concatenate([rows, -rows])  # a ReLU follows, which passes one sign only
    kernel = rows.reshape(filters, side, side, channels).transpose(1, 2, 3, 0)
    layer.set_weights([kernel, -rows @ patches.mean(axis=0)])
