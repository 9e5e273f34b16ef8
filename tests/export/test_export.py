"""An exported version is complete and proved, or it is not there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

import resnet
from export import convert, manifest, repository, source
from export.export import export
from export.parity import BudgetError
from resnet import BadInput


def test_a_version_holds_all_forms_of_the_model(repository: Path) -> None:
    """SavedModel, ONNX, Keras, labels, evidence; the manifest has the hash of each."""
    version = repository / "digits" / "1"
    about = manifest.read(version)
    assert {"model.onnx", "model.keras", "saved_model.pb", "labels.txt", "heldout.npz"} < about.files.keys()
    assert any(name.startswith("variables/") for name in about.files)
    assert about.files == manifest.hash_files(version)
    assert about.labels == [str(digit) for digit in range(10)]
    assert (about.input.name, about.input.dtype, about.input.shape) == ("image", "uint8", [-1, 32, 32, 3])
    assert (about.output.name, about.output.dtype, about.output.shape) == ("probabilities", "float32", [-1, 10])
    assert about.training is not None
    assert about.training["accuracy"] == about.certificate.accuracy


def test_the_certificate_covers_both_variants_at_three_batch_sizes(
    repository: Path, heldout: tuple[NDArray[np.uint8], NDArray[np.int32]]
) -> None:
    """All held-out images, within the budget, and with the accuracy of Keras."""
    found = manifest.read(repository / "digits" / "1").certificate
    assert found.images == len(heldout[0])
    assert {name: [row.batch_size for row in rows] for name, rows in found.variants.items()} == {
        "onnx": [1, 3, 64],
        "saved_model": [1, 3, 64],
    }
    assert not list(found.violations())
    assert {row.accuracy for rows in found.variants.values() for row in rows} == {found.accuracy}


def test_the_onnx_file_has_the_names_that_clients_use(repository: Path) -> None:
    """Input `image`, output `probabilities`, and one free axis called `batch`."""
    graph = onnx.load(repository / "digits" / "1" / "model.onnx").graph
    for values, name in ((graph.input, "image"), (graph.output, "probabilities")):
        assert [value.name for value in values] == [name]
        first, *others = values[0].type.tensor_type.shape.dim
        assert first.dim_param == "batch"
        assert all(dimension.dim_value > 0 for dimension in others)


def test_each_export_is_the_next_version(run: Path, own_repository: Path) -> None:
    """Earlier versions stay; gaps are not filled."""
    (own_repository / "digits" / "1").rename(own_repository / "digits" / "7")
    assert export(source.load(run), own_repository / "digits") == own_repository / "digits" / "8"
    assert repository.versions(own_repository / "digits") == [7, 8]


def test_a_model_that_computes_something_else_is_not_published(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One weight off by a thousandth breaks the budget: exit code 1, and nothing remains."""

    def to_wrong_onnx(model: keras.Model, path: Path) -> None:
        kernel = model.get_layer("probabilities").kernel
        right = kernel.numpy()
        kernel.assign(right * 1.001)
        to_onnx(model, path)
        kernel.assign(right)

    to_onnx = convert.to_onnx
    monkeypatch.setattr(convert, "to_onnx", to_wrong_onnx)
    with pytest.raises(BudgetError, match="largest difference of onnx at batch size 1"):
        export(source.load(run), tmp_path / "models" / "digits")
    assert not list((tmp_path / "models" / "digits").iterdir())
    assert resnet.main(["export", str(run), "--to", str(tmp_path / "models" / "digits")]) == 1
    assert "does not compute what the original does" in capsys.readouterr().err


def test_two_exports_at_once_get_two_versions(tmp_path: Path) -> None:
    """Both staged before either is published: the second takes the next number."""
    finished: list[int] = []
    with repository.staging(tmp_path / "m") as first, repository.staging(tmp_path / "m") as second:
        for staged in (first, second):
            (staged / "model.onnx").write_text("x")

        def finish_late(version: int) -> None:
            finished.append(version)
            if first.exists():  # the other export publishes between our choice of a number and our rename
                repository.publish(first, lambda _: None)

        assert repository.publish(second, finish_late).name == "2"
    assert finished == [1, 2]
    assert repository.versions(tmp_path / "m") == [1, 2]
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == ["1", "2"]


@pytest.mark.parametrize("name", ["..", ".hidden", "a b", "ä"])
def test_names_that_no_url_or_folder_should_have_are_refused(run: Path, tmp_path: Path, name: str) -> None:
    """The name is the last part of the path."""
    with pytest.raises(BadInput, match="a model's name has letters"):
        export(source.load(run), tmp_path / "models" / name)


def test_a_target_that_cannot_be_written_is_one_sentence(run: Path, tmp_path: Path) -> None:
    """Here a file stands where the repository should be."""
    (tmp_path / "models").write_text("")
    with pytest.raises(BadInput, match="cannot be written"):
        export(source.load(run), tmp_path / "models" / "digits")


def model(
    shape: tuple[int, ...] = (32, 32, 3), dtype: str = "uint8", activation: str = "softmax", outputs: int = 10
) -> keras.Model:
    """Return a classifier, or with other arguments something that is nearly one."""
    image = keras.Input(shape, dtype=dtype)
    x = keras.layers.Flatten()(keras.layers.Rescaling(1 / 255)(image))
    return keras.Model(image, keras.layers.Dense(outputs, activation=activation)(x))


