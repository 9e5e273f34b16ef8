"""Faults that real conversions and repositories have had, planted one by one: each is caught, with the right error."""

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
from numpy.typing import NDArray
from onnx import numpy_helper

from export import manifest, original, parity, source
from export.export import export
from export.formats import onnx as onnx_format
from export.formats import saved_model
from export.manifest import Variant
from export.parity import BudgetError, RunError, ShapeError
from export.verification import verify
from resnet import BadInput, CheckFailed
from tests.conftest import edit_manifest

Graph = onnx.GraphProto


@pytest.fixture(scope="module")
def images() -> NDArray[np.uint8]:
    """Coloured noise: on grey images nobody would see that red and blue are exchanged."""
    return np.random.default_rng(0).integers(256, size=(70, 32, 32, 3), dtype=np.uint8)


def nodes(graph: Graph, kind: str) -> list[onnx.NodeProto]:
    """Return the nodes of one operator."""
    return [node for node in graph.node if node.op_type == kind]


def rewrite(graph: Graph, name: str, change: Callable[[NDArray[Any]], NDArray[Any]]) -> None:
    """Change a constant of the graph."""
    (tensor,) = (tensor for tensor in graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(change(numpy_helper.to_array(tensor))), name))


def kernel(graph: Graph, place: int) -> str:
    """Return the name of the weights of a convolution."""
    return nodes(graph, "Conv")[place].input[1]


def dense(graph: Graph) -> str:
    """Return the name of the weights of the dense layer."""
    return (nodes(graph, "MatMul") + nodes(graph, "Gemm"))[0].input[1]


def shift_mean(graph: Graph) -> None:
    """Add to each bias what a mean of one grey level more would."""
    weights = next(tensor for tensor in graph.initializer if tensor.name == kernel(graph, 0))
    shift = numpy_helper.to_array(weights).sum(axis=(1, 2, 3)) / 255
    rewrite(graph, nodes(graph, "Conv")[0].input[2], lambda bias: (bias - shift).astype(np.float32))


def change_pads(graph: Graph) -> None:
    """Pad the stem on the other side, as another framework's SAME does."""
    for attribute in nodes(graph, "Conv")[0].attribute:
        if attribute.name == "pads":
            attribute.ints[:] = [*attribute.ints[2:], *attribute.ints[:2]]


def to_double(graph: Graph) -> None:
    """Answer in float64."""
    last = graph.node[-1]
    last.output[0] = "single"
    graph.node.append(onnx.helper.make_node("Cast", ["single"], ["probabilities"], to=onnx.TensorProto.DOUBLE))
    graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.DOUBLE


def fix_batch(graph: Graph) -> None:
    """Take one image only."""
    graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


def softmax_over(axis: int) -> Callable[[Graph], None]:
    """Return a change of the axis over which the probabilities sum to one."""

    def change(graph: Graph) -> None:
        (softmax,) = nodes(graph, "Softmax")
        del softmax.attribute[:]
        softmax.attribute.append(onnx.helper.make_attribute("axis", axis))

    return change


def fewer_classes(graph: Graph) -> None:
    """Lose the last class."""
    last = (nodes(graph, "MatMul") + nodes(graph, "Gemm"))[0]
    for name in last.input[1:]:
        rewrite(graph, name, lambda values: values[..., :-1])
    for tensor in graph.initializer:
        if list(tensor.dims) == [10]:
            rewrite(graph, tensor.name, lambda values: values[:-1])
    graph.output[0].type.tensor_type.shape.dim[1].dim_value = 9


