"""An exported version is complete and proved, or it is not there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from export import attestation, formats, inspection, manifest, original, parity, precision, repository, source
from export.export import export
from export.formats import OPSET
from export.formats import onnx as onnx_format
from export.manifest import Cost
from export.parity import BudgetError
from export.precision import Reduction
from export.verification import verify
from resnet import BadInput, CheckFailed, cli
from tests.conftest import edit_manifest
from tests.export.sources import classifier, make_source


def test_a_version_holds_all_forms_of_the_model(repository: Path) -> None:
    """SavedModel, ONNX, Keras, labels, evidence; the manifest has the hash of each."""
    version = repository / "digits" / "1"
    recorded = manifest.read(version)
    assert {"model.onnx", "model.keras", "saved_model.pb", "labels.txt", "reference.npz"} < recorded.files.keys()
    assert {"check.py", "test-result.intoto.json", "parity-certificate.intoto.json"} < recorded.files.keys()
    assert any(name.startswith("variables/") for name in recorded.files)
    assert recorded.files == manifest.hash_files(version)
    assert recorded.labels == [str(digit) for digit in range(10)]
    assert (recorded.input.name, recorded.input.dtype, recorded.input.shape) == ("image", "uint8", [-1, 32, 32, 3])
    assert (recorded.output.name, recorded.output.dtype, recorded.output.shape) == (
        "probabilities",
        "float32",
        [-1, 10],
    )
    assert recorded.training is not None
    assert recorded.training["accuracy"] == recorded.certificate.accuracy


def test_the_certificate_covers_both_variants_at_three_batch_sizes(
    repository: Path, heldout: tuple[NDArray[np.uint8], NDArray[np.int32]]
) -> None:
    """All held-out images, within the budget, and with the accuracy of Keras."""
    certificate = manifest.read(repository / "digits" / "1").certificate
    assert certificate.images == len(heldout[0])
    assert {variant.name: [row.batch_size for row in variant.rows] for variant in certificate.variants} == {
        "onnx": [1, 3, 64],
        "saved_model": [1, 3, 64],
    }
    assert not list(certificate.violations())
    assert {row.accuracy for variant in certificate.variants for row in variant.rows} == {certificate.accuracy}


def test_the_certificate_says_how_confidence_was_calibrated(run: Path, own_repository: Path) -> None:
    """As metrics.json does; verifying recomputes it from the answers."""
    version = own_repository / "digits" / "1"
    certificate = manifest.read(version).certificate
    metrics = json.loads((run / "metrics.json").read_text())
    assert certificate.temperature == metrics["calibration"]["temperature"]
    assert certificate.calibration_error == pytest.approx(metrics["calibration_error"], abs=0.003)
    assert certificate.uncalibrated_error == pytest.approx(metrics["calibration"]["error_before"], abs=0.003)
    assert "uncalibrated" in parity.describe(certificate)
    edit_manifest(version, lambda content: content["certificate"].update(uncalibrated_error=0.5))
    with pytest.raises(CheckFailed, match=r"calibration error of 0\.5000 before .* by its answers in .* it was 0\."):
        verify(version)


def test_the_onnx_file_has_the_names_that_clients_use(repository: Path) -> None:
    """Input `image`, output `probabilities`, and one free axis called `batch`."""
    graph = onnx.load(repository / "digits" / "1" / "model.onnx").graph
    for values, name in ((graph.input, "image"), (graph.output, "probabilities")):
        assert [value.name for value in values] == [name]
        first, *others = values[0].type.tensor_type.shape.dim
        assert first.dim_param == "batch"
        assert all(dimension.dim_value > 0 for dimension in others)


def test_the_graph_is_clean(repository: Path) -> None:
    """Normalisation is part of the convolutions, the layout changes once, and labels travel with the file."""
    model = onnx.load(repository / "digits" / "1" / "model.onnx")
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["Conv"] == 6  # the stem, two blocks of two, and one shortcut
    assert kinds["Transpose"] == 1
    assert not kinds.keys() & {"BatchNormalization", "Identity", "Reshape", "Sub", "Div"}
    assert kinds["Squeeze"] == kinds["GlobalAveragePool"] == 1  # pooling keeps two axes of length 1
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(properties["labels"]) == [str(digit) for digit in range(10)]
    assert "tf2onnx" in properties["producer"]


def test_the_manifest_says_what_the_graph_costs(repository: Path) -> None:
    """Counted by hand: a 7x7/2 stem, pooling, a block of 8 filters, and one of 16 at half the size."""
    cost = manifest.read(repository / "digits" / "1").cost
    stem, first = 16 * 16 * 8 * 7 * 7 * 3, 2 * 8 * 8 * 8 * 3 * 3 * 8
    second = 4 * 4 * 16 * (3 * 3 * 8 + 3 * 3 * 16 + 8)
    assert cost.multiply_adds == stem + first + second + 16 * 10
    assert cost.nodes < cost.nodes_converted
    assert 6_000 < cost.parameters < 6_500
    assert cost.bytes == (repository / "digits" / "1" / "model.onnx").stat().st_size


@pytest.mark.slow
def test_variants_of_lower_precision_are_proved_too(
    run: Path, tmp_path: Path, heldout: tuple[NDArray[np.uint8], NDArray[np.int32]], capsys: pytest.CaptureFixture[str]
) -> None:
    """fp16 and int8 take and give what fp32 does, lose no more accuracy than allowed, and verify again."""
    model = tmp_path / "models" / "digits"
    assert (
        cli.main(
            [
                "export",
                str(run),
                "--to",
                str(model),
                "--precision",
                "fp32,fp16,int8",
                "--int8-drop=5",
                "--evidence=point",
            ]
        )
        == 0
    )
    certificate = manifest.read(model / "1").certificate
    assert [variant.name for variant in certificate.variants] == ["onnx", "saved_model", "onnx-fp16", "onnx-int8"]
    images, labels = heldout
    for variant in certificate.variants[2:]:
        path = model / "1" / variant.path
        kernels = [value for value in onnx.load(path).graph.initializer if len(value.dims) == 4]
        assert len(kernels) == 6
        expected = onnx.TensorProto.FLOAT16 if variant.precision == "fp16" else onnx.TensorProto.INT8
        assert {kernel.data_type for kernel in kernels} == {expected}
        answers = formats.load(model / "1", variant)(images)
        assert answers.dtype == np.float32
        assert np.mean(answers.argmax(axis=1) == labels) == variant.rows[-1].accuracy
        assert certificate.accuracy - variant.rows[-1].accuracy <= (variant.budget.accuracy_drop or 0) + 1e-9
        assert variant.speedup.keys() == {1, 32}
        assert variant.method
    capsys.readouterr()
    assert cli.main(["verify", str(model)]) == 0
    assert "int8, allowed 5 points less accuracy as measured" in capsys.readouterr().out


def test_a_variant_that_loses_too_much_is_left_out(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here it is another model: the rest is published, and the exit code is 1."""
    other = Reduction("other", lambda _, path: path.write_bytes((tmp_path / "other.onnx").read_bytes()))
    monkeypatch.setattr(precision, "list_reductions", lambda *_: [other])
    trained = source.load(run)
    kernel = trained.model.get_layer("stem_conv").kernel
    kernel.assign(-kernel.numpy())
    onnx_format.write(trained.model, {}, tmp_path / "other.onnx", OPSET)
    model = tmp_path / "models" / "digits"
    assert cli.main(["export", str(run), "--to", str(model), "--precision", "int8"]) == 1
    error = capsys.readouterr().err
    assert re.search(
        r"published without int8: the accuracy of onnx-int8 .* points below Keras'.*; 0.5 are allowed", error
    )
    assert [variant.name for variant in manifest.read(model / "1").certificate.variants] == ["onnx", "saved_model"]
    assert not (model / "1" / "model.int8.onnx").exists()