def two_inputs() -> keras.Model:
    """Return a model with two inputs."""
    first, second = keras.Input((32, 32, 3)), keras.Input((32, 32, 3))
    return keras.Model([first, second], keras.layers.Add()([first, second]))


MODELS: dict[str, tuple[Callable[[], keras.Model], str]] = {
    "float input": (
        lambda: model(dtype="float32"),
        r"takes float32 \[batch, 32, 32, 3\]; a servable model takes uint8",
    ),
    "grey input": (lambda: model((32, 32, 1)), r"takes uint8 \[batch, 32, 32, 1\]"),
    "no softmax": (lambda: model(activation="linear"), "does not end in probabilities"),
    "one output": (lambda: model(outputs=1, activation="sigmoid"), r"gives float32 \[batch, 1\]"),
    "other classes": (lambda: model(outputs=7), "has 7 outputs, but there are 10 class names"),
    "other size": (lambda: model((16, 16, 3)), r"takes images of \[16, 16, 3\], the held-out images are \[32, 32, 3\]"),
    "two inputs": (two_inputs, "has 2 inputs and 1 outputs"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_that_is_no_image_classifier_is_refused(kind: str, tmp_path: Path) -> None:
    """The message says what it takes or gives, and what a classifier does."""
    build, message = MODELS[kind]
    build().save(tmp_path / "mine.keras")
    with pytest.raises(BadInput, match=message):
        source.load(tmp_path / "mine.keras", data="digits")


def test_a_model_from_elsewhere_is_exported_with_a_named_data_set(tmp_path: Path) -> None:
    """It needs no run folder; its labels and evidence are the data set's."""
    model().save(tmp_path / "mine.keras")
    version = export(source.load(tmp_path / "mine.keras", data="digits"), tmp_path / "models" / "mine")
    about = manifest.read(version)
    assert about.training is None
    assert about.certificate.images == 360


def test_what_is_no_model_is_refused(run: Path, tmp_path: Path) -> None:
    """A missing path, an unfinished run, a file of something else, a model without evidence."""
    with pytest.raises(BadInput, match="does not exist"):
        source.load(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="holds no model.keras; finish its training"):
        source.load(tmp_path)
    (tmp_path / "text.keras").write_text("no model")
    with pytest.raises(BadInput, match="is not a Keras model that can be loaded"):
        source.load(tmp_path / "text.keras")
    shutil.copy(run / "model.keras", tmp_path / "alone.keras")
    with pytest.raises(BadInput, match="name a data set with --data"):
        source.load(tmp_path / "alone.keras")


@pytest.mark.parametrize("name", ["heldout.npz", "metrics.json"])
def test_a_broken_file_of_a_run_is_named(run: Path, tmp_path: Path, name: str) -> None:
    """A copy that was cut short is one sentence."""
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    (folder / name).write_bytes((folder / name).read_bytes()[:100])
    with pytest.raises(BadInput, match=f"{name} is broken"):
        source.load(folder)


def edit(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    """Change the manifest of a version."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_verify_recomputes_the_certificate(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 0, and the table."""
    assert resnet.main(["verify", str(repository / "digits")]) == 0
    out = capsys.readouterr().out
    assert "files of" in out
    assert "digits/1 is verified" in out


def test_verify_finds_what_was_changed(own_repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file, a figure of the certificate, or the number of a version: exit code 1; a broken manifest: 2."""
    version = own_repository / "digits" / "1"
    edit(version / "manifest.json", lambda content: content["certificate"].update(accuracy=0.999))  # type: ignore[attr-defined]
    assert resnet.main(["verify", str(version.parent)]) == 1
    assert "gives Keras an accuracy of 99.90%" in capsys.readouterr().err

    with (version / "model.onnx").open("ab") as file:
        file.write(b"x")
    (version / "labels.txt").unlink()
    assert resnet.main(["verify", str(version.parent)]) == 1
    message = capsys.readouterr().err
    assert "model.onnx is not the file that was exported" in message
    assert "labels.txt is missing" in message

    (version / "manifest.json").write_text('{"format": 1}')
    assert resnet.main(["verify", str(version.parent)]) == 2
    assert "is not a valid manifest" in capsys.readouterr().err
    assert resnet.main(["verify", str(version.parent), "--version", "4"]) == 2
    assert "has no version 4; it has [1]" in capsys.readouterr().err
    assert resnet.main(["verify", str(own_repository / "nothing")]) == 2
    assert "holds no model version" in capsys.readouterr().err


MANIFESTS: dict[str, tuple[Callable[[dict[str, object]], object], str]] = {
    "other version": (lambda content: content.update(version=2), "belongs to digits/2, not to digits/1"),
    "other format": (lambda content: content.update(format=9), "has format 9, this version of resnet reads 1"),
    "labels": (lambda content: content.update(labels=["a"]), "names 1 labels for 10 outputs"),
    "unknown field": (lambda content: content.update(extra=1), "unknown field `extra`"),
    "wrong type": (lambda content: content.update(opset="18"), r"Expected `int`, got `str` - at `\$.opset`"),
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_broken_manifest_is_refused(kind: str, own_repository: Path) -> None:
    """The message names the file and what is wrong with it."""
    change, message = MANIFESTS[kind]
    version = own_repository / "digits" / "1"
    edit(version / "manifest.json", change)
    with pytest.raises(BadInput, match=message):
        manifest.read(version)
