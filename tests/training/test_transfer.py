"""A training that starts from another network: what is taken over, what is new, what may change and how fast."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from numpy.typing import NDArray

from resnet import BadInput, cli
from training import mirroring, model, transfer
from training.applications import APPLICATIONS
from training.heads import to_probabilities
from training.model import HEAD, WHITENED, Architecture
from training.optimizer import compile_for
from training.recipes import ALL_BUT_HEAD, RECIPES, Recipe
from training.train import TrainingSettings, train
from training.transfer import Pretrained
from training.whitening import whiten

PLAIN = Recipe(name="plain", fuse=False)
DIGITS = tuple(map(str, range(10)))
layers = keras.layers


def images(count: int = 4, side: int = 32) -> NDArray[np.uint8]:
    """Return random pixels."""
    return np.random.default_rng(0).integers(256, size=(count, side, side, 3), dtype=np.uint8)


def answer(network: keras.Model, pixels: NDArray[np.generic]) -> NDArray[np.float32]:
    """Return the probabilities of a network."""
    return np.asarray(network.predict_on_batch(pixels))


def load(source: Path | str, architecture: str = "", preprocess: str | None = None) -> Pretrained:
    """Load a source of a new training."""
    return transfer.load(str(source), architecture, preprocess, None)


def build(
    pretrained: Pretrained, image_shape: tuple[int, int, int], classes: Sequence[str], recipe: Recipe
) -> keras.Model:
    """Return a network with an output for each class."""
    return transfer.build(pretrained, image_shape, classes, len(classes), recipe)


def settings(source: Path | str, epochs: int = 2, data: str = "digits", **values: Any) -> TrainingSettings:
    """Return settings of a fine-tuning that takes seconds."""
    recipe = dataclasses.replace(
        RECIPES["finetune"], **{"epochs": epochs, "head_epochs": 1, "batch_size": 64, "fuse": False} | values
    )
    return TrainingSettings(data=data, model="", recipe=recipe, images=256, source=str(source))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """The file of a network that is smaller than any of the family, and has what they have not: dropout."""
    keras.utils.set_random_seed(0)
    image = keras.Input((8, 8, 3), dtype="uint8")
    x = layers.Conv2D(4, 3, name="convolution", use_bias=False)(layers.Rescaling(1 / 255)(image))
    x = layers.ReLU()(layers.BatchNormalization(name="norm")(x))
    x = layers.Dropout(0.5)(layers.GlobalAveragePooling2D()(x))
    keras.Model(image, layers.Dense(2, "softmax")(x), name="small").save(tmp_path / "small.keras")
    return tmp_path / "small.keras"


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of two classes, 16 images each for training and for the test."""
    labels = np.arange(32) % 2
    pixels = images(32, side=8) // (1 + labels[:, None, None, None]).astype(np.uint8)
    path = tmp_path_factory.mktemp("few") / "few.npz"
    np.savez(path, x_train=pixels, y_train=labels, x_test=pixels, y_test=labels)
    return path


def test_the_same_classes_keep_their_head(run: Path) -> None:
    """Before it learns anything, the network answers as its source does."""
    network = build(load(run), (32, 32, 3), DIGITS, PLAIN)
    np.testing.assert_allclose(answer(network, images()), answer(load(run).network, images()), atol=1e-6)


def test_only_classes_of_the_same_name_keep_their_weights(run: Path) -> None:
    """In whatever order; a new class begins at zero."""
    network = build(load(run), (32, 32, 3), ("8", "five", "3"), PLAIN)
    old, new = load(run).network.get_layer(HEAD), network.get_layer(HEAD)
    np.testing.assert_array_equal(new.kernel[:, 0], old.kernel[:, 8])
    np.testing.assert_array_equal(new.kernel[:, 2], old.kernel[:, 3])
    assert float(new.bias[0]) == float(old.bias[8])
    assert not np.any(new.kernel[:, 1])
    np.testing.assert_array_equal(
        network.get_layer("stem_conv").kernel, load(run).network.get_layer("stem_conv").kernel
    )


def test_a_file_without_names_keeps_its_head_if_the_number_fits(run: Path, tmp_path: Path) -> None:
    """And begins anew with any other."""
    file = shutil.copy(run / "model.keras", tmp_path)
    kept = build(load(file), (32, 32, 3), [f"class {digit}" for digit in DIGITS], PLAIN).get_layer(HEAD)
    np.testing.assert_array_equal(kept.kernel, load(run).network.get_layer(HEAD).kernel)
    assert not np.any(build(load(file), (32, 32, 3), ("a", "b"), PLAIN).get_layer(HEAD).kernel)


