"""Versions of one model that compute different answers, each complete and with its hashes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import numpy_helper

from export import manifest, parity, reference
from export.certificate import Certificate
from export.reference import Reference

MODEL = "model.onnx"

GraphChange = Callable[[onnx.ModelProto], None]
"""Changes a graph in place."""


def publish(
    source: Path, folder: Path, change: GraphChange | None = None, labels: Sequence[str] = ()
) -> NDArray[np.float32]:
    """Copy a version, change its ONNX graph, and return its answers.

    The files that stay the same are links. The certificate says that the original is what the new ONNX file computes.

    Args:
        source: Folder of a version.
        folder: REPOSITORY/NAME/VERSION to make; it appears complete, by a rename.
        change: What to change; None gives the classes other biases, by the number of the version.
        labels: Other names of the classes.

    Returns:
        The probabilities of the held-out images, [images, classes].
    """
    staged = folder.with_name(f".{folder.name}")
    shutil.copytree(source, staged, copy_function=link)
    for name in (MODEL, manifest.NAME, reference.NAME):
        (staged / name).unlink()  # a link to the original, which must not change
    graph = onnx.load(source / MODEL)
    (change or partial(_shift, int(folder.name)))(graph)
    onnx.save(graph, staged / MODEL)
    original = manifest.read(source)
    stored = reference.load(source, original)
    answers = compute(staged, stored.images)
    reference.make(stored.images, stored.labels, answers).write(staged / reference.NAME)
    files = {name: digest for name, digest in manifest.hash_files(staged).items() if name in original.files}
    msgspec.structs.replace(
        original,
        certificate=_certify(original.certificate, stored, answers),
        model=folder.parent.name,
        version=int(folder.name),
        files=files,
        labels=list(labels) or original.labels,
    ).write(staged)
    staged.rename(folder)
    return answers


def link(source: str, target: str) -> None:
    """Link a file; copy it to another file system."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def compute(version: Path, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the probabilities that a version computes, [images, classes]."""
    session = onnxruntime.InferenceSession(str(version / MODEL), providers=["CPUExecutionProvider"])
    answers: NDArray[np.float32] = session.run(None, {session.get_inputs()[0].name: images})[0]
    return answers


def _certify(certificate: Certificate, stored: Reference, answers: NDArray[np.float32]) -> Certificate:
    """Return the certificate of a version whose original gives these answers, and whose variants give the same."""
    variants = []
    for variant in certificate.variants:
        rows = [
            parity.compare(answers, answers, stored.labels, row.batch_size, variant.budget.tie) for row in variant.rows
        ]
        variants.append(msgspec.structs.replace(variant, rows=rows))
    accuracy = float(np.mean(answers.argmax(axis=1) == stored.labels))
    return msgspec.structs.replace(certificate, accuracy=accuracy, variants=variants)


def _shift(number: int, model: onnx.ModelProto) -> None:
    """Add `number`, modulo 7, to the logit of each class in turn: the answers differ, and stay probabilities."""
    classes = model.graph.output[0].type.tensor_type.shape.dim[-1].dim_value
    biases = [tensor for tensor in model.graph.initializer if list(tensor.dims) == [classes]]
    if not biases:
        raise ValueError("the model has no bias of its classes to change")
    bias = biases[-1]
    values = numpy_helper.to_array(bias).copy()
    values[number % classes] += 1 + number % 7
    bias.CopyFrom(numpy_helper.from_array(values, bias.name))
