"""Export a model: convert, prove, publish. What cannot be proved is not published."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version as installed
from pathlib import Path

import msgspec
import numpy as np

from export import convert, parity, precision, repository, speed, triton
from export.manifest import FORMAT, Budget, Certificate, Manifest, Preprocessing, TensorSpec, Variant, hash_files
from export.parity import EvidenceError, Predict, VariantError
from export.source import Source
from resnet import BadInput

LIBRARIES = ("tensorflow-cpu", "tensorflow", "keras", "tf2onnx", "onnx", "onnxruntime", "onnxruntime-gpu", "numpy")


BUDGETS = {
    "fp32": Budget(max_difference=1e-5),
    "fp16": Budget(accuracy_drop=0.001),
    "int8": Budget(accuracy_drop=0.005),
}


def export(
    source: Source,
    target: Path,
    precisions: Sequence[str] = (),
    budgets: Mapping[str, Budget] = BUDGETS,
    opset: int = convert.OPSET,
    sign: Callable[[Path], None] | None = None,
) -> Path:
    """Publish the next version of a model.

    Args:
        source: The trained model and the evidence.
        target: REPOSITORY/NAME.
        precisions: Variants to add to those in fp32: `fp16`, `int8`.
        budgets: What each precision may differ by.
        opset: Operator set of the ONNX files.
        sign: Called with the folder of the version once its manifest is there; see `export.signature`.

    Returns:
        The folder of the new version.

    Raises:
        BadInput: The target cannot be written, or its name is not fit for a model, or there is nothing to calibrate
            int8 with.
        ParityError: A converted model differs from the original by more than the budget; nothing was published.
        VariantError: Only a variant does; the version was published without it.
    """
    if "int8" in precisions and source.evidence.calibration is None:
        raise BadInput(
            f"{source.path} has no training images beside it to calibrate int8 with; name a data set by --data"
        )
    labels = source.evidence.labels
    with repository.staging(target) as staged:
        print("converting to SavedModel and ONNX")
        convert.to_saved_model(source.model, staged)
        cost = convert.to_onnx(source.model, labels, staged / "model.onnx", opset)
        source.model.save(staged / "model.keras")
        (staged / "labels.txt").write_text("".join(f"{label}\n" for label in labels), "utf-8")
        with (staged / "heldout.npz").open("wb") as file:
            np.savez_compressed(file, images=source.evidence.images, labels=source.evidence.targets)

        print("comparing them with the original")
        reference = convert.load_keras(staged / "model.keras")
        exact = [
            Variant("onnx", "model.onnx", "fp32", "", budgets["fp32"], [], {}),
            Variant("saved_model", ".", "fp32", "", budgets["fp32"], [], {}),
        ]
        certificate = _certify(source, staged, reference, exact)
        parity.check(certificate)
        _check_evidence(source, certificate)
        refused: dict[str, str] = {}
        for name in precisions:
            wanted = Variant(f"onnx-{name}", f"model.{name}.onnx", name, "", budgets[name], [], {})
            try:
                certificate.variants.append(_reduce(source, staged, reference, wanted))
            except VariantError as error:
                refused[name] = str(error)
        print(parity.describe(certificate))
        files = hash_files(staged)

        def finish(version: int) -> None:
            described = Manifest(
                format=FORMAT,
                model=target.name,
                version=version,
                created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                input=TensorSpec(convert.INPUT, "uint8", [-1, *source.model.input_shape[1:]]),
                output=TensorSpec(convert.OUTPUT, "float32", [-1, len(labels)]),
                labels=list(labels),
                preprocessing=Preprocessing(),
                opset=opset,
                cost=cost,
                versions=_versions(),
                cpu=speed.name_cpu(),
                training=source.training,
                files=files,
                certificate=certificate,
            )
            triton.describe(described, target)
            described.write(staged)
            if sign is not None:
                sign(staged)

        folder = repository.publish(staged, finish)
    if refused:
        reasons = "; ".join(refused.values())
        raise VariantError(f"{folder} is published without {', '.join(refused)}: {reasons}")
    return folder


def _check_evidence(source: Source, certificate: Certificate) -> None:
    """Raise `EvidenceError` if the original is not as good on its training's test images as the training found."""
    if source.accuracy is None:
        return
    # Keras itself rounds otherwise at another batch size, which may turn a tie.
    if abs(source.accuracy - certificate.accuracy) > max(1e-3, 1 / certificate.images):
        raise EvidenceError(
            f"the run says {source.accuracy:.2%} of the test images were right, here it is {certificate.accuracy:.2%}: "
            "model, images or labels are not those of the run"
        )


def _certify(source: Source, staged: Path, reference: Predict, variants: Sequence[Variant]) -> Certificate:
    loaded = [(variant, convert.load_variant(staged, variant)) for variant in variants]
    return parity.certify(reference, loaded, source.evidence.images, source.evidence.targets)


def _reduce(source: Source, staged: Path, reference: Predict, variant: Variant) -> Variant:
    """Write a variant of lower precision in the first of the ways that is within its budget.

    Raises:
        VariantError: None is; the file is gone again.
    """
    baseline, path, problems = staged / "model.onnx", staged / variant.path, [""]
    for method, write in precision.attempts(variant.precision, source.evidence.calibration):
        print(f"trying {variant.precision}: {method}")
        write(baseline, path)
        certificate = _certify(source, staged, reference, [msgspec.structs.replace(variant, method=method)])
        (found,) = certificate.variants
        problems = list(found.violations(certificate.images, certificate.accuracy))
        if not problems:
            times = speed.compare(convert.load_onnx(baseline), convert.load_onnx(path), source.evidence.images)
            return msgspec.structs.replace(found, speedup=times)
        print(f"  outside its budget: {problems[-1]}")
    path.unlink()
    raise VariantError(problems[-1])


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = installed(library)
        except ModuleNotFoundError:  # PackageNotFoundError is one
            continue
    return found
