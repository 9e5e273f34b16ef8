"""Recompute the certificate of a model version, and compare it with the recorded one."""

from __future__ import annotations

import io
import math
import sys
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import numpy as np
from numpy.typing import NDArray

from export import formats, inspection, manifest, parity, reference, session, signature
from export.certificate import ROUNDING, Certificate, Variant
from export.formats import ONNX
from export.manifest import Manifest
from export.parity import Comparison, Predict, Probabilities
from export.reference import Reference
from export.signature import PublicKey
from resnet import BadInput, CheckFailed
from resnet.archives import check_size
from training.calibration import measure_error, soften

SAME_MODEL = 1e-5  # largest difference of a probability between two machines that run the same Keras model
SAME_VARIANT = 0.01  # share of images that two machines may classify differently with the same variant


def verify(folder: Path, trust: PublicKey | None = None, full: bool = False) -> Manifest:
    """Check the signature, the hashes, the recorded certificate and a recomputed one, in this order, and print them.

    Args:
        folder: REPOSITORY/NAME/VERSION.
        trust: Also require a signature that matches this key.
        full: Also run the Keras original and the SavedModel, which may do anything. Otherwise only the ONNX files are
            run, and compared with the recorded answers of the original; this needs no TensorFlow.

    Returns:
        The manifest of the version.

    Raises:
        BadInput: The manifest or a model cannot be read.
        CheckFailed: The signature does not match, `export.inspection` finds a problem, or a figure is outside its
            budget or differs from the certificate or the recorded answers.
    """
    recorded = manifest.read(folder) if trust is None else signature.read(folder, trust)
    name = f"{recorded.model}/{recorded.version}"
    problems = list(inspection.find_problems(folder, recorded))
    if problems:
        raise CheckFailed("; ".join(problems))
    if trust is not None:
        print(f"{name} is signed by the trusted key")
    print(f"the {len(recorded.files)} files of {name} are unchanged")
    parity.check(recorded.certificate)
    stored = reference.load(folder, recorded)
    _check_reference(folder, recorded.certificate, stored)
    if full:
        if trust is None:
            print(
                f"warning: {name} was not checked against a key (--trust), and --full runs the code of its models",
                file=sys.stderr,
            )
        recomputed = _certify_all(folder, recorded, stored)
    else:
        onnx = [variant for variant in recorded.certificate.variants if variant.name.partition("-")[0] == ONNX.name]
        loaded = [_load_onnx(folder, variant, recorded) for variant in onnx]
        recomputed = parity.certify(stored.probabilities, loaded, stored.images, stored.labels)
    certificate = recomputed.certificate
    parity.check(msgspec.structs.replace(certificate, variants=_complete(recorded, certificate)))
    print(parity.describe(certificate))
    _compare(recorded.certificate, certificate)
    _compare_predictions(stored, recomputed)
    if not full:
        print("compared with the recorded answers of the Keras original; --full runs it, and the SavedModel")
    return recorded


def _complete(recorded: Manifest, recomputed: Certificate) -> list[Variant]:
    """Return the recomputed variants, and the recorded ones in the place of those that were not run."""
    return [recomputed.find(variant.name) or variant for variant in recorded.certificate.variants]


def _check_reference(folder: Path, certificate: Certificate, stored: Reference) -> None:
    """Raise `CheckFailed` if the certificate is about other images or other answers than those of reference.npz."""
    path, labels = folder / reference.NAME, stored.labels
    if (certificate.images, certificate.images_sha256) != (len(labels), parity.hash_images(stored.images, labels)):
        raise CheckFailed(f"the certificate is about other held-out images than those of {path}")
    right = stored.probabilities.argmax(axis=1) == labels
    if not abs(right.mean() - certificate.accuracy) <= ROUNDING:
        raise CheckFailed(
            f"the certificate gives Keras an accuracy of {certificate.accuracy:.2%}, but its answers in {path} have "
            f"one of {right.mean():.2%}"
        )
    if certificate.uncalibrated_error is not None:
        error = measure_error(soften(stored.probabilities, 1 / certificate.temperature), labels)
        if not abs(error - certificate.uncalibrated_error) <= max(1e-3, 1 / len(labels)) + ROUNDING:
            raise CheckFailed(
                f"the certificate gives Keras a calibration error of {certificate.uncalibrated_error:.4f} before its "
                f"logits were divided by {certificate.temperature:.3g}, but by its answers in {path} it was {error:.4f}"
            )
    for variant in certificate.variants:
        if variant.precision == "fp32":
            continue
        predictions = stored.predictions.get(variant.name)
        if predictions is None:
            raise CheckFailed(f"{path} holds no answers of {variant.name}")
        counts = [(row.lost, row.gained) for row in variant.rows]
        found = int(np.sum(right & (predictions != labels))), int(np.sum(~right & (predictions == labels)))
        if found != counts[0]:
            raise CheckFailed(
                f"the certificate says that {variant.name} lost {counts[0][0]} images and gained {counts[0][1]}, but "
                f"by its answers in {path} it lost {found[0]} and gained {found[1]}"
            )