def test_images_may_have_another_size(run: Path) -> None:
    """A network that averages its features takes any."""
    network = build(load(run), (48, 40, 3), DIGITS, PLAIN)
    assert network.input_shape == (None, 48, 40, 3)
    np.testing.assert_array_equal(network.get_layer(HEAD).kernel, load(run).network.get_layer(HEAD).kernel)


def nest() -> keras.Model:
    """Return what tutorials make: a network within a network, behind a scaling of its own, of grey pixels."""
    inner = keras.Sequential(
        [keras.Input((16, 16, 1)), layers.Conv2D(4, 3), layers.BatchNormalization(), layers.ReLU()], name="inner"
    )
    image = keras.Input((16, 16, 1))
    x = layers.GlobalAveragePooling2D()(inner(layers.Rescaling(1 / 255)(image), training=False))
    return keras.Model(image, layers.Softmax()(layers.Dense(3)(layers.Dropout(0.5)(x))))


@pytest.mark.parametrize(("mirror", "outputs"), [(None, 1), (False, 2)])
def test_a_source_that_looks_twice_learns_from_one_look(
    mirror: bool | None, outputs: int, few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And looks twice again unless that is not wanted; head and first layer are taken over as all else is."""
    network = model.build(Architecture((4,), (1,), (1,), stem="whitened", pooled=True), (8, 8, 3), outputs)
    whiten(network, images(side=8))
    source = mirroring.mirror(network)
    source.save(tmp_path / "source.keras")
    values = {"learning_rate": 0.0, "mirror": mirror, "schedule": "constant", "warmup": 0.0}
    train(settings(tmp_path / "source.keras", 1, str(few), **values), tmp_path / "run")
    learned = keras.models.load_model(tmp_path / "run" / "model.keras")
    assert "to calibrate it there are 5 validation images, and 20 are needed" in capsys.readouterr().out
    expected = network if mirror is False else source
    assert len(learned.layers) == len(expected.layers)
    np.testing.assert_array_equal(learned.get_layer(WHITENED).kernel, network.get_layer(WHITENED).kernel)
    np.testing.assert_allclose(answer(learned, images(side=8)), answer(expected, images(side=8)), atol=1e-6)
    (tmp_path / "source.keras").unlink()
    metrics = train(settings(tmp_path / "source.keras", 2, str(few), **values), tmp_path / "run", resume=True)
    assert metrics["settings"]["mirror"] is (mirror is None)
    assert metrics["settings"]["head"] == ("sigmoid" if outputs == 1 else "softmax")


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (1, 1)])
def test_one_output_and_two_say_the_same(before: int, after: int) -> None:
    """A head of the one kind becomes one of the other."""
    network = model.build(Architecture((4,), (1,), (1,)), (8, 8, 3), before)
    kernel, bias = network.get_layer(HEAD).get_weights()
    network.get_layer(HEAD).set_weights([kernel, bias + np.arange(before) + 0.5])
    source = Pretrained("mine", "", network, ("cat", "dog"), head="softmax")
    learned = transfer.build(source, (8, 8, 3), ("cat", "dog"), after, PLAIN)
    expected, found = (to_probabilities(answer(each, images(side=8))) for each in (network, learned))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_features_of_a_sequence_are_averaged(tmp_path: Path) -> None:
    """As those of a map are."""
    image = keras.Input((32, 32, 3), dtype="uint8")
    x = layers.Reshape((16, 8))(layers.Conv2D(8, 8, strides=8)(layers.Rescaling(1 / 255)(image)))
    network = keras.Model(image, layers.Softmax()(layers.GlobalAveragePooling1D()(layers.Dense(3)(x))))
    network.save(tmp_path / "tokens.keras")
    learned = build(load(tmp_path / "tokens.keras"), (32, 32, 3), "abc", PLAIN)
    np.testing.assert_allclose(answer(learned, images()), answer(network, images()), atol=1e-6)


def test_a_version_of_an_export_has_names_for_its_classes(repository: Path) -> None:
    """So that only the same ones keep their weights."""
    assert load(repository / "digits" / "1" / "model.keras").labels == DIGITS
    with pytest.raises(BadInput, match="name the model in it, .*model.keras"):
        load(repository / "digits" / "1")


def test_a_network_within_a_network_is_opened(tmp_path: Path) -> None:
    """So that its layers can be frozen one by one; what it answers stays."""
    original = nest()
    original.save(tmp_path / "mine.keras")
    network = build(load(tmp_path / "mine.keras", preprocess="identity"), (16, 16, 1), "abc", PLAIN)
    assert not any(isinstance(layer, keras.Model) for layer in network.layers)
    grey = images(side=16)[..., :1]
    np.testing.assert_allclose(answer(network, grey), answer(original, grey.astype(np.float32)), atol=1e-6)
    network.save(tmp_path / "copy.keras")
    again = keras.models.load_model(tmp_path / "copy.keras")
    np.testing.assert_allclose(answer(again, grey), answer(network, grey), atol=1e-6)


def test_frozen_statistics_stay_while_all_else_learns(small: Path) -> None:
    """Keras freezes scale and shift with them. A source that was frozen itself learns again."""
    for frozen in (True, False):
        network = build(load(small), (8, 8, 3), "ab", dataclasses.replace(PLAIN, frozen_statistics=frozen))
        network.save(small)  # with frozen layers, the first time
        compile_for(network, PLAIN, 10)
        watched = network.get_layer("norm").weights + network.get_layer("convolution").weights
        before = [np.array(weight) for weight in watched]
        network.train_on_batch(images(side=8), np.eye(2, dtype=np.float32)[[0, 1, 0, 1]])
        network.train_on_batch(images(side=8), np.eye(2, dtype=np.float32)[[0, 1, 0, 1]])
        changed = [not np.array_equal(*pair) for pair in zip(before, watched, strict=True)]
        assert changed == [not frozen] * 4 + [True]


@pytest.mark.parametrize(("freeze", "first"), [("1", "stage1_block1_1_conv"), (ALL_BUT_HEAD, HEAD)])
def test_frozen_layers_are_the_first_ones(run: Path, freeze: str, first: str) -> None:
    """With what is between them; metrics.json counts their weights."""
    network = build(load(run), (32, 32, 3), DIGITS, dataclasses.replace(PLAIN, freeze=freeze))
    assert next(layer.name for layer in network.layers if layer.trainable_weights) == first
    frozen = load(run).describe(network)["frozen_parameters"]
    head = network.get_layer(HEAD).count_params()
    assert frozen == (network.count_params() - head if freeze == ALL_BUT_HEAD else 7 * 7 * 3 * 8 + 4 * 8)


@pytest.mark.parametrize("optimizer", ["nesterov", "adam"])
def test_the_source_learns_later_and_more_slowly_than_the_head(optimizer: Any) -> None:
    """First the head alone; then all, in the given proportion of rates, weight decay included."""
    steps, pixels = {}, np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)
    for rate in (1.0, 0.25):
        recipe = dataclasses.replace(
            PLAIN, optimizer=optimizer, learning_rate=0.01, weight_decay=0.1, head_epochs=1, source_rate=rate
        )
        keras.utils.set_random_seed(0)
        network = keras.Sequential([keras.Input((3,)), layers.Dense(4), layers.Dense(2, "softmax", name=HEAD)])
        compile_for(network, recipe, 10)
        transfer.slow_down(network, recipe, steps=1)
        kernels = [layer.kernel for layer in network.layers]
        for step in range(2):
            before = [np.array(kernel) for kernel in kernels]
            network.train_on_batch(pixels, np.eye(2, dtype=np.float32)[[0, 0, 1, 1]])
            steps[rate, step] = [now.numpy() - then for now, then in zip(kernels, before, strict=True)]
        assert not np.any(steps[rate, 0][0])
        assert np.all(steps[rate, 0][1] != 0)
    np.testing.assert_allclose(steps[0.25, 1][0], steps[1.0, 1][0] / 4, rtol=1e-3)
    np.testing.assert_allclose(steps[0.25, 1][1], steps[1.0, 1][1], rtol=1e-3)


def test_at_most_half_of_the_epochs_are_for_the_head_alone(small: Path, few: Path, tmp_path: Path) -> None:
    """However short a training is, the source learns too."""
    before = keras.models.load_model(small).get_layer("convolution").kernel
    train(settings(small, 1, str(few), head_epochs=5), tmp_path / "run")
    assert np.any(keras.models.load_model(tmp_path / "run" / "model.keras").get_layer("convolution").kernel != before)


def test_a_fine_tuning_resumes_to_the_same_bits_without_its_source(small: Path, few: Path, tmp_path: Path) -> None:
    """Its checkpoint has all that was learned, and dropout draws what it would have; another source is refused."""
    constant = {"schedule": "constant", "warmup": 0.0, "batch_size": 4}
    train(settings(small, 3, str(few), **constant), tmp_path / "whole")
    train(settings(small, 2, str(few), **constant), tmp_path / "run")
    small.rename(tmp_path / "gone")
    metrics = train(settings(small, 3, str(few), **constant), tmp_path / "run", resume=True)
    models = [keras.models.load_model(tmp_path / name / "model.keras") for name in ("whole", "run")]
    for left, right in zip(*(trained.get_weights() for trained in models), strict=True):
        np.testing.assert_array_equal(left, right)
    assert metrics["source"] == json.loads((tmp_path / "whole" / "metrics.json").read_text())["source"]
    assert metrics["source"]["name"] == metrics["settings"]["source"] == "small.keras"
    small.write_bytes((tmp_path / "gone").read_bytes() + b"more")
    with pytest.raises(BadInput, match="was started with source_sha256"):
        train(settings(small, 4, str(few), **constant), tmp_path / "run", resume=True)


def test_every_application_is_one_of_keras() -> None:
    """Of those that there are, none is missing."""
    functions = {name for name in vars(keras.applications) if name[0].isupper()}
    assert {row.function for row in APPLICATIONS.values()} == functions


def test_a_file_of_weights_alone_fits_its_network(run: Path, tmp_path: Path) -> None:
    """Whatever classes it was for."""
    load(run).network.save_weights(tmp_path / "mine.weights.h5")
    network = build(load(tmp_path / "mine.weights.h5", "tiny"), (32, 32, 3), "abc", PLAIN)
    for ours, theirs in zip(network.layers[:-1], load(run).network.layers[:-1], strict=True):
        for left, right in zip(ours.get_weights(), theirs.get_weights(), strict=True):
            np.testing.assert_array_equal(left, right)


def test_a_network_of_keras_applications_takes_weights_and_pixels(tmp_path: Path) -> None:
    """A file of weights without a head fits; what scales the pixels is part of the network."""
    original = keras.applications.MobileNet((32, 32, 3), alpha=1.0, include_top=False, weights=None, pooling="avg")
    original.save_weights(tmp_path / "mine.weights.h5")
    pretrained = load(tmp_path / "mine.weights.h5", "mobilenet")
    network = build(pretrained, (32, 32, 3), "abc", PLAIN)
    features = keras.Model(network.inputs, network.get_layer(HEAD).input)
    scaled = keras.applications.mobilenet.preprocess_input(images().astype(np.float32))
    np.testing.assert_allclose(answer(features, images()), answer(original, scaled), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--from=nowhere"], "nowhere does not exist; it should be a run folder of `resnet train` or a .keras file"),
        (["--from=RUN", "--model=resnet20"], "does not fit --model resnet20: it has 'stem_conv' with weights of"),
        (["--from=RUN", "--model=resnet9"], "--model 'resnet9' is unknown"),
        (["--from=RUN", "--preprocess=tf"], "takes uint8 pixels already; leave out --preprocess"),
        (["--from=FLOAT"], "takes float32 [batch, 32, 32, 3] instead of uint8 pixels; name its preprocessing"),
        (["--from=FLOAT", "--preprocess=unit", "--image-size=16"], "--image-size is for image files"),
        (["--from=FLAT", "--preprocess=unit"], "takes no images of 32x32 pixels"),
        (["--from=WEIGHTS"], "holds weights without a network; name the network with --model"),
        (["--from=WEIGHTS", "--model=resnet20"], "do not fit --model resnet20: <Conv2D name=stem_conv"),
        (["--from=RUN", "--colors=grey"], "takes images of 3 channels; leave out --colors"),
        (["--from=TEXT"], "TEXT.keras is not a .keras file, or a damaged one; save or copy it again"),
        (["--from=imagenet"], "--from imagenet has weights for the networks of keras.applications only; pass --model"),
        (["--from=imagenet", "--model=resnet50"], "only; pass --model keras-resnet50"),
        (["--from=imagenet", "--model=mobilenetv2"], "the weights of mobilenetv2 could not be downloaded (offline)"),
        (["--from=RUN", "--freeze=7"], "--freeze 7 leaves nothing to train: the network has 7 convolutions and dense"),
        (["--from=RUN", "--freeze=half"], "--freeze must be a number of layers or all-but-head, not 'half'"),
        (["--freeze=1"], "for a network that has learned something; name it with --from"),
        (["--recipe=finetune"], "name it with --from"),
        (["--preprocess=tf"], "--preprocess is for a model of float input; name the model with --from"),
    ],
)
def test_a_source_that_cannot_be_used_is_one_sentence(
    words: list[str],
    message: str,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And leaves no run folder."""
    monkeypatch.setattr("training.applications.build", lambda *_: (_ for _ in ()).throw(Exception("offline")))
    image = keras.Input((32, 32, 3))
    keras.Model(image, layers.Dense(2)(layers.GlobalAveragePooling2D()(image))).save(tmp_path / "FLOAT.keras")
    small = keras.Input((8, 8, 3))
    keras.Model(small, layers.Dense(2)(layers.Flatten()(small))).save(tmp_path / "FLAT.keras")
    keras.Model(image, layers.Conv2D(3, 3)(image)).save_weights(tmp_path / "WEIGHTS.weights.h5")
    (tmp_path / "TEXT.keras").write_text("x")
    names = {"RUN": run} | {path.name.partition(".")[0]: path for path in tmp_path.iterdir()}
    words = [
        f"--from={names.get(word.removeprefix('--from='), word.removeprefix('--from='))}" if "from" in word else word
        for word in words
    ]
    assert cli.main(["train", "--data=digits", *words, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
