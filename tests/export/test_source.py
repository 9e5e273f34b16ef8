"""Any Keras classifier can be exported: what it wants and gives becomes part of its graph."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from export import manifest, source
from export.export import export
from resnet import BadInput
from tests.export.test_export import model
from training import images as decoder

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
    with pytest.raises(BadInput, match="names.txt has the class 'none' twice"):
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
    with pytest.raises(BadInput, match="only the built-in layers of Keras can be used"):
        source.load(tmp_path / "lambda.keras", "digits")

    class Mine(keras.layers.Layer):  # type: ignore[misc]
        def call(self, x: keras.KerasTensor) -> keras.KerasTensor:
            return x

    keras.Model(image, Mine()(image)).save(tmp_path / "own.keras")
    with pytest.raises(BadInput, match="only the built-in layers of Keras can be used"):
        source.load(tmp_path / "own.keras", "digits")


def write_data(path: Path, height: int, width: int, classes: int = 10) -> str:
    """Write a data set of coloured noise, and return its path."""
    images = np.random.default_rng(0).integers(256, size=(2 * classes, height, width, 3), dtype=np.uint8)
    labels = np.arange(2 * classes) % classes
    np.savez(path, x_train=images, y_train=labels, x_test=images, y_test=labels)
    return str(path)


@pytest.mark.parametrize("structure", [lambda y: [y], lambda y: {"answers": y}], ids=["list", "dict"])
def test_an_output_in_a_list_or_dict_is_that_output(structure: Callable[[Any], Any], tmp_path: Path) -> None:
    """As models for several tasks have it."""
    plain = model()
    keras.Model(plain.inputs, structure(plain.output)).save(tmp_path / "mine.keras")
    loaded = source.load(tmp_path / "mine.keras", "digits")
    expected = plain.predict(loaded.evidence.images, verbose=0)
    np.testing.assert_array_equal(loaded.model.predict(loaded.evidence.images, verbose=0), expected)


class Own(keras.Model):  # type: ignore[misc]
    """A model whose layers only its code knows."""

    def call(self, x: keras.KerasTensor) -> keras.KerasTensor:
        """Return the input."""
        return x


@pytest.mark.parametrize("make", [lambda: keras.Sequential([keras.layers.Dense(3)]), Own], ids=["sequential", "class"])
def test_a_model_without_an_input_is_refused(make: Callable[[], keras.Model], tmp_path: Path) -> None:
    """A Sequential that was never called has no weights either; a class of one's own is code."""
    make().save(tmp_path / "mine.keras")
    with pytest.raises(BadInput, match=r"never|begins with keras.Input|built-in layers"):
        source.load(tmp_path / "mine.keras", "digits")


def test_a_sequential_with_an_input_is_a_classifier(tmp_path: Path) -> None:
    """It has one input and one output."""
    layers = keras.layers
    image = layers.Input((32, 32, 3), dtype="uint8")
    network = keras.Sequential([image, layers.Rescaling(1 / 255), layers.Flatten(), layers.Dense(10, "softmax")])
    network.save(tmp_path / "mine.h5")
    loaded = source.load(tmp_path / "mine.h5", "digits")
    images = loaded.evidence.images
    np.testing.assert_array_equal(loaded.model.predict(images, verbose=0), network.predict(images, verbose=0))


def test_a_file_of_tf_keras_2_is_read(tmp_path: Path) -> None:
    """It was written by TensorFlow 2.15 in mixed precision: a model in a model, with layers that Keras 3 describes
    otherwise. The answers are those of TensorFlow 2.15.
    """
    path = Path(__file__).parent / "files" / "keras2.h5"
    loaded = source.load(path, write_data(tmp_path / "mine.npz", 8, 8), preprocess="identity")
    answers = loaded.model.predict(np.arange(2 * 8 * 8 * 3, dtype=np.uint8).reshape(2, 8, 8, 3), verbose=0)
    expected = [[0.0345, 0.4086, 0.0490, 0.0340], [0.0716, 0.4481, 0.0437, 0.0285]]
    np.testing.assert_allclose(answers[:, :4], expected, atol=1e-3)


