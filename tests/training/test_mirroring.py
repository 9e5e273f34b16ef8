"""An answer from an image and its mirror image."""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
import pytest

from tests.tiny import TINY
from training.mirroring import mirror, restore
from training.model import HEAD, build
from training.quantization import quantize
from training.quantization import restore as restore_float

IMAGES = np.random.default_rng(0).integers(256, size=(5, 8, 8, 3), dtype=np.uint8)


@pytest.mark.parametrize("outputs", [1, 4])
def test_the_features_of_both_are_averaged(outputs: int) -> None:
    """Before the last layer; so an image and its mirror image have one answer."""
    network = build(TINY, (8, 8, 3), outputs)
    mirrored = mirror(network)
    features = keras.Model(network.inputs[0], network.get_layer(HEAD).input)
    mean = (features.predict(IMAGES, verbose=0) + features.predict(IMAGES[:, :, ::-1], verbose=0)) / 2
    answers = mirrored.predict(IMAGES, verbose=0)
    np.testing.assert_allclose(answers, network.get_layer(HEAD)(mean), rtol=1e-5)
    np.testing.assert_allclose(mirrored.predict(IMAGES[:, :, ::-1], verbose=0), answers, rtol=1e-5)
    assert (mirrored.input_shape, mirrored.output_shape) == (network.input_shape, network.output_shape)


def test_operations_of_a_loaded_network_keep_their_names(tmp_path: Path) -> None:
    """Those that it has already would clash with the names that Keras gives to new ones."""
    image = keras.Input((8, 8, 3), dtype="uint8")
    x = keras.ops.mean(keras.ops.reshape(image[:, :, ::-1], (-1, 64, 3)), axis=1)
    keras.Model(image, keras.layers.Dense(4, name=HEAD)(x)).save(tmp_path / "model.keras")
    keras.utils.clear_session()
    network = keras.models.load_model(tmp_path / "model.keras")
    mirrored = mirror(network)
    np.testing.assert_allclose(mirrored.predict(IMAGES, verbose=0), network.predict(IMAGES, verbose=0), rtol=1e-4)
    assert len(restore(mirrored).layers) == len(network.layers)


def test_what_was_mirrored_is_restored_from_its_file(tmp_path: Path) -> None:
    """A fine-tuning starts from that; another network stays as it is."""
    network = build(TINY, (8, 8, 3), 4)
    mirror(network).save(tmp_path / "model.keras")
    restored = restore(keras.models.load_model(tmp_path / "model.keras"))
    np.testing.assert_array_equal(restored.predict(IMAGES, verbose=0), network.predict(IMAGES, verbose=0))
    assert [layer.name for layer in restored.layers] == [layer.name for layer in network.layers]
    assert restore(network) is network


def test_a_network_in_the_arithmetic_of_int8_is_mirrored_too(tmp_path: Path) -> None:
    """In float it is the mirrored network, also from its file."""
    network = build(TINY, (8, 8, 3), 4)
    expected = mirror(network).predict(IMAGES, verbose=0)
    mirror(quantize(network, IMAGES)).save(tmp_path / "quantized.keras")
    restored = restore_float(keras.models.load_model(tmp_path / "quantized.keras"))
    np.testing.assert_allclose(restored.predict(IMAGES, verbose=0), expected, atol=1e-6)