CONVERSIONS: dict[str, tuple[Callable[[Graph], None], type[Exception]]] = {
    "a scale of 1/256": (
        lambda graph: rewrite(graph, nodes(graph, "Mul")[0].input[1], lambda scale: scale * np.float32(255 / 256)),
        BudgetError,
    ),
    "blue for red": (lambda graph: rewrite(graph, kernel(graph, 0), lambda w: w[:, ::-1]), BudgetError),
    "another mean": (shift_mean, BudgetError),
    "a dropped bias": (
        lambda graph: rewrite(graph, nodes(graph, "Conv")[1].input[2], np.zeros_like),
        BudgetError,
    ),
    "filters in another order": (lambda graph: rewrite(graph, kernel(graph, 2), lambda w: w[::-1]), BudgetError),
    "a kernel upside down": (lambda graph: rewrite(graph, kernel(graph, 1), lambda w: w[:, :, ::-1]), BudgetError),
    "rows for columns": (lambda graph: rewrite(graph, kernel(graph, 1), lambda w: w.swapaxes(2, 3)), BudgetError),
    "a transposed dense layer": (
        lambda graph: rewrite(graph, dense(graph), lambda w: w.T.reshape(w.shape)),
        BudgetError,
    ),
    "two classes exchanged": (
        lambda graph: rewrite(graph, dense(graph), lambda w: w[:, [1, 0, *range(2, 10)]]),
        BudgetError,
    ),
    "a weight that is no number": (
        lambda graph: rewrite(graph, kernel(graph, 3), lambda w: np.where(w == w.max(), np.float32(np.nan), w)),
        BudgetError,
    ),
    "weights of half precision": (
        lambda graph: rewrite(graph, kernel(graph, 0), lambda w: w.astype(np.float16).astype(np.float32)),
        BudgetError,
    ),
    "no activation": (lambda graph: setattr(nodes(graph, "Relu")[1], "op_type", "Identity"), BudgetError),
    "padding of another framework": (change_pads, BudgetError),
    "softmax over the batch": (softmax_over(0), BudgetError),
    "float64": (to_double, ShapeError),
    "a fixed batch axis": (fix_batch, RunError),
    "a class too few": (fewer_classes, ShapeError),
}


@pytest.mark.parametrize("fault", CONVERSIONS)
def test_a_faulty_conversion_is_caught(fault: str, repository: Path, tmp_path: Path, images: NDArray[np.uint8]) -> None:
    """The sound conversion passes the same comparison."""
    plant, error = CONVERSIONS[fault]
    version = repository / "digits" / "1"
    variants = {variant.name: variant for variant in manifest.read(version).certificate.variants}
    graph = onnx.load(version / "model.onnx")
    plant(graph.graph)
    onnx.save(graph, tmp_path / "model.onnx")
    reference, labels = original.load(version / "model.keras"), np.zeros(len(images), np.int32)
    saved_variant = (variants["saved_model"], saved_model.load(version))

    def prove(path: Path) -> None:
        onnx_variant = (variants["onnx"], onnx_format.load(path))
        parity.check(parity.certify(reference, [onnx_variant, saved_variant], images, labels))

    prove(version / "model.onnx")
    with pytest.raises(error):
        prove(tmp_path / "model.onnx")