def test_layers_that_tf_keras_2_describes_with_more_words_are_read(tmp_path: Path) -> None:
    """The file was written by tf_keras 2.21, whose answers these are: flips, zoom, a separable convolution, a GRU."""
    path = Path(__file__).parent / "files" / "keras2_layers.h5"
    loaded = source.load(path, write_data(tmp_path / "mine.npz", 8, 8, classes=3))
    answers = loaded.model.predict(np.arange(2 * 8 * 8 * 3, dtype=np.uint8).reshape(2, 8, 8, 3), verbose=0)
    np.testing.assert_allclose(answers, [[0.450160, 0.061199, 0.488641], [0.429554, 0.118235, 0.452211]], atol=1e-5)


def test_a_function_between_the_layers_of_tf_keras_2_is_named(tmp_path: Path) -> None:
    """Keras 3 has nothing like it."""
    path = Path(shutil.copy(Path(__file__).parent / "files" / "keras2.h5", tmp_path))
    with h5py.File(path, "r+") as store:
        description = json.loads(store.attrs["model_config"])
        description["config"]["layers"][1] |= {"class_name": "TFOpLambda", "name": "tf.math.add"}
        store.attrs["model_config"] = json.dumps(description)
    with pytest.raises(BadInput, match=r"'tf.math.add' is a TFOpLambda: .*; only the built-in layers"):
        source.load(path, "digits", preprocess="identity")


@pytest.mark.parametrize(
    ("name", "arrays", "reason"),
    [
        ("heldout", {"images": np.zeros((2, 8, 8), np.uint8), "labels": [0, 1]}, "no images with their classes"),
        ("heldout", {"images": np.zeros((2, 8, 8, 3), np.uint8), "labels": [0]}, "no images with their classes"),
        ("heldout", {"images": np.zeros((2, 8, 8, 3), np.uint8), "labels": [0.0, 1.0]}, "no images with their classes"),
        ("heldout", {"images": np.zeros((0, 8, 8, 3), np.uint8), "labels": np.zeros(0, int)}, "no images with their"),
        ("heldout", {"images": np.zeros((2, 8, 8, 3), np.uint8), "labels": [0, 7]}, "of 8 classes, labels.txt has 3"),
        ("heldout", {"images": np.zeros((2, 8, 8, 3), np.uint8), "labels": [0, -1]}, "labels.txt has 3"),
        ("calibration", {"images": np.zeros((2, 9, 9, 3), np.uint8)}, "those of calibration.npz are of another kind"),
        ("calibration", {"images": np.zeros((2, 8, 8, 3))}, "those of calibration.npz are of another kind"),
    ],
)
def test_evidence_of_another_kind_is_one_sentence(
    tmp_path: Path, name: str, arrays: dict[str, Any], reason: str
) -> None:
    """It is beside the model, and may be anybody's."""
    model((8, 8, 3)).save(tmp_path / "model.keras")
    (tmp_path / "labels.txt").write_text("a\nb\nc\n")
    np.savez(tmp_path / "heldout.npz", images=np.zeros((2, 8, 8, 3), np.uint8), labels=[0, 1])
    np.savez(tmp_path / f"{name}.npz", **arrays)
    with pytest.raises(BadInput, match=f"the held-out images in .* cannot be read .*{reason}.*; name a data set"):
        source.load(tmp_path)


@pytest.mark.parametrize("function", ["hard_sigmoid", {"class_name": "function", "config": "hard_sigmoid"}])
def test_a_function_that_keras_3_computes_otherwise_is_named(tmp_path: Path, function: object) -> None:
    """The proof compares with what Keras 3 computes, which would be another model."""
    path = Path(shutil.copy(Path(__file__).parent / "files" / "keras2.h5", tmp_path))
    with h5py.File(path, "r+") as store:
        description = json.loads(store.attrs["model_config"])
        description["config"]["layers"][-1]["config"]["activation"] = function
        store.attrs["model_config"] = json.dumps(description)
    with pytest.raises(BadInput, match="computes hard_sigmoid, whose slope is another one in Keras 3"):
        source.load(path, "digits", preprocess="identity")