def test_int8_needs_training_images(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And an unknown precision is one sentence."""
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    (folder / "calibration.npz").unlink()
    to = str(tmp_path / "models" / "digits")
    assert cli.main(["export", str(folder), "--to", to, "--precision", "int8"]) == 2
    assert "no training images beside it to calibrate int8 with" in capsys.readouterr().err
    assert cli.main(["export", str(folder), "--to", to, "--precision", "fp32,fp8"]) == 2
    assert "--precision must be one of fp32, fp16, int8, not 'fp8'" in capsys.readouterr().err
    assert not (tmp_path / "models").exists()


WITHOUT_OUR_CODE = {
    "onnx": """
import onnxruntime
session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
answers = session.run(["probabilities"], {"image": images})[0]
""",
    "saved_model": """
import tensorflow as tf
answers = tf.saved_model.load(".").signatures["serving_default"](image=tf.constant(images))["probabilities"].numpy()
""",
}


@pytest.mark.slow
def test_the_files_need_none_of_our_code(
    repository: Path, heldout: tuple[NDArray[np.uint8], NDArray[np.int32]], tmp_path: Path
) -> None:
    """TensorFlow and onnxruntime alone, in processes of their own, answer as the original does."""
    version = repository / "digits" / "1"
    expected = original.load(version / "model.keras")(heldout[0])
    for name, body in WITHOUT_OUR_CODE.items():
        target = tmp_path / f"{name}.npy"
        script = (
            f"import sys, numpy as np\nimages = np.load('reference.npz')['images']\n{body}\n"
            f"assert not sys.modules.keys() & {{'resnet', 'export', 'training', 'serving'}}\n"
            f"np.save({str(target)!r}, answers)"
        )
        subprocess.run([sys.executable, "-Ic", script], cwd=version, check=True)
        np.testing.assert_allclose(np.load(target), expected, atol=1e-5)


def test_each_export_is_the_next_version(run: Path, own_repository: Path) -> None:
    """Earlier versions stay; gaps are not filled."""
    (own_repository / "digits" / "1").rename(own_repository / "digits" / "7")
    assert export(source.load(run), own_repository / "digits") == own_repository / "digits" / "8"
    assert repository.versions(own_repository / "digits") == [7, 8]


def test_a_model_that_computes_something_else_is_not_published(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One weight off by a thousandth breaks the budget: exit code 1, and nothing remains."""

    def to_wrong_onnx(model: keras.Model, *rest: Any) -> Cost:
        kernel = model.get_layer("probabilities").kernel
        right = kernel.numpy()
        kernel.assign(right * 1.001)
        cost = to_onnx(model, *rest)
        kernel.assign(right)
        return cost

    to_onnx = onnx_format.write
    monkeypatch.setattr(onnx_format, "write", to_wrong_onnx)
    with pytest.raises(BudgetError, match="largest difference of onnx at batch size 1"):
        export(source.load(run), tmp_path / "models" / "digits")
    assert not list((tmp_path / "models" / "digits").iterdir())
    assert cli.main(["export", str(run), "--to", str(tmp_path / "models" / "digits")]) == 1
    assert "gives other answers than the original" in capsys.readouterr().err


def test_an_export_needs_tensorflow_whatever_the_shell_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that was set for a training is not that of the formats."""
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    assert cli.main(["export", str(tmp_path / "nowhere"), "--to", str(tmp_path / "models" / "m")]) == 2
    assert os.environ["KERAS_BACKEND"] == "tensorflow"


def test_a_model_that_its_libraries_cannot_convert_is_one_sentence(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the reason, but without a traceback of theirs; a file that they cannot load is another."""

    def crash(*_: Any) -> Cost:
        raise KeyError("shape\nand the rest of a trace")

    write = onnx_format.write
    monkeypatch.setattr(onnx_format, "write", crash)
    arguments = ["export", str(run), "--to", str(tmp_path / "models" / "digits")]
    assert cli.main(arguments) == 2
    assert "the model cannot be converted to onnx (KeyError: 'shape" in capsys.readouterr().err

    def write_nonsense(*arguments: Any) -> Cost:
        cost = write(*arguments)
        arguments[2].write_bytes(b"nonsense")
        return cost

    monkeypatch.setattr(onnx_format, "write", write_nonsense)
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert "onnx cannot be loaded: " in error
    assert "Traceback" not in error
    assert not list((tmp_path / "models" / "digits").iterdir())


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


def test_a_number_that_another_export_takes_leaves_nothing_behind(tmp_path: Path) -> None:
    """All that names the version is written again: hashes, attestations and manifest are those of the next number."""

    def publish_late(staged: Path, finish: Callable[[int], None]) -> Path:
        def finish_late(version: int) -> None:
            finish(version)
            if version == 1:
                (staged.parent / "1" / "variables").mkdir(parents=True)

        return repository.publish(staged, finish_late)

    version = export(make_source(classifier()), tmp_path / "models" / "colors", publish=publish_late)
    assert version.name == "2"
    recorded = manifest.read(version)
    assert not list(inspection.find_problems(version, recorded))
    for name in (attestation.TEST_RESULT, attestation.CERTIFICATE):
        statement = json.loads((version / name).read_text())
        subjects = {subject["name"]: subject["digest"]["sha256"] for subject in statement["subject"]}
        assert subjects.keys() == recorded.files.keys() - {attestation.TEST_RESULT, attestation.CERTIFICATE}
        assert subjects.items() <= recorded.files.items()
    assert statement["predicate"]["version"] == 2


@pytest.mark.parametrize("name", ["..", ".hidden", "a b", "ä"])
def test_names_that_no_url_or_folder_should_have_are_refused(run: Path, tmp_path: Path, name: str) -> None:
    """The name is the last part of the path."""
    with pytest.raises(BadInput, match="the model name .* is invalid; use letters"):
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
        r"takes float32 \[batch, 32, 32, 3\] instead of uint8 pixels; name its preprocessing with --preprocess",
    ),
    "two channels": (lambda: model((32, 32, 2)), r"takes uint8 \[batch, 32, 32, 2\]"),
    "no softmax": (lambda: model(activation="linear"), "does not end in probabilities.* --logits appends a softmax"),
    "one output": (lambda: model(outputs=1, activation="sigmoid"), "has 1 output, but there are 10 class names"),
    "other classes": (lambda: model(outputs=7), "has 7 outputs, but there are 10 class names"),
    "other size": (
        lambda: model((16, 16, 3)),
        r"takes images of shape \[16, 16, 3\], but the held-out images have \[32, 32, 3\]",
    ),
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
    recorded = manifest.read(version)
    assert recorded.training is None
    assert recorded.certificate.images == 360


