"""Any Keras classifier can be exported: what it wants and gives becomes part of its graph."""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
import pytest
from numpy.typing import NDArray

from export import manifest, source
from export.export import export
from resnet import BadInput
from tests.export.test_export import model

IMAGENET = {
    "caffe": keras.applications.resnet.preprocess_input,
    "tf": keras.applications.mobilenet_v2.preprocess_input,
    "torch": keras.applications.densenet.preprocess_input,
    "identity": keras.applications.efficientnet.preprocess_input,
    "unit": lambda pixels: pixels / 255,
}


@pytest.fixture
def images(heldout: tuple[NDArray[np.uint8], NDArray[np.int32]]) -> NDArray[np.uint8]:
    """Pixels whose three colours differ."""
    return np.random.default_rng(0).integers(256, size=(8, *heldout[0].shape[1:]), dtype=np.uint8)


@pytest.mark.parametrize("kind", IMAGENET)
def test_preprocessing_becomes_part_of_the_model(kind: str, images: NDArray[np.uint8], tmp_path: Path) -> None:
    """It is that of the network in keras.applications, which wants float pixels prepared by its own function."""
    original = model(dtype="float32")
    original.save(tmp_path / "mine.keras")
    loaded = source.load(tmp_path / "mine.keras", "digits", preprocess=kind)
    assert loaded.model.input.dtype == "uint8"
    expected = original.predict(IMAGENET[kind](images.astype(np.float32)), verbose=0)
    np.testing.assert_allclose(loaded.model.predict(images, verbose=0), expected, atol=1e-6)


def test_preprocessing_is_for_models_of_float_input(tmp_path: Path) -> None:
    """One that takes uint8 scales the pixels itself."""
    model().save(tmp_path / "mine.keras")
    with pytest.raises(BadInput, match="takes uint8 pixels already; leave out --preprocess"):
        source.load(tmp_path / "mine.keras", "digits", preprocess="tf")


def test_logits_get_their_softmax(images: NDArray[np.uint8], tmp_path: Path) -> None:
    """On request, and never twice by guess."""
    original = model(activation="linear")
    original.save(tmp_path / "mine.keras")
    loaded = source.load(tmp_path / "mine.keras", "digits", logits=True)
    logits = original.predict(images, verbose=0)
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(loaded.model.predict(images, verbose=0), expected, atol=1e-6)


def test_labels_of_a_file_name_the_outputs(
    heldout: tuple[NDArray[np.uint8], NDArray[np.int32]], tmp_path: Path
) -> None:
    """In its order, with classes that the evidence does not show."""
    model(outputs=11).save(tmp_path / "mine.keras")
    names = ["none", *reversed([str(digit) for digit in range(10)])]
    path = tmp_path / "names.txt"
    path.write_text("\n".join(names))
    loaded = source.load(tmp_path / "mine.keras", "digits", labels=path)
    assert loaded.evidence.labels == tuple(names)
    np.testing.assert_array_equal(loaded.evidence.targets, 10 - heldout[1])
    path.write_text("\n".join(names[:-1]))
    with pytest.raises(BadInput, match="lacks the class '0'"):
        source.load(tmp_path / "mine.keras", "digits", labels=path)
    path.write_text("\n".join([*names, "none"]))
    with pytest.raises(BadInput, match="names a class twice"):
        source.load(tmp_path / "mine.keras", "digits", labels=path)
    with pytest.raises(BadInput, match="cannot be read"):
        source.load(tmp_path / "mine.keras", "digits", labels=tmp_path / "nowhere")


def test_mixed_precision_is_exported_in_float32(images: NDArray[np.uint8], tmp_path: Path) -> None:
    """With the same weights: the answers are those of the model, as far as half precision tells."""
    keras.config.set_dtype_policy("mixed_float16")
    try:
        original = model()
    finally:
        keras.config.set_dtype_policy("float32")
    original.save(tmp_path / "mine.keras")
    loaded = source.load(tmp_path / "mine.keras", "digits")
    assert loaded.model.output.dtype == "float32"
    np.testing.assert_allclose(loaded.model.predict(images, verbose=0), original.predict(images, verbose=0), atol=5e-3)


def test_layers_that_only_their_author_knows_are_refused(tmp_path: Path) -> None:
    """A Lambda hides Python code, and a class of one's own is not there when the file is read."""
    image = keras.Input((32, 32, 3), dtype="uint8")
    keras.Model(image, keras.layers.Lambda(lambda x: x)(image)).save(tmp_path / "lambda.keras")
    with pytest.raises(BadInput, match="only the built-in layers of Keras can be exported"):
        source.load(tmp_path / "lambda.keras", "digits")

    class Mine(keras.layers.Layer):  # type: ignore[misc]
        def call(self, x: keras.KerasTensor) -> keras.KerasTensor:
            return x

    keras.Model(image, Mine()(image)).save(tmp_path / "own.keras")
    with pytest.raises(BadInput, match="only the built-in layers of Keras can be exported"):
        source.load(tmp_path / "own.keras", "digits")


@pytest.mark.slow
def test_a_network_of_keras_applications_is_exported(tmp_path: Path) -> None:
    """Random weights serve: what is proved is the conversion."""
    keras.utils.set_random_seed(0)
    network = keras.applications.MobileNetV2((32, 32, 3), weights=None, classes=10, classifier_activation=None)
    network.save(tmp_path / "mobile.keras")
    loaded = source.load(tmp_path / "mobile.keras", "digits", preprocess="tf", logits=True)
    recorded = manifest.read(export(loaded, tmp_path / "models" / "mobile"))
    assert (recorded.input.dtype, recorded.output.shape) == ("uint8", [-1, 10])
    assert not list(recorded.certificate.violations())
