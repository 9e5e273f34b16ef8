"""Faults of a version that is published, planted one by one: `resnet verify` and the server name what does not hold.

Forgers put hashes and digest right, as anyone can; only a signature shows who made a version.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import msgspec
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from export import manifest, reference
from export.certificate import Budget, Variant
from export.half import RangeError
from export.parity import BudgetError
from export.verification import verify
from resnet import BadInput, CheckFailed
from serving.models import loader
from tests.conftest import edit_manifest
from tests.versions import Content, make_row

Plant = Callable[[Path], object]


@pytest.fixture
def version(reduced: Path, tmp_path: Path) -> Path:
    """A copy of a version with fp32, fp16 and int8."""
    shutil.copytree(reduced.parent, tmp_path / "digits")
    return tmp_path / "digits" / "1"


def forge(change: Callable[[Content], object]) -> Plant:
    """Return a change of the certificate that puts the digest right, too."""
    return lambda version: edit_manifest(version, lambda content: change(content["certificate"]))


def list_hashes(version: Path) -> None:
    """Put the hashes and the digest of the manifest right."""
    edit_manifest(version, lambda content: content.update(files=manifest.hash_files(version)))


def replace(name: str, change: Callable[[Path], None]) -> Plant:
    """Return a change of a file that puts its hash and the digest right, too."""

    def plant(version: Path) -> None:
        change(version / name)
        list_hashes(version)

    return plant


def replace_reference(change: Callable[[reference.Reference], reference.Reference]) -> Plant:
    """Return a change of reference.npz that puts the hashes right, too."""

    def plant(version: Path) -> None:
        change(reference.load(version, manifest.read(version))).write(version / reference.NAME)
        list_hashes(version)

    return plant


def edit_row(variant: int, **changes: Any) -> Plant:
    """Return a change of figures of a variant at batch size 1."""
    return forge(lambda certificate: certificate["variants"][variant]["rows"][0].update(changes))


def truncate(version: Path) -> None:
    """Lose the end of a file."""
    path = version / "model.onnx"
    path.write_bytes(path.read_bytes()[:-1000])


def link(version: Path) -> None:
    """Put a link to the same content in the place of a file."""
    (version / "labels.txt").rename(version.parent / "elsewhere.txt")
    (version / "labels.txt").symlink_to("../elsewhere.txt")


def scale_weights(factor: float) -> Callable[[Path], None]:
    """Return a change of a graph: its first kernel has other values."""

    def change(path: Path) -> None:
        graph = onnx.load(path)
        tensor = next(tensor for tensor in graph.graph.initializer if len(tensor.dims) == 4)
        weights = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array((weights * weights.dtype.type(factor)), tensor.name))
        onnx.save(graph, path)

    return change


def exchange_classes(path: Path) -> None:
    """Give each class the probability of the next."""
    model = onnx.load(path)
    (last,) = (node for node in model.graph.node if node.output[0] == "probabilities")
    last.output[0] = "right"
    model.graph.initializer.append(numpy_helper.from_array(np.roll(np.arange(10), 1), "order"))
    model.graph.node.append(onnx.helper.make_node("Gather", ["right", "order"], ["probabilities"], axis=1))
    onnx.save(model, path)


def save_lambda(path: Path) -> None:
    """Put a model in the place of this one that holds code of its own."""
    keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Lambda(lambda x: x)]).save(path)


def train_on(path: Path) -> None:
    """Put a model in the place of this one that was trained for longer."""
    model = keras.models.load_model(path, compile=False)
    kernel = model.get_layer("probabilities").kernel
    kernel.assign(kernel.numpy() * 1.001)
    model.save(path)


def leave_out_an_image(stored: reference.Reference) -> reference.Reference:
    """Return a reference without its first image."""
    predictions = {name: classes[1:] for name, classes in stored.predictions.items()}
    return reference.make(stored.images[1:], stored.labels[1:], stored.probabilities[1:], predictions)


def swap_answers(stored: reference.Reference) -> reference.Reference:
    """Return a reference with the answers to other images of the same classes: Keras is as often right."""
    answers = stored.probabilities.copy()
    right = np.flatnonzero((answers.argmax(axis=1) == stored.labels) & (stored.labels == 3))
    answers[right] = np.roll(answers[right], 1, axis=0)
    return stored._replace(probabilities=answers)


def predict_otherwise(stored: reference.Reference) -> reference.Reference:
    """Return a reference in which int8 gave other wrong answers: it lost and gained as many images."""
    classes = stored.predictions["onnx-int8"].copy()
    wrong = (classes != stored.labels) & (stored.probabilities.argmax(axis=1) != stored.labels)
    classes[wrong] = (stored.labels[wrong] + 1 + (classes[wrong] == (stored.labels[wrong] + 1) % 10)) % 10
    return stored._replace(predictions={**stored.predictions, "onnx-int8": classes})


def predict_better(stored: reference.Reference) -> reference.Reference:
    """Return a reference in which int8 is always right: a better model."""
    return stored._replace(predictions={**stored.predictions, "onnx-int8": stored.labels.astype(np.int32)})


def claim_accuracy(certificate: Content) -> None:
    """Claim that every variant is always right."""
    for variant in certificate["variants"]:
        for row in variant["rows"]:
            row["accuracy"] = 1.0


def belong_to_another_model(certificate: Content) -> None:
    """Be the certificate of a model that is right on ten images more, of which its variants lose none."""
    images = certificate["images"]
    certificate["accuracy"] += 10 / images
    for variant in certificate["variants"]:
        for row in variant["rows"]:
            figures = msgspec.to_builtins(make_row(row["batch_size"], images=images))
            row.update(figures, accuracy=certificate["accuracy"])


IN_SIGHT: dict[str, tuple[Plant, type[Exception], str]] = {
    "a truncated file": (truncate, CheckFailed, "model.onnx is not the file that was exported"),
    "a missing file": (lambda version: (version / "labels.txt").unlink(), CheckFailed, "labels.txt is missing"),
    "an added file": (
        lambda version: (version / "assets" / "words.txt").touch(),
        CheckFailed,
        "assets/words.txt' was added after the export, remove it",
    ),
    "a hidden file": (
        lambda version: (version / ".profile").touch(),
        CheckFailed,
        ".profile' was added after the export, remove it",
    ),
    "an added link": (
        lambda version: (version / "more").symlink_to("/etc"),
        CheckFailed,
        "more' is a link, which a version may not hold",
    ),
    "a link in place of a file": (link, CheckFailed, r"labels.txt cannot be read \(not a regular file\)"),
    "an edited certificate": (
        lambda version: edit_manifest(version, lambda content: claim_accuracy(content["certificate"]), forge=False),
        BadInput,
        "was edited: its digest differs",
    ),
    "an edited manifest": (
        lambda version: edit_manifest(version, lambda content: content["labels"].reverse(), forge=False),
        BadInput,
        "was edited: its digest differs",
    ),
    "a model of another class count": (
        lambda version: edit_manifest(version, lambda content: content["labels"].append("ten")),
        BadInput,
        "names 11 labels for 10 outputs",
    ),
    "the manifest of another version": (
        lambda version: edit_manifest(version, lambda content: content.update(version=2)),
        BadInput,
        "belongs to digits/2, not to digits/1",
    ),
    "a better accuracy": (
        forge(claim_accuracy),
        CheckFailed,
        "the figures of onnx at batch size 1 contradict each other: 0 lost and 0 gained",
    ),
    "a better original": (
        forge(lambda certificate: certificate.update(accuracy=0.999)),
        CheckFailed,
        "the figures of onnx at batch size 1 contradict each other: 0 lost and 0 gained",
    ),
    "a lost image that is not counted": (
        edit_row(3, lost=0, gained=9),
        CheckFailed,
        "the figures of onnx-int8 at batch size 1 contradict each other: 0 lost and 9 gained of 360 images",
    ),
    "a bound that is too low": (
        edit_row(3, drop_bound=0.0),
        CheckFailed,
        "the figures of onnx-int8 at batch size 1 contradict each other",
    ),
    "a difference above its limit": (
        edit_row(0, max_difference=2e-5),
        CheckFailed,
        "the largest difference of onnx at batch size 1 is 2e-05, above 1e-05",
    ),
    "a budget without limits": (
        forge(lambda certificate: certificate["variants"][0].update(budget={"tie": 1e-5})),
        CheckFailed,
        "onnx has no budget",
    ),
    "a budget that the images cannot show": (
        forge(lambda certificate: certificate["variants"][2]["budget"].update(evidence="bound")),
        CheckFailed,
        "the 360 held-out images do not show that onnx-fp16 loses at most 0.2 points of accuracy: 0 lost and 0 gained",
    ),
    "a format left out": (
        forge(lambda certificate: certificate["variants"].pop(1)),
        CheckFailed,
        "there are no comparisons for saved_model",
    ),
    "a variant without figures": (
        forge(lambda certificate: certificate["variants"][3].update(rows=[])),
        CheckFailed,
        "there are no comparisons for onnx-int8",
    ),
    "a certificate of no images": (
        forge(lambda certificate: certificate.update(images=0)),
        CheckFailed,
        "it was made without images",
    ),
    "a count below zero": (edit_row(3, lost=-1), BadInput, "is not a valid manifest .*lost"),
}

RECOMPUTED: dict[str, tuple[Plant, type[Exception], str]] = {
    "another graph": (
        replace("model.onnx", scale_weights(1.01)),
        BudgetError,
        "the largest difference of onnx at batch size 1 is .*, above 1e-05",
    ),
    "a worse int8 graph": (
        replace("model.int8.onnx", exchange_classes),
        BudgetError,
        "the accuracy of onnx-int8 at batch size 1 is .* points below Keras'.*; 5 are allowed",
    ),
    "an fp16 graph whose values overflow": (
        replace("model.fp16.onnx", scale_weights(60_000)),
        RangeError,
        "the value '.*' exceeds 65,504",
    ),
    "a graph that is none": (
        replace("model.onnx", lambda path: path.write_bytes(b"graph") and None),
        CheckFailed,
        "model.onnx is not an ONNX file",
    ),
    "other images": (
        replace_reference(leave_out_an_image),
        CheckFailed,
        "is about other held-out images than those of .*reference.npz",
    ),
    "answers to other images": (
        replace_reference(swap_answers),
        BudgetError,
        "the largest difference of onnx at batch size 1 is .*, above 1e-05",
    ),
    "answers that are none": (
        replace_reference(lambda stored: stored._replace(probabilities=np.full_like(stored.probabilities, np.nan))),
        CheckFailed,
        "the certificate gives Keras an accuracy of .*, but its answers in .*reference.npz have one of ",
    ),
    "a certificate of another model": (
        forge(belong_to_another_model),
        CheckFailed,
        "the certificate gives Keras an accuracy of .*, but its answers in .*reference.npz have one of ",
    ),
    "answers of a better int8 model": (
        replace_reference(predict_better),
        CheckFailed,
        "says that onnx-int8 lost .* images and gained .*, but by its answers in .*reference.npz it lost 0 and gained",
    ),
    "answers of another int8 model": (
        replace_reference(predict_otherwise),
        CheckFailed,
        "onnx-int8 gives .* of the images another class than when it was certified",
    ),
    "no answers of fp16": (
        replace_reference(lambda stored: stored._replace(predictions={"onnx-int8": stored.predictions["onnx-int8"]})),
        CheckFailed,
        "reference.npz holds no answers of onnx-fp16",
    ),
}

RUN_IN_FULL: dict[str, tuple[Plant, type[Exception], str]] = {
    "another original": (
        replace("model.keras", train_on),
        CheckFailed,
        "reference.npz does not hold the answers of the Keras original, which differ by up to ",
    ),
    "code in the original": (
        replace("model.keras", save_lambda),
        BadInput,
        "a model of .* cannot be loaded",
    ),
    "an original that is none": (
        replace("model.keras", lambda path: path.write_bytes(b"model") and None),
        BadInput,
        "a model of .* cannot be loaded",
    ),
}


@pytest.mark.parametrize("fault", IN_SIGHT)
def test_a_fault_in_sight_is_neither_verified_nor_served(fault: str, version: Path) -> None:
    """Nothing is run to find it."""
    plant, error, message = IN_SIGHT[fault]
    plant(version)
    with pytest.raises(error, match=message):
        verify(version)
    with pytest.raises(BadInput, match=message):
        loader.read_checked(version, None)


@pytest.mark.parametrize("fault", RECOMPUTED)
def test_a_forgery_is_not_verified(fault: str, version: Path) -> None:
    """By what the ONNX files answer, and what the reference holds."""
    plant, error, message = RECOMPUTED[fault]
    plant(version)
    with pytest.raises(error, match=message):
        verify(version)


@pytest.mark.slow
@pytest.mark.parametrize("fault", RUN_IN_FULL)
def test_a_forged_original_is_not_verified_in_full(fault: str, version: Path) -> None:
    """Without --full it is not run."""
    plant, error, message = RUN_IN_FULL[fault]
    plant(version)
    verify(version)
    with pytest.raises(error, match=message):
        verify(version, full=True)


@pytest.mark.slow
def test_the_version_without_a_fault_is_verified_and_served(version: Path) -> None:
    """Every fault above is one of a version that holds."""
    assert verify(version, full=True) == loader.read_checked(version, None)


def test_an_allowance_of_one_s_own_is_a_budget_all_the_same() -> None:
    """Any limit makes a budget, none makes none."""
    bare = Variant("onnx", "model.onnx", "fp32", "", Budget(), [], {})
    assert "onnx has no budget" in list(bare.violations(1, 1.0))
    limited = msgspec.structs.replace(bare, budget=Budget(accuracy_drop=0.1))
    assert "onnx has no budget" not in list(limited.violations(1, 1.0))
