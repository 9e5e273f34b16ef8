"""Export a model: convert, compare with the original, publish. What differs too much is not published."""

from __future__ import annotations

import contextlib
import datetime
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from export import (
    attestation,
    classifier,
    formats,
    graph,
    inspection,
    metadata,
    original,
    parity,
    precision,
    reference,
    repository,
    speed,
    triton,
)
from export.certificate import MAX_DIFFERENCE, MAX_LOGIT_DIFFERENCE, Budget, Certificate, Variant
from export.formats import FORMATS, ONNX, OPSET
from export.manifest import COLORS, FORMAT, Manifest, Preprocessing, TensorSpec, hash_files
from export.parity import BATCH_SIZES, Comparison, EvidenceError, ParityError, Probabilities, VariantError
from export.source import Source
from resnet import BadInput, CheckFailed
from resnet.packages import find_version
from training.calibration import measure_error, soften

CHECK = Path(__file__).with_name("check.py")  # a copy of it comes with each version
LIBRARIES = ("tensorflow-cpu", "tensorflow", "keras", "tf2onnx", "onnx", "onnxruntime", "onnxruntime-gpu", "numpy")

BUDGETS = {
    "fp32": Budget(max_difference=MAX_DIFFERENCE, max_logit_difference=MAX_LOGIT_DIFFERENCE),
    "fp16": Budget(accuracy_drop=0.002),
    "int8": Budget(accuracy_drop=0.005),
}


def export(
    source: Source,
    target: Path,
    precisions: Sequence[str] = (),
    budgets: Mapping[str, Budget] = BUDGETS,
    opset: int = OPSET,
    sign: Callable[[Path], None] | None = None,
    publish: Callable[[Path, Callable[[int], None]], Path | str] = repository.publish,
) -> Path | str:
    """Publish the next version of a model, in all formats of `FORMATS`.

    Args:
        source: The trained model and the evidence.
        target: REPOSITORY/NAME.
        precisions: Variants in lower precision to add: `fp16`, `int8`.
        budgets: Permitted difference from the original, by precision.
        opset: Operator set of the ONNX files.
        sign: Called with the folder of the version after its manifest is written; see `export.signature`.
        publish: Publishes the staged folder, as `repository.publish`.

    Returns:
        The place of the new version, as `publish` returns it.

    Raises:
        BadInput: The target cannot be written, the name of the model is invalid, or int8 has no calibration images.
        ParityError: A converted model differs from the original by more than its budget; nothing was published.
        VariantError: A variant in lower precision does; the version was published without it.
        CheckFailed: `export.inspection` finds a problem; nothing was published.
    """
    if "int8" in precisions and source.evidence.calibration is None:
        raise BadInput(
            f"{source.path} has no training images beside it to calibrate int8 with; name a data set by --data"
        )
    images, targets, labels = source.evidence.images, source.evidence.targets, source.evidence.labels
    preprocessing, shape = _describe_preprocessing(source), source.model.input_shape[1:]
    budgets = {**budgets, "fp32": _adapt(budgets["fp32"], source)}
    heldout = parity.hash_images(images, targets)
    props = {name: metadata.describe(labels, shape, preprocessing, heldout, budget) for name, budget in budgets.items()}
    with repository.staging(target) as staged:
        costs = {}
        for row in FORMATS:
            with _report(f"converting to {row.name}"):
                costs[row.name] = row.write(source.model, props["fp32"], staged, opset)
        source.model.save(staged / "model.keras")
        (staged / "labels.txt").write_text("".join(f"{label}\n" for label in labels), "utf-8")
        (staged / CHECK.name).write_bytes(CHECK.read_bytes())

        print("comparing with the Keras original")
        expected = parity.predict(original.load(staged / "model.keras"), images, max(BATCH_SIZES), "Keras")
        exact = [Variant(row.name, row.path, "fp32", "", budgets["fp32"], [], {}) for row in FORMATS]
        certificate = _add_calibration(_certify(source, staged, expected, exact).certificate, source, expected)
        parity.check(certificate)
        _check_evidence(source, certificate)
        refusals: dict[str, str] = {}
        predictions: dict[str, NDArray[np.int32]] = {}
        for name in precisions:
            variant = Variant(f"{ONNX.name}-{name}", f"model.{name}.onnx", name, "", budgets[name], [], {})
            try:
                reduced = _reduce(source, staged, expected, variant, props[name], opset)
            except VariantError as error:
                refusals[name] = str(error)
            else:
                certificate.variants.extend(reduced.certificate.variants)
                predictions.update(reduced.predictions)
        print(parity.describe(certificate))
        reference.make(images, targets, expected, predictions).write(staged / reference.NAME)
        cost = costs[ONNX.name]
        assert cost is not None
        image, probabilities = _list_specs(source)
        subjects = hash_files(staged)

        def finish(version: int) -> None:
            manifest = Manifest(
                format=FORMAT,
                model=target.name,
                version=version,
                created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                input=image,
                output=probabilities,
                labels=list(labels),
                preprocessing=preprocessing,
                opset=opset,
                cost=cost,
                versions=_find_versions(),
                cpu=speed.name_cpu(),
                training=source.training,
                files=subjects,
                certificate=certificate,
            )
            attestation.write_files(manifest, staged)
            triton.write_files(manifest, target)
            complete = msgspec.structs.replace(manifest, files=hash_files(staged))
            complete.write(staged)
            _inspect(staged, complete)
            if sign is not None:
                sign(staged)

        place = publish(staged, finish)
    if refusals:
        reasons = "; ".join(refusals.values())
        raise VariantError(f"{place} is published without {', '.join(refusals)}: {reasons}")
    return place


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


