"""Export a model: convert, compare with the original, publish. What differs too much is not published."""

from __future__ import annotations

import contextlib
import datetime
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version as find_version
from pathlib import Path

import msgspec
import numpy as np

from export import formats, original, parity, precision, repository, speed, triton
from export.formats import FORMATS, ONNX, OPSET
from export.manifest import FORMAT, Budget, Certificate, Manifest, Preprocessing, TensorSpec, Variant, hash_files
from export.parity import EvidenceError, ParityError, Predict, VariantError
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
    opset: int = OPSET,
    sign: Callable[[Path], None] | None = None,
) -> Path:
    """Publish the next version of a model, in all formats of `FORMATS`.

    Args:
        source: The trained model and the evidence.
        target: REPOSITORY/NAME.
        precisions: Variants in lower precision to add: `fp16`, `int8`.
        budgets: Permitted difference from the original, by precision.
        opset: Operator set of the ONNX files.
        sign: Called with the folder of the version after its manifest is written; see `export.signature`.

    Returns:
        The folder of the new version.

    Raises:
        BadInput: The target cannot be written, the name of the model is invalid, or int8 has no calibration images.
        ParityError: A converted model differs from the original by more than its budget; nothing was published.
        VariantError: A variant in lower precision does; the version was published without it.
    """
    if "int8" in precisions and source.evidence.calibration is None:
        raise BadInput(
            f"{source.path} has no training images beside it to calibrate int8 with; name a data set by --data"
        )
    labels = source.evidence.labels
    with repository.staging(target) as staged:
        costs = {}
        for row in FORMATS:
            with _report(f"converting to {row.name}"):
                costs[row.name] = row.write(source.model, labels, staged, opset)
        source.model.save(staged / "model.keras")
        (staged / "labels.txt").write_text("".join(f"{label}\n" for label in labels), "utf-8")
        with (staged / "heldout.npz").open("wb") as file:
            np.savez_compressed(file, images=source.evidence.images, labels=source.evidence.targets)

        print("comparing with the Keras original")
        reference = original.load(staged / "model.keras")
        exact = [Variant(row.name, row.path, "fp32", "", budgets["fp32"], [], {}) for row in FORMATS]
        certificate = _certify(source, staged, reference, exact)
        parity.check(certificate)
        _check_evidence(source, certificate)
        refusals: dict[str, str] = {}
        for name in precisions:
            variant = Variant(f"{ONNX.name}-{name}", f"model.{name}.onnx", name, "", budgets[name], [], {})
            try:
                certificate.variants.append(_reduce(source, staged, reference, variant))
            except VariantError as error:
                refusals[name] = str(error)
        print(parity.describe(certificate))
        files = hash_files(staged)
        cost = costs[ONNX.name]
        assert cost is not None

        def finish(version: int) -> None:
            manifest = Manifest(
                format=FORMAT,
                model=target.name,
                version=version,
                created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                input=TensorSpec(original.INPUT, "uint8", [-1, *source.model.input_shape[1:]]),
                output=TensorSpec(original.OUTPUT, "float32", [-1, len(labels)]),
                labels=list(labels),
                preprocessing=Preprocessing(resize=source.resize),
                opset=opset,
                cost=cost,
                versions=_find_versions(),
                cpu=speed.name_cpu(),
                training=source.training,
                files=files,
                certificate=certificate,
            )
            triton.write_files(manifest, target)
            manifest.write(staged)
            if sign is not None:
                sign(staged)

        folder = repository.publish(staged, finish)
    if refusals:
        reasons = "; ".join(refusals.values())
        raise VariantError(f"{folder} is published without {', '.join(refusals)}: {reasons}")
    return folder


@contextlib.contextmanager
def _report(phase: str) -> Iterator[None]:
    """Print what takes time as it begins, and its duration as it ends."""
    print(phase, end="", flush=True)
    started = time.perf_counter()
    try:
        yield
        print(f" ({time.perf_counter() - started:.1f} s)", end="")
    finally:
        print(flush=True)


def _check_evidence(source: Source, certificate: Certificate) -> None:
    """Raise `EvidenceError` if the original has another accuracy than its training measured on the same images."""
    if source.accuracy is None:
        return
    # Keras rounds differently at another batch size, which can change the class of a tie.
    if abs(source.accuracy - certificate.accuracy) > max(1e-3, 1 / certificate.images):
        raise EvidenceError(
            f"metrics.json gives a test accuracy of {source.accuracy:.2%}, but it is {certificate.accuracy:.2%}: "
            "model, images or labels are not those of the training; export a complete run folder"
        )


def _certify(source: Source, staged: Path, reference: Predict, variants: Sequence[Variant]) -> Certificate:
    loaded = [(variant, formats.load(staged, variant)) for variant in variants]
    return parity.certify(reference, loaded, source.evidence.images, source.evidence.targets)


def _reduce(source: Source, staged: Path, reference: Predict, variant: Variant) -> Variant:
    """Write a variant in lower precision, by the first reduction within its budget.

    A variant is optional: nothing that happens to it costs what is exported already.

    Raises:
        VariantError: No reduction is within the budget; the file is removed.
    """
    path, problem = staged / variant.path, ""
    for reduction in precision.list_reductions(variant.precision, source.evidence.calibration):
        tried = msgspec.structs.replace(variant, method=reduction.method, arithmetic=reduction.arithmetic)
        try:
            with _report(f"trying {variant.precision}: {reduction.method}"):
                reduction.write(staged / ONNX.path, path)
            return _prove(source, staged, reference, tried)
        except ParityError as error:
            problem = str(error)
        except Exception as error:  # each library has its own exceptions
            problem = f"{type(error).__name__} in the conversion: {error}"
        print(f"  refused: {problem}")
        path.unlink(missing_ok=True)
    raise VariantError(problem)


def _prove(source: Source, staged: Path, reference: Predict, variant: Variant) -> Variant:
    """Return a variant in lower precision with its comparison and speed; raise `VariantError` if it loses too much."""
    certificate = _certify(source, staged, reference, [variant])
    (measured,) = certificate.variants
    problems = list(measured.violations(certificate.images, certificate.accuracy))
    if problems:
        raise VariantError("; ".join(problems))
    baseline, path = ONNX.load(staged / ONNX.path), ONNX.load(staged / variant.path)
    return msgspec.structs.replace(measured, speedup=speed.measure_speedup(baseline, path, source.evidence.images))


def _find_versions() -> dict[str, str]:
    """Return the versions of Python and of the installed libraries that take part in an export."""
    versions = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = find_version(library)
        except ModuleNotFoundError:  # PackageNotFoundError is one
            continue
    return versions
