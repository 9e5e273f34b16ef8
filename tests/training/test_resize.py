"""The rules to resize images, beside TensorFlow's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from numpy.typing import NDArray

from training.images import RESIZES, Resize, decode

NOISE = np.random.default_rng(0).integers(0, 256, (13, 22, 3), np.uint8)
OPTIONS: dict[Resize, dict[str, Any]] = {
    "bilinear": {"antialias": True},
    "bilinear-no-antialias": {},
    "nearest": {"method": "nearest"},
}


@pytest.mark.parametrize("size", [(5, 9), (13, 11), (1, 1), (40, 64), (6, 30)])
@pytest.mark.parametrize("rule", RESIZES)
def test_a_rule_computes_what_tensorflow_does(
    rule: Resize, size: tuple[int, int], png: Callable[[NDArray[np.uint8]], bytes]
) -> None:
    """Smaller and larger; with antialiasing Pillow rounds twice, once for each axis."""
    found = decode(png(NOISE), size, rule)
    expected = tf.image.resize(NOISE, size, **OPTIONS[rule]).numpy()
    assert (found.shape, found.dtype) == ((*size, 3), np.uint8)
    assert np.abs(found - expected).max() <= (1.01 if rule == "bilinear" else 0.501)


@pytest.mark.parametrize("kind", ["grey", "rgb"])
def test_16_bits_become_8_as_in_tensorflow(kind: str) -> None:
    """For grey and colours."""
    values = np.array([0, 128, 255, 256, 8000, 32767, 32768, 65535], np.uint16).reshape(1, 8, 1)
    file = tf.io.encode_png(values if kind == "grey" else values.repeat(3, axis=2)).numpy()
    np.testing.assert_array_equal(decode(file), tf.io.decode_png(file, channels=3).numpy())