def _add_calibration(certificate: Certificate, source: Source, expected: Probabilities) -> Certificate:
    """Return the certificate with the calibration error that the original had before its training calibrated it."""
    if source.temperature is None:
        return certificate
    error = measure_error(soften(expected, 1 / source.temperature), source.evidence.targets)
    return msgspec.structs.replace(certificate, temperature=source.temperature, uncalibrated_error=error)


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


def _inspect(staged: Path, manifest: Manifest) -> None:
    """Raise `CheckFailed` if `resnet verify` and the server would not take the version."""
    problems = list(inspection.find_problems(staged, manifest))
    if problems:
        raise CheckFailed(f"nothing is published: {'; '.join(problems)}")


def _adapt(budget: Budget, source: Source) -> Budget:
    """Return a budget without a limit of logits if the model has none: if its probabilities are no softmax."""
    return (
        budget
        if classifier.ends_in_softmax(source.model)
        else msgspec.structs.replace(budget, max_logit_difference=None)
    )


def _describe_preprocessing(source: Source) -> Preprocessing:
    return Preprocessing(COLORS[source.model.input_shape[-1]], source.resize)


def _list_specs(source: Source) -> tuple[TensorSpec, TensorSpec]:
    """Return the input and the output of a converted model."""
    image = TensorSpec(original.INPUT, "uint8", [-1, *source.model.input_shape[1:]])
    return image, TensorSpec(original.OUTPUT, "float32", [-1, len(source.evidence.labels)])


def _certify(source: Source, staged: Path, expected: Probabilities, variants: Sequence[Variant]) -> Comparison:
    loaded = [(variant, formats.load(staged, variant)) for variant in variants]
    return parity.certify(expected, loaded, source.evidence.images, source.evidence.targets)


def _reduce(
    source: Source, staged: Path, expected: Probabilities, variant: Variant, props: dict[str, str], opset: int
) -> Comparison:
    """Write a variant in lower precision, by the first reduction within its budget; return its comparison.

    A variant is optional: nothing that happens to it costs what is exported already.

    Raises:
        VariantError: No reduction is within the budget; the file is removed.
    """
    path, problem = staged / variant.path, ""
    for reduction in precision.list_reductions(variant.precision, source.evidence.calibration, source.quantized, opset):
        tried = msgspec.structs.replace(variant, method=reduction.method, arithmetic=reduction.arithmetic)
        try:
            with _report(f"trying {variant.precision}: {reduction.method}"):
                reduction.write(staged / ONNX.path, path)
            metadata.write(path, props)
            return _prove(source, staged, expected, tried)
        except ParityError as error:
            problem = str(error)
        except Exception as error:  # each library has its own exceptions
            problem = f"{type(error).__name__} in the conversion: {error}"
        print(f"  refused: {problem}")
        path.unlink(missing_ok=True)
    raise VariantError(problem)


def _prove(source: Source, staged: Path, expected: Probabilities, variant: Variant) -> Comparison:
    """Return the comparison of a variant, with its speed; raise `VariantError` if a version may not have it."""
    comparison = _certify(source, staged, expected, [variant])
    certificate = comparison.certificate
    (measured,) = certificate.variants
    faults = graph.find_faults((staged / variant.path).read_bytes(), *_list_specs(source))
    problems = [f"{variant.name} {fault}" for fault in faults]
    problems += measured.violations(certificate.images, certificate.accuracy)
    if problems:
        raise VariantError("; ".join(problems))
    baseline, path = ONNX.load(staged / ONNX.path), ONNX.load(staged / variant.path)
    speedup = speed.measure_speedup(baseline, path, source.evidence.images)
    certificate.variants[:] = [msgspec.structs.replace(measured, speedup=speedup)]
    return comparison


def _find_versions() -> dict[str, str]:
    """Return the versions of Python and of the installed libraries that take part in an export."""
    found = {library: find_version(library) for library in LIBRARIES}
    return {
        "python": platform.python_version(),
        **{name: number for name, number in found.items() if number is not None},
    }
