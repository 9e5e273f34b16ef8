"""The certificate that `resnet verify` recomputes: of which files, in which arithmetic, and how near it must be."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import onnx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

import export
from export import formats, half, manifest, parity, reference, session, signature
from export.certificate import Budget, Variant
from export.parity import BudgetError, Predict
from export.reference import Reference
from export.verification import verify
from resnet import BadInput, CheckFailed
from tests.conftest import edit_manifest
from tests.versions import Content, list_file, make_graph, make_row, write_version

NOTE = "compared with the recorded answers of the Keras original; --full runs it, and the SavedModel"


@pytest.fixture
def small_network() -> None:
    """Nothing is trained here."""


@pytest.fixture
def version(tmp_path: Path) -> Path:
    """The folder of a version, with an archive in the place of the Keras original."""
    folder = write_version(tmp_path / "models" / "colors" / "1")
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("config.json", "{}")
    list_file(folder, "model.keras", file.getvalue())
    list_file(folder, "saved_model.pb", b"graph")
    (folder / "variables").mkdir()
    list_file(folder, "variables/variables.index", b"weights")
    return folder


def add_variant(version: Path, name: str, graph: onnx.ModelProto, arithmetic: str = "") -> None:
    """Add a variant that is said to lose nothing, to a version."""
    rows = [make_row(size) for size in parity.BATCH_SIZES]
    budget = Budget(accuracy_drop=0.01, evidence="point")
    added = Variant(f"onnx-{name}", f"model.{name}.onnx", name, "", budget, rows, {}, arithmetic)
    edit_manifest(version, lambda content: content["certificate"]["variants"].append(msgspec.to_builtins(added)))
    list_file(version, added.path, graph.SerializeToString())
    stored = load(version)
    record(version, stored._replace(predictions={**stored.predictions, added.name: stored.labels}))


def load(version: Path) -> Reference:
    """Return the reference of a version."""
    return reference.load(version, manifest.read(version))


def record(version: Path, stored: Reference) -> None:
    """Put another reference into a version, with its hash."""
    stored.write(version / reference.NAME)
    list_file(version, reference.NAME, (version / reference.NAME).read_bytes())


def invert() -> onnx.ModelProto:
    """Return a graph that never names the right colour."""
    model = make_graph()
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(-np.eye(3, dtype=np.float32), "weights"))
    return model


def make_half(factor: float) -> onnx.ModelProto:
    """Return a graph like that of `make_graph`, but in half precision, whose pixels are scaled."""
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT16),
        helper.make_node("Mul", ["pixels", "factor"], ["scaled"]),
        helper.make_node("Cast", ["scaled"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["wide"], ["means"], axes=[1, 2], keepdims=0),
        helper.make_node("Softmax", ["means"], ["probabilities"], axis=1),
    ]
    like = make_graph().graph
    factors = [numpy_helper.from_array(np.float16(factor), "factor")]
    graph = helper.make_graph(nodes, "half", list(like.input), list(like.output), factors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_what_was_verified_is_told_and_returned(version: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The signature, the files, the recorded certificate, and what was not compared, in this order."""
    recorded = verify(version)
    assert recorded == manifest.read(version)
    name = f"{version.parent.name}/{version.name}"
    unchanged = f"the 5 files of {name} are unchanged"
    lines = [line for line in capsys.readouterr().out.splitlines() if "━" not in line]  # the progress
    run = [variant for variant in recorded.certificate.variants if variant.name == "onnx"]
    certificate = msgspec.structs.replace(recorded.certificate, variants=run)
    assert lines == [unchanged, *parity.describe(certificate).splitlines(), NOTE]
    key = ec.generate_private_key(ec.SECP256R1())
    signature.sign(version, key)
    assert verify(version, key.public_key()) == recorded
    printed = capsys.readouterr()
    assert printed.out.splitlines()[:2] == [f"{name} is signed by the trusted key", unchanged]
    assert "--trust" not in printed.err


