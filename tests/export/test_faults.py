"""Faults that real conversions have had, planted one by one: each is caught, with the right error.

Those of a version that is published already are in `tests.export.test_forgeries`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.helper import make_node

from export import formats, manifest, original, parity, source
from export.export import export
from export.formats import onnx as onnx_format
from export.formats import saved_model
from export.parity import BudgetError, RunError, ShapeError
from resnet import BadInput, CheckFailed

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


def append(graph: Graph, *nodes: onnx.NodeProto, **constants: NDArray[Any]) -> None:
    """Compute the output from what the graph computes so far, called `so far`."""
    last = next(node for node in graph.node if node.output[0] == "probabilities")
    last.output[0] = "so far"
    graph.node.extend(nodes)
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())


def fail_at(size: int) -> Callable[[Graph], None]:
    """Return a change that answers otherwise to batches of one size."""

    def change(graph: Graph) -> None:
        append(
            graph,
            make_node("Shape", ["so far"], ["shape"]),
            make_node("Gather", ["shape", "zero"], ["size"]),
            make_node("Equal", ["size", "wrong"], ["is wrong"]),
            make_node("Cast", ["is wrong"], ["error"], to=onnx.TensorProto.FLOAT),
            make_node("Add", ["so far", "error"], ["probabilities"]),
            zero=np.array(0),
            wrong=np.array(size),
        )

    return change


def normalise_by_the_batch(graph: Graph) -> None:
    """Subtract the mean of the batch before the dense layer, as normalisation does in training mode."""
    layer = (nodes(graph, "MatMul") + nodes(graph, "Gemm"))[0]
    mean = make_node("ReduceMean", [layer.input[0]], ["mean"], axes=[0])
    rest = make_node("Sub", [layer.input[0], "mean"], ["rest"])
    layer.input[0] = "rest"
    place = list(graph.node).index(layer)
    for node in (rest, mean):
        graph.node.insert(place, node)


def answer_as_to_the_first(graph: Graph) -> None:
    """Give each image of a batch the answer to the first."""
    first = make_node("Gather", ["so far", "zero"], ["first"], axis=0)
    nothing = make_node("Sub", ["so far", "so far"], ["nothing"])
    append(graph, first, nothing, make_node("Add", ["first", "nothing"], ["probabilities"]), zero=np.array(0))


def raise_all(graph: Graph) -> None:
    """Raise each probability by less than the limit of a difference."""
    append(graph, make_node("Add", ["so far", "raise"], ["probabilities"]), **{"raise": np.float32([8e-6])})


def round_answers(graph: Graph) -> None:
    """Answer in the digits of half precision."""
    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    append(
        graph,
        make_node("Cast", ["so far"], ["half"], to=half),
        make_node("Cast", ["half"], ["probabilities"], to=single),
    )


def rename(kind: str, other: str, place: int = 0, **attributes: Any) -> Callable[[Graph], None]:
    """Return a change of an operator into another one."""

    def change(graph: Graph) -> None:
        node = nodes(graph, kind)[place]
        node.op_type = other
        del node.attribute[:]
        node.attribute.extend(onnx.helper.make_attribute(name, value) for name, value in attributes.items())

    return change


LARGEST = "the largest difference of onnx at batch size 1 is .*, above 1e-05"
CONVERSIONS: dict[str, tuple[Callable[[Graph], None], type[Exception], str]] = {
    "a scale of 1/256": (
        lambda graph: rewrite(graph, nodes(graph, "Mul")[0].input[1], lambda scale: scale * np.float32(255 / 256)),
        BudgetError,
        LARGEST,
    ),
    "blue for red": (lambda graph: rewrite(graph, kernel(graph, 0), lambda w: w[:, ::-1]), BudgetError, LARGEST),
    "another mean": (shift_mean, BudgetError, LARGEST),
    "a dropped bias": (
        lambda graph: rewrite(graph, nodes(graph, "Conv")[1].input[2], np.zeros_like),
        BudgetError,
        LARGEST,
    ),
    "filters in another order": (
        lambda graph: rewrite(graph, kernel(graph, 2), lambda w: w[::-1]),
        BudgetError,
        LARGEST,
    ),
    "a kernel upside down": (
        lambda graph: rewrite(graph, kernel(graph, 1), lambda w: w[:, :, ::-1]),
        BudgetError,
        LARGEST,
    ),
    "rows for columns": (
        lambda graph: rewrite(graph, kernel(graph, 1), lambda w: w.swapaxes(2, 3)),
        BudgetError,
        LARGEST,
    ),
    "a transposed dense layer": (
        lambda graph: rewrite(graph, dense(graph), lambda w: w.T.reshape(w.shape)),
        BudgetError,
        LARGEST,
    ),
    "two classes exchanged": (
        lambda graph: rewrite(graph, dense(graph), lambda w: w[:, [1, 0, *range(2, 10)]]),
        BudgetError,
        LARGEST,
    ),
    "a weight that is no number": (
        lambda graph: rewrite(graph, kernel(graph, 3), lambda w: np.where(w == w.max(), np.float32(np.nan), w)),
        BudgetError,
        "the largest difference of onnx at batch size 1 is nan, above 1e-05",
    ),
    "weights of half precision": (
        lambda graph: rewrite(graph, kernel(graph, 0), lambda w: w.astype(np.float16).astype(np.float32)),
        BudgetError,
        LARGEST,
    ),
    "answers of half precision": (round_answers, BudgetError, LARGEST),
    "small probabilities that are too large": (
        raise_all,
        BudgetError,
        "original: the largest difference of logits of onnx at batch size 1 is .*, above 0.01$",
    ),
    "no activation": (rename("Relu", "Identity", 1), BudgetError, LARGEST),
    "a leaky activation": (rename("Relu", "LeakyRelu", 1, alpha=0.01), BudgetError, LARGEST),
    "the largest value for the mean": (rename("GlobalAveragePool", "GlobalMaxPool"), BudgetError, LARGEST),
    "padding of another framework": (change_pads, BudgetError, LARGEST),
    "softmax over the batch": (softmax_over(0), BudgetError, "the largest difference of onnx at batch size "),
    "logits for probabilities": (rename("Softmax", "Identity"), BudgetError, LARGEST),
    "logarithms of probabilities": (rename("Softmax", "LogSoftmax", axis=1), BudgetError, LARGEST),
    "a sigmoid for a softmax": (rename("Softmax", "Sigmoid"), BudgetError, LARGEST),
    "normalisation by the batch": (
        normalise_by_the_batch,
        BudgetError,
        "the largest difference of onnx at batch size ",
    ),
    "the first answer for all": (
        answer_as_to_the_first,
        BudgetError,
        "the largest difference of onnx at batch size (3|64) is .*, above 1e-05",
    ),
    "a batch of 3 that is wrong": (fail_at(3), BudgetError, "difference of onnx at batch size 3 is 1, above 1e-05"),
    "a batch of 64 that is wrong": (fail_at(64), BudgetError, "difference of onnx at batch size 64 is 1, above 1e-05"),
    "float64": (to_double, ShapeError, r"at batch size 1 the output is float64 \[\d+, 10\], the original's is float32"),
    "a fixed batch axis": (fix_batch, RunError, "onnx, batch size 3: the model cannot be run"),
    "a class too few": (fewer_classes, ShapeError, r"the output is float32 \[\d+, 9\], the original's is .*, 10\]"),
    "another name of the input": (
        lambda graph: setattr(graph.input[0], "name", "pixels"),
        RunError,
        "^onnx cannot be loaded: ",
    ),
}
OF_BATCHES = (
    "normalisation by the batch",
    "the first answer for all",
    "a batch of 3 that is wrong",
    "a batch of 64 that is wrong",
)


@pytest.fixture(scope="module")
def prove(repository: Path, images: NDArray[np.uint8]) -> Callable[[Path, int], None]:
    """Certify an ONNX file as that of the repository, with so many images."""
    version = repository / "digits" / "1"
    variants = {variant.name: variant for variant in manifest.read(version).certificate.variants}
    expected = parity.predict(original.load(version / "model.keras"), images, 64, "Keras")
    saved = saved_model.load(version)

    def certify(path: Path, count: int = len(images)) -> None:
        pairs = [(variants["onnx"], formats.load(path.parent, variants["onnx"])), (variants["saved_model"], saved)]
        parity.check(parity.certify(expected[:count], pairs, images[:count], np.zeros(count, np.int32)).certificate)

    return certify


@pytest.mark.parametrize(
    ("fault", "count"), [*((fault, 70) for fault in CONVERSIONS), *((fault, 2) for fault in OF_BATCHES)]
)
def test_a_faulty_conversion_is_caught(
    fault: str, count: int, repository: Path, tmp_path: Path, prove: Callable[[Path, int], None]
) -> None:
    """The sound conversion passes the same comparison. Two images are enough for faults of batches."""
    plant, error, message = CONVERSIONS[fault]
    sound = repository / "digits" / "1" / "model.onnx"
    model = onnx.load(sound)
    plant(model.graph)
    onnx.save(model, tmp_path / "model.onnx")
    prove(sound, count)
    with pytest.raises(error, match=message):
        prove(tmp_path / "model.onnx", count)


@pytest.mark.parametrize("fault", ["normalisation by the batch", "a batch of 64 that is wrong"])
def test_one_image_is_enough_for_faults_of_batches(
    fault: str, repository: Path, tmp_path: Path, prove: Callable[[Path, int], None]
) -> None:
    """It is repeated."""
    model = onnx.load(repository / "digits" / "1" / "model.onnx")
    CONVERSIONS[fault][0](model.graph)
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(BudgetError, match="the largest difference of onnx at batch size "):
        prove(tmp_path / "model.onnx", 1)


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
    with pytest.raises(BudgetError, match="the largest difference of onnx at batch size "):
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