def _certify_all(folder: Path, recorded: Manifest, stored: Reference) -> Comparison:
    """Compare all variants. They are loaded from a copy: what was hashed is what is loaded."""
    from export import original  # loads TensorFlow

    with TemporaryDirectory(prefix="resnet-") as name:
        copy = Path(name)
        for file in recorded.files:
            (copy / file).parent.mkdir(parents=True, exist_ok=True)
            (copy / file).write_bytes(manifest.read_file(folder, file, recorded))
        try:
            check_size(copy / "model.keras")
            keras = original.load(copy / "model.keras")
            variants = [(variant, formats.load(copy, variant)) for variant in recorded.certificate.variants]
        except BadInput:
            raise
        except Exception as error:  # Keras, TensorFlow and onnxruntime raise many types for unreadable files
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise BadInput(f"a model of {folder} cannot be loaded ({reason})") from None
        expected = parity.predict(keras, stored.images, max(parity.BATCH_SIZES), "Keras")
        _check_answers(folder, stored, expected)
        return parity.certify(expected, variants, stored.images, stored.labels)


def _check_answers(folder: Path, stored: Reference, expected: Probabilities) -> None:
    """Raise `CheckFailed` if the recorded answers of the original are not those that it gives."""
    row = parity.compare(stored.probabilities, expected, stored.labels, max(parity.BATCH_SIZES), SAME_MODEL)
    if not row.max_difference <= SAME_MODEL or row.top1_disagreements:
        raise CheckFailed(
            f"{folder / reference.NAME} does not hold the answers of the Keras original, which differ by up to "
            f"{row.max_difference:.3g}"
        )


def _load_onnx(folder: Path, variant: Variant, recorded: Manifest) -> tuple[Variant, Predict]:
    """Return a variant with the arithmetic in which it is computed here, and the function that does."""
    content = manifest.read_file(folder, variant.path, recorded)
    try:
        if variant.arithmetic:
            with suppress(ModuleNotFoundError):  # onnx; without it the file is computed as onnxruntime does on a CPU
                from export import half

                return variant, half.load(io.BytesIO(content))
        loaded = session.open_session(content)
    except Exception as error:  # onnxruntime's exceptions have no common base below Exception
        raise BadInput(f"{folder / variant.path} cannot be loaded by onnxruntime: {error}") from None

    def predict(images: NDArray[np.uint8]) -> Probabilities:
        probabilities: Probabilities = loaded.run([recorded.output.name], {recorded.input.name: images})[0]
        recorded.check_output(probabilities.shape)
        return probabilities

    return msgspec.structs.replace(variant, arithmetic=""), predict


def _compare(recorded: Certificate, recomputed: Certificate) -> None:
    """Raise `CheckFailed` if the accuracies of two certificates differ."""
    # Another machine rounds differently, which can change the class of a tie. Edited figures differ by far more.
    tolerance = max(1e-3, 1 / recomputed.images) + ROUNDING
    for variant in recorded.variants:
        accuracies = {row.batch_size: row.accuracy for row in variant.rows}
        now = recomputed.find(variant.name)
        for row in now.rows if now else ():
            before = accuracies.get(row.batch_size, math.nan)
            if not abs(before - row.accuracy) <= tolerance:  # NaN is outside too
                raise CheckFailed(
                    f"the certificate gives {variant.name} at batch size {row.batch_size} an accuracy of {before:.2%}, "
                    f"but it is {row.accuracy:.2%}"
                )


def _compare_predictions(stored: Reference, recomputed: Comparison) -> None:
    """Raise `CheckFailed` if a variant answers otherwise than it did when it was certified."""
    tolerance = max(SAME_VARIANT, 1 / len(stored.labels)) + ROUNDING
    for name, predictions in stored.predictions.items():
        now = recomputed.predictions.get(name)
        share = 1.0 if now is None else float(np.mean(now != predictions))
        if share > tolerance:
            raise CheckFailed(f"{name} gives {share:.2%} of the images another class than when it was certified")
