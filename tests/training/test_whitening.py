"""What leaves the whitened layer is uncorrelated, of mean 0, and of equal variance where the images vary at all."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from numpy.typing import NDArray

from tests.tiny import TINY
from training.model import ARCHITECTURES, WHITENED, build
from training.whitening import NOISE, whiten


def make_images(channels: int) -> NDArray[np.uint8]:
    """Return images in which neighbours and channels resemble each other, as in photographs."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(200, 18, 18, channels)).cumsum(axis=1).cumsum(axis=2)
    noise += 3 * noise.mean(axis=3, keepdims=True)
    return np.clip(128 + 5 * noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize(("channels", "copies", "tolerance"), [(1, 1, 1e-3), (3, 1, 1e-3), (4, 1, 1e-3), (3, 9, 0.05)])
def test_patches_become_white(channels: int, copies: int, tolerance: float) -> None:
    """And their negatives follow; the layer learns nothing. Of many images, it looks at some patches only."""
    images = np.tile(make_images(channels), (copies, 1, 1, 1))
    network = build(ARCHITECTURES["resnet8-pooled"], images.shape[1:], 10)
    whiten(network, images)
    layer = network.get_layer(WHITENED)
    assert not layer.trainable_weights
    values = keras.Model(network.inputs[0], layer.output).predict(images, verbose=0).reshape(-1, 8 * channels)
    half = values[:, : 4 * channels]
    np.testing.assert_allclose(half, -values[:, 4 * channels :], atol=1e-4)
    np.testing.assert_allclose(half.mean(axis=0), 0, atol=tolerance)
    covariance = np.cov(half, rowvar=False)
    raw = np.lib.stride_tricks.sliding_window_view(images / 255, (2, 2), axis=(1, 2)).transpose(0, 1, 2, 4, 5, 3)
    variances = np.linalg.eigvalsh(np.cov(raw.reshape(-1, 4 * channels), rowvar=False))
    np.testing.assert_allclose(covariance, np.diag(variances / (variances + NOISE)), atol=tolerance)


def test_other_networks_stay_as_they_are() -> None:
    """No layer of them is to whiten."""
    network = build(TINY, (18, 18, 3), 10)
    before = network.get_weights()
    whiten(network, make_images(3))
    for ours, theirs in zip(network.get_weights(), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)
