"""Recompute the certificate of a model version, and compare it with the recorded one."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import numpy as np
from numpy.typing import NDArray

from export import formats, inspection, manifest, parity, reference, session, signature
from export.formats import ONNX
from export.manifest import ROUNDING, Certificate, Manifest, Variant
from export.parity import Predict, Probabilities
from export.reference import Reference
from export.signature import PublicKey
from resnet import BadInput, CheckFailed
from resnet.archives import check_size

SAME_MODEL = 1e-5  # largest difference of a probability between two machines that run the same Keras model


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
            budget or differs from the certificate.
    """
    recorded = manifest.read(folder) if trust is None else signature.read(folder, trust)
    problems = list(inspection.find_problems(folder, recorded))
    if problems:
        raise CheckFailed("; ".join(problems))
    if trust is not None:
        print(f"{folder} is signed by the trusted key")
    print(f"the {len(recorded.files)} files of {folder} are unchanged")
    parity.check(recorded.certificate)
    stored = reference.load(folder, recorded)
    if full:
        if trust is None:
            print(
                f"warning: {folder} was not checked against a key (--trust), and --full runs the code of its models",
                file=sys.stderr,
            )
        recomputed = _certify_all(folder, recorded, stored)
    else:
        onnx = [variant for variant in recorded.certificate.variants if variant.name.partition("-")[0] == ONNX.name]
        loaded = [(variant, _load_onnx(folder, variant, recorded)) for variant in onnx]
        recomputed = parity.certify(stored.probabilities, loaded, stored.images, stored.labels).certificate
    parity.check(msgspec.structs.replace(recomputed, variants=_complete(recorded, recomputed)))
    print(parity.describe(recomputed))
    _compare(recorded.certificate, recomputed)
    return recorded


def _complete(recorded: Manifest, recomputed: Certificate) -> list[Variant]:
    """Return the recomputed variants, and the recorded ones in the place of those that were not run."""
    return [recomputed.find(variant.name) or variant for variant in recorded.certificate.variants]


def _certify_all(folder: Path, recorded: Manifest, stored: Reference) -> Certificate:
    """Return the certificate of all variants. They are loaded from a copy: what was hashed is what is loaded."""
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
        return parity.certify(expected, variants, stored.images, stored.labels).certificate


def _check_answers(folder: Path, stored: Reference, expected: Probabilities) -> None:
    """Raise `CheckFailed` if the recorded answers of the original are not those that it gives."""
    row = parity.compare(stored.probabilities, expected, stored.labels, max(parity.BATCH_SIZES), SAME_MODEL)
    if not row.max_difference <= SAME_MODEL or row.top1_disagreements:
        raise CheckFailed(
            f"{folder / reference.NAME} does not hold the answers of the Keras original, which differ by up to "
            f"{row.max_difference:.3g}"
        )


def _load_onnx(folder: Path, variant: Variant, recorded: Manifest) -> Predict:
    content = manifest.read_file(folder, variant.path, recorded)
    try:
        if variant.arithmetic:
            with suppress(ModuleNotFoundError):  # onnx; without it the file is computed as onnxruntime does on a CPU
                from export import half

                return half.load(io.BytesIO(content))
        loaded = session.open_session(content)
    except Exception as error:  # onnxruntime's exceptions have no common base below Exception
        raise BadInput(f"{folder / variant.path} cannot be loaded by onnxruntime: {error}") from None

    def predict(images: NDArray[np.uint8]) -> Probabilities:
        probabilities: Probabilities = loaded.run([recorded.output.name], {recorded.input.name: images})[0]
        recorded.check_output(probabilities.shape)
        return probabilities

    return predict


def _compare(recorded: Certificate, recomputed: Certificate) -> None:
    """Compare the images and accuracies of two certificates.

    Raises:
        CheckFailed: They differ.
    """
    for name in ("images", "images_sha256"):
        if getattr(recorded, name) != getattr(recomputed, name):
            raise CheckFailed(f"the certificate is about other held-out images: {name} differs")
    # Another machine rounds differently, which can change the class of a tie. Edited figures differ by far more.
    tolerance = max(1e-3, 1 / recomputed.images) + ROUNDING
    for subject, before, now in _pair_accuracies(recorded, recomputed):
        if not abs(before - now) <= tolerance:  # NaN is outside too
            raise CheckFailed(f"the certificate gives {subject} an accuracy of {before:.2%}, but it is {now:.2%}")


def _pair_accuracies(recorded: Certificate, recomputed: Certificate) -> Iterator[tuple[str, float, float]]:
    """Yield the recorded and the recomputed value of each accuracy; NaN stands for one that was not recorded."""
    yield "Keras", recorded.accuracy, recomputed.accuracy
    for now in recomputed.variants:
        before = recorded.find(now.name)
        accuracies = {row.batch_size: row.accuracy for row in before.rows} if before else {}
        for row in now.rows:
            yield f"{now.name} at batch size {row.batch_size}", accuracies.get(row.batch_size, math.nan), row.accuracy
