"""Export a model: convert, prove, publish. What cannot be proved is not published."""

from __future__ import annotations

import datetime
import platform
import shutil
from collections.abc import Mapping
from importlib.metadata import version as installed
from pathlib import Path

import numpy as np

from export import convert, parity, repository
from export.manifest import FORMAT, Budget, Manifest, Preprocessing, TensorSpec, hash_files
from export.parity import Predict
from export.source import Source

LIBRARIES = ("tensorflow-cpu", "tensorflow", "keras", "tf2onnx", "onnx", "onnxruntime", "onnxruntime-gpu", "numpy")


def export(source: Source, target: Path) -> Path:
    """Publish the next version of a model.

    Args:
        source: The trained model and the evidence.
        target: REPOSITORY/NAME.

    Returns:
        The folder of the new version.

    Raises:
        BadInput: The target cannot be written, or its name is not fit for a model.
        ParityError: A converted model differs from the original by more than the budget; nothing was published.
    """
    with repository.staging(target) as staged:
        print("converting to SavedModel and ONNX")
        convert.to_saved_model(source.model, staged)
        convert.to_onnx(source.model, staged / "model.onnx")
        shutil.copyfile(source.path, staged / "model.keras")
        (staged / "labels.txt").write_text("".join(f"{label}\n" for label in source.labels), "utf-8")
        with (staged / "heldout.npz").open("wb") as file:
            np.savez_compressed(file, images=source.images, labels=source.targets)

        print("comparing them with the original")
        certificate = parity.certify(
            convert.load_keras(staged / "model.keras"), load_variants(staged), source.images, source.targets, Budget()
        )
        print(parity.describe(certificate))
        parity.check(certificate)

        def finish(version: int) -> None:
            Manifest(
                format=FORMAT,
                model=target.name,
                version=version,
                created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                input=TensorSpec(convert.INPUT, "uint8", [-1, *source.model.input_shape[1:]]),
                output=TensorSpec(convert.OUTPUT, "float32", [-1, len(source.labels)]),
                labels=list(source.labels),
                preprocessing=Preprocessing(),
                opset=convert.OPSET,
                versions=_versions(),
                training=source.training,
                files=files,
                certificate=certificate,
            ).write(staged)

        files = hash_files(staged)
        return repository.publish(staged, finish)


def load_variants(folder: Path) -> Mapping[str, Predict]:
    """Load the converted models of a version, or of one to be."""
    return {"onnx": convert.load_onnx(folder / "model.onnx"), "saved_model": convert.load_saved_model(folder)}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = installed(library)
        except ModuleNotFoundError:  # PackageNotFoundError is one
            continue
    return found