def test_normalisation_in_training_mode_is_caught(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It uses the statistics of the batch: each answer then depends on its neighbours."""
    trained = source.load(run)
    call = trained.model.__class__.__call__
    to_onnx = onnx_format.write

    def wrong(*arguments: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(trained.model.__class__, "__call__", lambda self, x, **_: call(self, x, training=True))
            to_onnx(*arguments)

    monkeypatch.setattr(onnx_format, "write", wrong)
    with pytest.raises(BudgetError):
        export(trained, tmp_path / "models" / "digits")
    assert not list((tmp_path / "models" / "digits").iterdir())


def test_labels_in_another_order_are_caught(run: Path, tmp_path: Path) -> None:
    """The run's figures know them: by name, and by how many answers were right."""
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    names = (folder / "labels.txt").read_text().split()
    (folder / "labels.txt").write_text("".join(f"{name}\n" for name in [*names[1:], names[0]]))
    with pytest.raises(BadInput, match="labels.txt names other classes than metrics.json"):
        source.load(folder)
    (folder / "labels.txt").write_text("".join(f"{name}\n" for name in names))
    with np.load(folder / "heldout.npz") as arrays:
        np.savez_compressed(folder / "heldout.npz", images=arrays["images"], labels=(arrays["labels"] + 1) % 10)
    with pytest.raises(CheckFailed, match="metrics.json gives a test accuracy of .*, but it is"):
        export(source.load(folder), tmp_path / "models" / "digits")


def forge(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Return a change of a manifest that puts the digest right, too."""
    return lambda version: edit_manifest(version, change)


def truncate(version: Path) -> None:
    """Lose the end of a file."""
    path = version / "model.onnx"
    path.write_bytes(path.read_bytes()[:-1000])


def replace_and_forge(name: str, change: Callable[[Path], None]) -> Callable[[Path], None]:
    """Return a change of a file that puts its hash and the digest right, too."""

    def plant(version: Path) -> None:
        change(version / name)
        edit_manifest(version, lambda content: content.update(files=manifest.hash_files(version)))

    return plant


def other_weights(path: Path) -> None:
    """Put another model in the place of this one."""
    graph = onnx.load(path)
    rewrite(graph.graph, kernel(graph.graph, 0), lambda w: w * np.float32(1.01))
    onnx.save(graph, path)


def other_images(path: Path) -> None:
    """Leave out a held-out image."""
    with np.load(path) as arrays:
        np.savez_compressed(path, images=arrays["images"][1:], labels=arrays["labels"][1:])


def save_lambda(path: Path) -> None:
    """Put a model in the place of this one that holds code of its own."""
    keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Lambda(lambda x: x)]).save(path)


def better(content: dict[str, Any]) -> None:
    """Claim a better accuracy for every variant."""
    for variant in content["certificate"]["variants"]:
        for row in variant["rows"]:
            row["accuracy"] = 1.0


REPOSITORIES: dict[str, tuple[Callable[[Path], None], type[Exception], str]] = {
    "a truncated file": (truncate, CheckFailed, "model.onnx is not the file that was exported"),
    "a missing file": (lambda version: (version / "labels.txt").unlink(), CheckFailed, "labels.txt is missing"),
    "an edited certificate": (
        lambda version: edit_manifest(version, better, forge=False),
        BadInput,
        "was edited: its digest differs",
    ),
    "an edited manifest": (
        lambda version: edit_manifest(version, lambda content: content["labels"].reverse(), forge=False),
        BadInput,
        "was edited: its digest differs",
    ),
    "a forged certificate": (
        forge(better),
        CheckFailed,
        "gives onnx at batch size 1 an accuracy of 100.00%, but",
    ),
    "a forged accuracy": (
        forge(lambda content: content["certificate"].update(accuracy=0.999)),
        CheckFailed,
        "gives Keras an accuracy of 99.90%",
    ),
    "a budget without limits": (
        forge(lambda content: content["certificate"]["variants"][0].update(budget={"tie": 1e-5})),
        CheckFailed,
        "onnx has no budget",
    ),
    "a variant left out": (
        forge(lambda content: content["certificate"]["variants"].pop()),
        CheckFailed,
        "there are no comparisons for saved_model",
    ),
    "a model of another class count": (
        forge(lambda content: content["labels"].append("ten")),
        BadInput,
        "names 11 labels for 10 outputs",
    ),
    "another model with a forged hash": (
        replace_and_forge("model.onnx", other_weights),
        BudgetError,
        "the largest difference of onnx",
    ),
    "code in the Keras original with a forged hash": (
        replace_and_forge("model.keras", save_lambda),
        BadInput,
        "a model of .* cannot be loaded",
    ),
    "other held-out images with a forged hash": (
        replace_and_forge("heldout.npz", other_images),
        CheckFailed,
        "is about other held-out images",
    ),
}


@pytest.mark.parametrize("fault", REPOSITORIES)
def test_a_version_that_was_tampered_with_is_caught(fault: str, own_repository: Path) -> None:
    """`resnet verify` names what does not hold."""
    plant, error, message = REPOSITORIES[fault]
    plant(own_repository / "digits" / "1")
    with pytest.raises(error, match=message):
        verify(own_repository / "digits" / "1", full=True)


def test_an_allowance_of_one_s_own_is_a_budget_all_the_same() -> None:
    """Any limit makes a budget, none makes none."""
    bare = Variant("onnx", "model.onnx", "fp32", "", manifest.Budget(), [], {})
    assert "onnx has no budget" in list(bare.violations(1, 1.0))
    limited = msgspec.structs.replace(bare, budget=manifest.Budget(accuracy_drop=0.1))
    assert "onnx has no budget" not in list(limited.violations(1, 1.0))