def test_each_file_that_was_changed_is_named(version: Path) -> None:
    """In one sentence."""
    (version / "model.keras").unlink()
    (version / "variables" / "variables.index").write_bytes(b"others")
    with pytest.raises(CheckFailed) as caught:
        verify(version)
    assert str(caught.value) == (
        f"{version}/model.keras is missing; "
        f"{version}/variables/variables.index is not the file that was exported (its SHA-256 differs)"
    )


def set_rows(**changes: float) -> Callable[[Content], None]:
    """Return a change of all figures of the certificate of `onnx`."""

    def change(content: Content) -> None:
        for row in content["certificate"]["variants"][0]["rows"]:
            row.update(changes)

    return change


def test_the_recorded_certificate_must_hold(version: Path) -> None:
    """Even if the models that are run answer as they should."""
    edit_manifest(version, set_rows(max_difference=0.5))
    with pytest.raises(BudgetError, match="the largest difference of onnx at batch size 1 is 0.5, above 1e-05"):
        verify(version)


def lose(lost: int, images: int = 6, *others: str) -> Callable[[Content], None]:
    """Return a change of the certificate: of so many images `onnx` and others lose these, and the original none."""

    def change(content: Content) -> None:
        variants = [variant for variant in content["certificate"]["variants"] if variant["name"] in ("onnx", *others)]
        for row in (row for variant in variants for row in variant["rows"]):
            figures = make_row(row["batch_size"], 1 - lost / images, images)
            row.update({name: getattr(figures, name) for name in ("accuracy", "lost", "drop_bound")})

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["certificate"].update(images=7), "onnx .* contradict each other: .* of 7 images"),
        (lambda content: content["certificate"].update(images_sha256="0"), "about other held-out images than those of"),
        (lambda content: content["certificate"].update(accuracy=0.8), "onnx .* contradict each other: 0 lost and 0"),
        (set_rows(accuracy=0.8), "onnx at batch size 1 contradict each other: 0 lost and 0 gained"),
        (lose(2), "gives onnx at batch size 1 an accuracy of 66.67%, but it is 100.00%"),
        (
            lambda content: content["certificate"]["variants"][0]["rows"].pop(),
            "gives onnx at batch size 64 an accuracy of nan%, but it is 100.00%",
        ),
    ],
)
def test_each_figure_is_recomputed(change: Callable[[Content], object], message: str, version: Path) -> None:
    """An edit that has a digest of its own is found by what the models compute; so is a figure that was left out."""
    edit_manifest(version, change)
    with pytest.raises(CheckFailed, match=message):
        verify(version)


def repeat_images(version: Path, count: int) -> None:
    """Give a version `count` held-out images, all red and named so, with a certificate of them."""
    images, labels = np.zeros((count, 4, 4, 3), np.uint8), np.zeros(count, np.int32)
    images[..., 0] = 200
    record(version, reference.make(images, labels, np.repeat(load(version).probabilities[:1], count, axis=0)))
    digest = parity.hash_images(images, labels)
    edit_manifest(version, lambda content: content["certificate"].update(images=count, images_sha256=digest))
    edit_manifest(version, lose(0, count, "saved_model"))


@pytest.mark.parametrize(("count", "near", "far"), [(6, 1, 2), (1500, 1, 2), (100, 1, 2), (3000, 3, 4)])
def test_rounding_may_turn_one_image_or_one_of_a_thousand(count: int, near: int, far: int, version: Path) -> None:
    """Another machine rounds otherwise; more than that is another model."""
    repeat_images(version, count)
    edit_manifest(version, lose(near, count))
    verify(version)
    edit_manifest(version, lose(far, count))
    with pytest.raises(CheckFailed, match="the certificate gives onnx at batch size 1 an accuracy of"):
        verify(version)


