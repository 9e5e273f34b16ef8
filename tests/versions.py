"""A version of a model that is made without TensorFlow, in milliseconds: its graph averages the colours of an image."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper

from export import manifest, parity, reference, statistics
from export.certificate import Budget, Certificate, Parity, Variant
from export.manifest import Cost, Manifest, Preprocessing, TensorSpec
from export.reference import Reference

Content = dict[str, Any]
"""The content of a manifest, as JSON."""

FILES = {"onnx": "model.onnx", "saved_model": "."}
COLORS = ("red", "green", "blue")
SIDE = 4


def write_version(folder: Path, labels: Sequence[str] = COLORS, outputs: int = 3) -> Path:
    """Write a complete version to REPOSITORY/NAME/VERSION, and return the folder.

    Args:
        folder: Where to write it.
        labels: The classes that its manifest names.
        outputs: The classes that its graph really has.
    """
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(make_graph(outputs).SerializeToString())
    (folder / "saved_model.pb").write_bytes(b"")
    stored, certificate = make_evidence(len(labels))
    stored.write(folder / reference.NAME)
    Manifest(
        format=manifest.FORMAT,
        model=folder.parent.name,
        version=int(folder.name),
        created="",
        input=TensorSpec("image", "uint8", [-1, SIDE, SIDE, 3]),
        output=TensorSpec("probabilities", "float32", [-1, len(labels)]),
        labels=list(labels),
        preprocessing=Preprocessing(),
        opset=17,
        cost=Cost(0, 0, 0, 0, 0),
        versions={},
        cpu="",
        training=None,
        files=manifest.hash_files(folder),
        certificate=certificate,
    ).write(folder)
    return folder


@cache
def make_evidence(classes: int) -> tuple[Reference, Certificate]:
    """Return six images with the answers of a graph, and the certificate of two variants that are the graph."""
    labelled = np.arange(6, dtype=np.int32) % 3
    images = np.zeros((6, SIDE, SIDE, 3), np.uint8)
    images[range(6), :, :, labelled] = 200
    original = onnxruntime.InferenceSession(make_graph(classes).SerializeToString())

    def predict(batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        probabilities: NDArray[np.float32] = original.run(None, {"image": batch})[0]
        return probabilities

    budget = Budget(max_difference=1e-5, max_logit_difference=0.01)
    variants = [Variant(name, path, "fp32", "", budget, [], {}) for name, path in FILES.items()]
    comparison = parity.certify(predict(images), [(variant, predict) for variant in variants], images, labelled)
    return reference.make(images, labelled, predict(images)), comparison.certificate


def make_row(batch_size: int = 1, accuracy: float = 1.0, images: int = 6, **figures: Any) -> Parity:
    """Return a row of a certificate, equal to the original but for some figures; the original is always right."""
    lost = round((1 - accuracy) * images)
    row = Parity(
        batch_size=batch_size,
        max_difference=0.0,
        mean_difference=0.0,
        max_logit_difference=0.0,
        p999_logit_difference=0.0,
        top1_agreement=1.0,
        top1_disagreements=0,
        accuracy=1 - lost / images,
        lost=lost,
        gained=0,
        drop_bound=statistics.bound_drop(lost, 0, images),
        mcnemar=statistics.compute_mcnemar(lost, 0),
        calibration_error=0.0,
        class_agreement=[1.0] * 3,
        class_cosine=[1.0] * 3,
        worst=[],
    )
    return msgspec.structs.replace(row, **figures)


def make_graph(outputs: int = 3) -> onnx.ModelProto:
    """Return a graph with the mean of each colour as the logits of the first three classes."""
    weights = np.eye(3, outputs, dtype=np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMean", ["pixels"], ["means"], axes=[1, 2], keepdims=0),
            helper.make_node("MatMul", ["means", "weights"], ["logits"]),
            helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        ],
        "colors",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", SIDE, SIDE, 3])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", outputs])],
        [onnx.numpy_helper.from_array(weights, "weights")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def list_file(folder: Path, name: str, content: bytes) -> None:
    """Change a file of a version, and put its hash into the manifest and the digest right, as its maker can."""
    (folder / name).write_bytes(content)
    recorded = manifest.read(folder)
    recorded.files[name] = hashlib.sha256(content).hexdigest()
    recorded.write(folder)
