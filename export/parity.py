"""The comparison of converted models with the Keras original, on images that the model was not trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from export.manifest import Certificate, Parity, Variant
from resnet import CheckFailed

Probabilities = NDArray[np.float32]
Predict = Callable[[NDArray[np.uint8]], Probabilities]
"""From uint8 [n, height, width, 3] to float32 [n, classes]."""

BATCH_SIZES = (1, 3, 64)
WORST = 10  # images that the certificate lists for each variant and batch size


class ParityError(CheckFailed):
    """A converted model gives other answers than the original."""


class ShapeError(ParityError):
    """The output has another shape or dtype than that of the original."""


class VariantError(ParityError):
    """A variant in lower precision is outside its budget; the version is published without it."""


class RunError(ParityError):
    """A converted model cannot be run, or not at every batch size."""


class EvidenceError(ParityError):
    """The held-out images are not those of the training: the original's accuracy on them differs from metrics.json."""


class BudgetError(ParityError):
    """A figure of the certificate is outside its budget."""


def certify(
    reference: Predict,
    variants: Sequence[tuple[Variant, Predict]],
    images: NDArray[np.uint8],
    labels: NDArray[np.int32],
    title: str = "Keras",
) -> Certificate:
    """Compare every variant with the original on all images, at every batch size of `BATCH_SIZES`.

    Args:
        reference: The Keras original.
        variants: The converted models, each with the function that runs it; their rows are ignored.
        images: Held-out images, uint8 [n, height, width, 3].
        labels: Their labels, int32 [n].
        title: What the original is called.

    Returns:
        A certificate with new rows for all variants.

    Raises:
        RunError: A model cannot be run.
        ShapeError: The output of a variant has another shape or dtype than that of the original.
    """
    expected = _predict(reference, images, max(BATCH_SIZES), title)
    measured = []
    for variant, predict in variants:
        rows = []
        for size in BATCH_SIZES:
            actual = _predict(predict, images, size, f"{variant.name}, batch size {size}")
            rows.append(compare(expected, actual, labels, size, variant.budget.tie))
        measured.append(msgspec.structs.replace(variant, rows=rows))
    return Certificate(len(images), hash_images(images, labels), _accuracy(expected, labels), measured)


def check(certificate: Certificate) -> None:
    """Raise `BudgetError`, which names every figure of the certificate that is outside its budget."""
    violations = list(certificate.violations())
    if violations:
        raise BudgetError("the converted model gives other answers than the original: " + "; ".join(violations))


def compare(
    expected: Probabilities, actual: Probabilities, labels: NDArray[np.int32], batch_size: int, tie: float
) -> Parity:
    """Compare the output of one variant at one batch size with that of the original.

    Args:
        expected: Probabilities of the original, float32 [n, classes].
        actual: Probabilities of the variant, float32 [n, classes].
        labels: The labels of the images, int32 [n].
        batch_size: Images per call of the variant.
        tie: If the two best probabilities of the original are closer than this, either class is right.

    Raises:
        ShapeError: The two differ in shape or dtype.
    """
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise ShapeError(
            f"at batch size {batch_size} the output is {actual.dtype} {list(actual.shape)}, "
            f"the original's is {expected.dtype} {list(expected.shape)}"
        )
    difference = np.abs(expected.astype(np.float64) - actual)
    agree = expected.argmax(axis=1) == actual.argmax(axis=1)
    second, first = np.sort(expected, axis=1)[:, -2:].T
    classes = [agree[labels == label] for label in range(expected.shape[1])]
    return Parity(
        batch_size=batch_size,
        max_difference=float(difference.max()),
        mean_difference=float(difference.mean()),
        top1_agreement=float(agree.mean()),
        top1_disagreements=int(np.sum(~agree & (first - second >= tie))),
        accuracy=_accuracy(actual, labels),
        class_agreement=[float(same.mean()) if len(same) else None for same in classes],
        worst=np.argsort(-difference.max(axis=1), kind="stable")[:WORST].tolist(),
    )


def hash_images(images: NDArray[np.uint8], labels: NDArray[np.int32]) -> str:
    """Return the SHA-256 of pixels and labels."""
    digest = hashlib.sha256(repr(images.shape).encode())
    digest.update(np.ascontiguousarray(images).data)
    digest.update(np.ascontiguousarray(labels.astype("<i4")).data)
    return digest.hexdigest()


def describe(certificate: Certificate) -> str:
    """Return the certificate as a table to print."""
    rows: list[Sequence[str]] = [("", "batch", "max difference", "mean", "same class", "accuracy")]
    rows.append(("keras", "", "", "", "", f"{certificate.accuracy:.2%}"))
    rows += [
        (
            variant.name,
            str(row.batch_size),
            f"{row.max_difference:.1e}",
            f"{row.mean_difference:.1e}",
            f"{row.top1_agreement:.2%}",
            f"{row.accuracy:.2%}",
        )
        for variant in certificate.variants
        for row in variant.rows
    ]
    lines = [f"  {a:<12} {b:>5}  {c:>14}  {d:>8}  {e:>10}  {f:>8}" for a, b, c, d, e, f in rows]
    lines.append(f"  on {certificate.images:,} held-out images")
    for variant in certificate.variants:
        worst = ", ".join(str(index) for index in variant.rows[-1].worst[:3]) if variant.rows else ""
        speed = ", ".join(f"{times:.1f}x at batch size {size}" for size, times in variant.speedup.items())
        lines.append(
            f"  {variant.name:<12} {variant.precision}, allowed {variant.budget}"
            + (f"; {variant.method}" if variant.method else "")
            + (f"; compared with {variant.arithmetic}" if variant.arithmetic else "")
            + (f"; speed {speed}" if speed else "")
            + (f"; largest differences on images {worst}" if worst else "")
        )
    return "\n".join(lines)


def _predict(predict: Predict, images: NDArray[np.uint8], batch_size: int, title: str) -> Probabilities:
    from rich.progress import Progress  # here, because a server compares models without it

    starts = range(0, len(images), batch_size)
    try:
        with Progress() as progress:  # which ends its display even if a model fails
            batches = progress.track(starts, description=f"  {title:<28}")
            return np.concatenate([predict(images[start : start + batch_size]) for start in batches])
    except ParityError:
        raise
    except Exception as error:  # each library has its own exceptions
        raise RunError(f"{title}: the model cannot be run: {error}") from error


def _accuracy(probabilities: Probabilities, labels: NDArray[np.int32]) -> float:
    return float(np.mean(probabilities.argmax(axis=1) == labels))