@pytest.mark.parametrize("activation", ["sigmoid", "linear"])
def test_a_single_output_is_the_probability_of_the_second_class(activation: str, tmp_path: Path) -> None:
    """Or its logit, which gets its sigmoid on request."""
    original = model((8, 8, 3), activation=activation, outputs=1)
    original.layers[-1].bias.assign([-1.0])  # some logits are negative
    original.save(tmp_path / "mine.keras")
    data = write_data(tmp_path / "mine.npz", 8, 8, classes=2)
    loaded = source.load(tmp_path / "mine.keras", data, logits=activation == "linear")
    images = loaded.evidence.images
    output = original.predict(images, verbose=0)[:, 0]
    second = output if activation == "sigmoid" else 1 / (1 + np.exp(-output))
    np.testing.assert_allclose(
        loaded.model.predict(images, verbose=0), np.stack([1 - second, second], axis=1), atol=1e-6
    )
    with pytest.raises(BadInput, match="probabilities already" if activation == "sigmoid" else "appends a sigmoid"):
        source.load(tmp_path / "mine.keras", data, logits=activation == "sigmoid")


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_a_model_of_grey_images_sees_what_pillow_makes_of_the_colours(dtype: str, tmp_path: Path) -> None:
    """To the last bit, before its preprocessing; it is exported with its one channel."""
    original = model((8, 8, 1), dtype=dtype)
    original.save(tmp_path / "mine.keras")
    preprocess = None if dtype == "uint8" else "unit"
    data = write_data(tmp_path / "mine.npz", 8, 8)
    loaded = source.load(tmp_path / "mine.keras", data, preprocess=preprocess)
    images = loaded.evidence.images
    with np.load(data) as arrays:
        grey = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in arrays["x_test"]])[..., None]
    np.testing.assert_array_equal(images, grey)
    assert loaded.model.input_shape == (None, 8, 8, 1)
    expected = original.predict(grey if dtype == "uint8" else grey / np.float32(255), verbose=0)
    np.testing.assert_allclose(loaded.model.predict(images, verbose=0), expected, atol=1e-7)
    with pytest.raises(BadInput, match="caffe is for three colours" if dtype == "float32" else "leave out"):
        source.load(tmp_path / "mine.keras", data, preprocess="caffe")


def write_folder(folder: Path, height: int, width: int, images: int = 1) -> None:
    """Write a folder of images of two classes."""
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for index in range(images):
                Image.new("RGB", (width, height)).save(folder / split / name / f"{index}.png")


def test_images_of_a_folder_are_resized_to_what_the_model_takes(tmp_path: Path) -> None:
    """Square or not; a model that takes any size is told one."""
    write_folder(tmp_path / "data", 20, 20)
    for shape in ((9, 14, 3), (None, None, 3)):
        image = keras.Input(shape, dtype="uint8")
        x = keras.layers.GlobalAveragePooling2D()(keras.layers.Rescaling(1 / 255)(image))
        keras.Model(image, keras.layers.Dense(2, activation="softmax")(x)).save(tmp_path / f"{shape[0]}.keras")
    wide = source.load(tmp_path / "9.keras", str(tmp_path / "data"))
    assert wide.evidence.images.shape[1:] == wide.model.input_shape[1:] == (9, 14, 3)
    with pytest.raises(BadInput, match="9x14 pixels; leave out --image-size"):
        source.load(tmp_path / "9.keras", str(tmp_path / "data"), image_size="9")
    own = source.load(tmp_path / "None.keras", str(tmp_path / "data"))
    assert own.evidence.images.shape[1:] == own.model.input_shape[1:] == (20, 20, 3)
    told = source.load(tmp_path / "None.keras", str(tmp_path / "data"), image_size="16")
    assert told.evidence.images.shape[1:] == told.model.input_shape[1:] == (16, 16, 3)