def test_what_is_no_model_is_refused(run: Path, tmp_path: Path) -> None:
    """A missing path, an unfinished run, a file of something else, a model without evidence."""
    with pytest.raises(BadInput, match="does not exist"):
        source.load(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="holds no model.keras; finish its training"):
        source.load(tmp_path)
    (tmp_path / "text.keras").write_text("no model")
    with pytest.raises(BadInput, match="is not a .keras file, or a damaged one; save or copy it again"):
        source.load(tmp_path / "text.keras")
    (tmp_path / "empty.keras").touch()
    with pytest.raises(BadInput, match="empty.keras is empty; save the model again"):
        source.load(tmp_path / "empty.keras")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "saved_model.pb").touch()
    with pytest.raises(BadInput, match=r"is a SavedModel, which has no layers; save the model with model.save"):
        source.load(tmp_path / "saved")
    shutil.copy(run / "model.keras", tmp_path / "alone.keras")
    with pytest.raises(BadInput, match="name a data set with --data"):
        source.load(tmp_path / "alone.keras")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("heldout.npz", "the held-out images in .*run cannot be read"),
        ("calibration.npz", "the held-out images in .*run cannot be read"),
        ("metrics.json", "metrics.json is invalid"),
    ],
)
def test_a_broken_file_of_a_run_is_named(run: Path, tmp_path: Path, name: str, message: str) -> None:
    """A copy that was cut short is one sentence."""
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    (folder / name).write_bytes((folder / name).read_bytes()[:100])
    with pytest.raises(BadInput, match=message):
        source.load(folder)