def test_answers_of_a_variant_must_be_those_that_the_certificate_counts(version: Path) -> None:
    """They are there, lose what it says, and are nearly those that the file gives now."""
    repeat_images(version, 200)
    add_variant(version, "int8", make_graph())
    edit_manifest(version, lose(0, 200, "onnx-int8"))

    def lose_one(content: Content) -> None:
        """At batch size 3: the answers are those at batch size 1."""
        figures = make_row(3, 199 / 200, 200)
        row = content["certificate"]["variants"][2]["rows"][1]
        row.update({name: getattr(figures, name) for name in ("accuracy", "lost", "drop_bound")})

    edit_manifest(version, lose_one)
    verify(version)
    stored = load(version)
    for wrong, message in (
        (2, "onnx-int8 lost 0 images and gained 0, but by its answers in .*reference.npz it lost 2 and gained 0"),
        (0, "reference.npz holds no answers of onnx-int8"),
    ):
        predictions = stored.labels.copy()
        predictions[:wrong] = 1
        record(version, stored._replace(predictions={"onnx-int8": predictions} if wrong else {}))
        with pytest.raises(CheckFailed, match=message):
            verify(version)


def test_a_variant_may_answer_one_of_a_hundred_otherwise_on_another_machine(version: Path) -> None:
    """Here the original is wrong, and so are both answers of the variant: the accuracy is the same."""
    repeat_images(version, 200)
    add_variant(version, "int8", make_graph())
    stored = load(version)
    labels = np.full(200, 2, np.int32)
    digest = parity.hash_images(stored.images, labels)

    def certify(content: Content) -> None:
        content["certificate"].update(images_sha256=digest, accuracy=0.0)
        for variant in content["certificate"]["variants"]:
            for row in variant["rows"]:
                row.update(msgspec.to_builtins(make_row(row["batch_size"], images=200)), accuracy=0.0)

    edit_manifest(version, certify)
    for count in (2, 3):
        predictions = np.zeros(200, np.int32)
        predictions[:count] = 1
        record(version, stored._replace(labels=labels, predictions={"onnx-int8": predictions}))
        if count == 2:
            verify(version)
            continue
        with pytest.raises(CheckFailed, match="onnx-int8 gives 1.50% of the images another class than when it was"):
            verify(version)


def test_each_lower_precision_is_verified_where_only_onnxruntime_is(version: Path) -> None:
    """fp16 in the arithmetic of this machine, which the certificate that is printed does not say is another."""
    add_variant(version, "fp16", make_half(1.0), half.ARITHMETIC)
    add_variant(version, "int8", make_graph())
    code = """
import sys
for name in ("tensorflow", "keras", "onnx", "rich"):
    sys.modules[name] = None
from resnet import cli
sys.exit(cli.main(["verify", sys.argv[1]]))
"""
    done = subprocess.run([sys.executable, "-c", code, version.parent], capture_output=True, text=True, check=True)
    for name in ("onnx ", "onnx-fp16 ", "onnx-int8 "):
        assert len([line for line in done.stdout.splitlines() if line.startswith(f"  {name}")]) == 7
    assert half.ARITHMETIC not in done.stdout
    assert done.stdout.endswith("colors/1 is verified\n")


def test_each_onnx_file_is_run(version: Path) -> None:
    """Not only the one in full precision, which takes the place of the original, wherever it stands in the list."""
    add_variant(version, "int8", make_graph())
    verify(version)
    list_file(version, "model.int8.onnx", invert().SerializeToString())
    edit_manifest(version, lambda content: content["certificate"]["variants"].reverse())
    with pytest.raises(CheckFailed, match="the accuracy of onnx-int8 at batch size 1 is 0.00%, 100.00 points below"):
        verify(version)


def test_half_precision_is_run_in_the_arithmetic_of_its_certificate(version: Path) -> None:
    """The CPU computes it in fp32, in which nothing overflows."""
    add_variant(version, "fp16", make_half(1.0), half.ARITHMETIC)
    verify(version)
    list_file(version, "model.fp16.onnx", make_half(400.0).SerializeToString())
    with pytest.raises(half.RangeError, match="the value 'scaled' exceeds 65,504"):
        verify(version)
    broken = make_half(1.0)
    broken.graph.node[1].op_type = "Unheard"
    list_file(version, "model.fp16.onnx", broken.SerializeToString())
    with pytest.raises(BadInput, match="model.fp16.onnx cannot be loaded by onnxruntime: "):
        verify(version)