def test_only_the_images_that_an_export_uses_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The held-out images and a sample of the others, each within its limit."""
    write_folder(tmp_path / "data", 8, 8, images=20)
    monkeypatch.setattr("training.run_folder.HELDOUT_BYTES", 8 * 8 * 3 * 5)
    monkeypatch.setattr("training.run_folder.CALIBRATION_IMAGES", 3)
    decoded: list[bytes] = []
    decode = decoder.decode
    monkeypatch.setattr("training.data.decode", lambda file, *rest: decoded.append(file) or decode(file, *rest))
    model((8, 8, 3), outputs=2).save(tmp_path / "mine.keras")
    evidence = source.load(tmp_path / "mine.keras", str(tmp_path / "data")).evidence
    assert (len(evidence.images), len(evidence.targets)) == (5, 5)
    assert evidence.calibration is not None
    assert (
        len(decoded) == len(evidence.images) + len(evidence.calibration) + 2
    )  # the first of each split gives the size


def test_the_metrics_of_a_run_are_those_of_its_model(run: Path, tmp_path: Path) -> None:
    """The best model has other ones."""
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    best = keras.models.load_model(folder / "best.keras", compile=False)
    best.layers[-1].bias.assign(-best.layers[-1].bias.numpy() + 1)
    best.save(folder / "best.keras")
    assert source.load(folder).accuracy is not None
    assert source.load(folder / "model.keras").accuracy is not None
    loaded = source.load(folder / "best.keras")
    assert (loaded.training, loaded.accuracy) == (None, None)


def test_probabilities_do_not_get_a_softmax(tmp_path: Path) -> None:
    """It would make 0.58 of 1.0."""
    model().save(tmp_path / "mine.keras")
    with pytest.raises(BadInput, match="ends in probabilities already: leave out --logits"):
        source.load(tmp_path / "mine.keras", "digits", logits=True)


def test_weights_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    """As those of a training that diverged."""
    original = model()
    original.layers[-1].kernel.assign(np.full(original.layers[-1].kernel.shape, np.nan))
    original.save(tmp_path / "mine.keras")
    with pytest.raises(BadInput, match="has weights that are not finite, in dense.*/kernel"):
        source.load(tmp_path / "mine.keras", "digits")


def test_a_normalization_keeps_its_mean_in_float32(tmp_path: Path) -> None:
    """It computes with numbers that follow from its weights as a file is read."""
    keras.config.set_dtype_policy("mixed_float16")
    try:
        normalization = keras.layers.Normalization()
        normalization.adapt(np.random.default_rng(0).normal(100, 50, (8, 32, 32, 3)))
        image = keras.Input((32, 32, 3), dtype="uint8")
        x = keras.layers.GlobalAveragePooling2D()(normalization(image))
        original = keras.Model(image, keras.layers.Dense(10, activation="softmax", dtype="float32")(x))
    finally:
        keras.config.set_dtype_policy("float32")
    original.save(tmp_path / "mine.keras")
    loaded = source.load(tmp_path / "mine.keras", "digits")
    images = loaded.evidence.images
    np.testing.assert_allclose(loaded.model.predict(images, verbose=0), original.predict(images, verbose=0), atol=5e-3)


@pytest.mark.slow
def test_a_network_of_keras_applications_is_exported(tmp_path: Path) -> None:
    """Random weights serve: what is proved is the conversion."""
    keras.utils.set_random_seed(0)
    network = keras.applications.MobileNet((32, 32, 3), weights=None, classes=10, classifier_activation=None)
    network.save(tmp_path / "mobile.keras")
    loaded = source.load(tmp_path / "mobile.keras", "digits", preprocess="tf", logits=True)
    recorded = manifest.read(export(loaded, tmp_path / "models" / "mobile"))
    assert (recorded.input.dtype, recorded.output.shape) == ("uint8", [-1, 10])
    assert not list(recorded.certificate.violations())