def test_verify_recomputes_the_certificate(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 0, and the table; who asks for code that nobody signed is warned."""
    for options in ([], ["--full"]):
        assert cli.main(["verify", str(repository / "digits"), *options]) == 0
        captured = capsys.readouterr()
        assert "files of" in captured.out
        assert "digits/1 is verified" in captured.out
        assert ("warning: " in captured.err) == bool(options)


def test_verify_finds_what_was_changed(own_repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file, a figure of the certificate, or the number of a version: exit code 1; a broken manifest: 2."""
    version = own_repository / "digits" / "1"
    edit_manifest(version, lambda content: content["certificate"].update(accuracy=0.999), forge=False)
    assert cli.main(["verify", str(version.parent)]) == 2
    assert "manifest.json was edited" in capsys.readouterr().err
    edit_manifest(version, lambda _: None)
    assert cli.main(["verify", str(version.parent)]) == 1
    assert "the figures of onnx at batch size 1 contradict each other" in capsys.readouterr().err

    with (version / "model.onnx").open("ab") as file:
        file.write(b"x")
    (version / "labels.txt").unlink()
    assert cli.main(["verify", str(version.parent)]) == 1
    message = capsys.readouterr().err
    assert "model.onnx is not the file that was exported" in message
    assert "labels.txt is missing" in message

    (version / "manifest.json").write_text('{"format": 3}')
    assert cli.main(["verify", str(version.parent)]) == 2
    assert "is not a valid manifest" in capsys.readouterr().err
    assert cli.main(["verify", str(version.parent), "--version", "4"]) == 2
    assert "has no version 4; it has [1]" in capsys.readouterr().err
    assert cli.main(["verify", str(own_repository / "nothing")]) == 2
    assert "nothing does not exist" in capsys.readouterr().err


MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "other version": (lambda content: content.update(version=2), "belongs to digits/2, not to digits/1"),
    "other format": (lambda content: content.update(format=9), "has format 9, this version of resnet reads 3"),
    "labels": (lambda content: content.update(labels=["a"]), "names 1 labels for 10 outputs"),
    "unknown field": (lambda content: content.update(extra=1), "unknown field `extra`"),
    "wrong type": (lambda content: content.update(opset="18"), r"Expected `int`, got `str` - at `\$.opset`"),
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_broken_manifest_is_refused(kind: str, own_repository: Path) -> None:
    """The message names the file and what is wrong with it."""
    change, message = MANIFESTS[kind]
    version = own_repository / "digits" / "1"
    edit_manifest(version, change)
    with pytest.raises(BadInput, match=message):
        manifest.read(version)