class OnnxLoader:
    """Loads each format by its ONNX file, and remembers what was in the folder that it was given."""

    def __init__(self, other: bytes = b"") -> None:
        """With the content of an ONNX file that a SavedModel runs in place of its own."""
        self.other = other
        self.seen: list[dict[str, bytes]] = []
        self.folders: list[Path] = []

    def load_original(self, path: Path) -> Predict:
        """In the place of `export.original.load`."""
        assert path.name == "model.keras"
        return self._load(path.parent, b"")

    def load(self, folder: Path, variant: Variant) -> Predict:
        """In the place of `export.formats.load`."""
        return self._load(folder, self.other if variant.name == "saved_model" else b"")

    def _load(self, folder: Path, content: bytes) -> Predict:
        self.folders.append(folder)
        paths = (path for path in folder.rglob("*") if path.is_file())
        self.seen.append({path.relative_to(folder).as_posix(): path.read_bytes() for path in paths})
        model = session.open_session(content or (folder / "model.onnx").read_bytes())

        def predict(images: NDArray[np.uint8]) -> parity.Probabilities:
            probabilities: parity.Probabilities = model.run(None, {"image": images})[0]
            return probabilities

        return predict

    def install(self, monkeypatch: pytest.MonkeyPatch) -> OnnxLoader:
        """Load with this in place of TensorFlow, until the end of the test."""
        monkeypatch.setattr(export, "original", SimpleNamespace(load=self.load_original), raising=False)
        monkeypatch.setattr(formats, "load", self.load)
        return self


def test_full_runs_every_format_from_a_copy_of_what_was_hashed(
    version: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The copy is outside of the repository, and gone afterwards. Code of a stranger runs only after a warning."""
    loader = OnnxLoader().install(monkeypatch)
    recorded = verify(version, full=True)
    files = {name: (version / name).read_bytes() for name in recorded.files}
    assert loader.seen == [files] * 3  # the original and two formats
    assert not any(folder.exists() or folder == version for folder in loader.folders)
    printed = capsys.readouterr()
    name = f"{version.parent.name}/{version.name}"
    assert f"warning: {name} was not checked against a key (--trust), and --full runs the code" in printed.err
    assert NOTE not in printed.out
    assert printed.out.endswith("  saved_model  fp32, allowed a difference of 1e-05 and 0.01 of logits\n")

    key = ec.generate_private_key(ec.SECP256R1())
    signature.sign(version, key)
    verify(version, key.public_key(), full=True)
    assert "warning" not in capsys.readouterr().err


def test_full_finds_a_format_that_answers_otherwise(version: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though nobody runs it without --full."""
    OnnxLoader(invert().SerializeToString()).install(monkeypatch)
    verify(version)
    with pytest.raises(BudgetError, match="6 of 6 predictions of saved_model at batch size 1 name another class"):
        verify(version, full=True)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError("truncated\nat line 3"), r"a model of {} cannot be loaded \(truncated\)"),
        (MemoryError(), r"a model of {} cannot be loaded \(MemoryError\)"),
        (BadInput("another reason"), "another reason"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_one_sentence(
    error: Exception, message: str, version: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the first line of the library's error, or the kind of it."""
    loader = OnnxLoader().install(monkeypatch)

    def fail(_: Path) -> Predict:
        raise error

    monkeypatch.setattr(loader, "load_original", fail)
    loader.install(monkeypatch)
    with pytest.raises(BadInput, match=f"^{message.format(re.escape(str(version)))}$"):
        verify(version, full=True)


def test_an_original_that_unpacks_to_more_than_the_memory_is_not_loaded(
    version: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its size is looked at first; so is whether it is an archive."""
    loader = OnnxLoader().install(monkeypatch)
    list_file(version, "model.keras", b"no archive")
    with pytest.raises(BadInput, match=r"cannot be loaded \(File is not a zip file\)"):
        verify(version, full=True)
    assert not loader.seen
