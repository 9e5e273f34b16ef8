"""The proof: a converted model against the Keras original, on images that the model was not trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from rich.progress import track

from export.manifest import Budget, Certificate, Parity
from resnet import CheckFailed

Probabilities = NDArray[np.float32]
Predict = Callable[[NDArray[np.uint8]], Probabilities]
"""From uint8 [n, height, width, 3] to float32 [n, classes]."""

BATCH_SIZES = (1, 3, 64)


class ParityError(CheckFailed):
    """A converted model does not compute what the original does."""


class ShapeError(ParityError):
    """The output has another shape or dtype than the original's."""


class BudgetError(ParityError):
    """A figure of the certificate is outside its budget."""


def certify(
    reference: Predict,
    variants: Mapping[str, Predict],
    images: NDArray[np.uint8],
    labels: NDArray[np.int32],
    budget: Budget,
) -> Certificate:
    """Compare every variant with the original on all images, at every batch size.

    Args:
        reference: The Keras original.
        variants: The converted models, by name.
        images: Held-out images, uint8 [n, height, width, 3].
        labels: Their classes, int32 [n].
        budget: What a variant may differ by.

    Raises:
        ShapeError: A variant answers in another shape or dtype.
    """
    expected = _predict(reference, images, max(BATCH_SIZES), "Keras")
    found = {
        name: [
            compare(expected, _predict(predict, images, size, f"{name}, batch size {size}"), labels, size, budget.tie)
            for size in BATCH_SIZES
        ]
        for name, predict in variants.items()
    }
    return Certificate(
        images=len(images),
        images_sha256=hash_images(images, labels),
        accuracy=_accuracy(expected, labels),
        budget=budget,
        variants=found,
    )


def check(certificate: Certificate) -> None:
    """Raise `BudgetError` if a figure of the certificate is outside its budget; the message names each."""
    violations = list(certificate.violations())
    if violations:
        raise BudgetError("the converted model does not compute what the original does: " + "; ".join(violations))


def compare(
    expected: Probabilities, actual: Probabilities, labels: NDArray[np.int32], batch_size: int, tie: float
) -> Parity:
    """Return the figures of one variant at one batch size.

    Args:
        expected: The original's probabilities, float32 [n, classes].
        actual: The variant's, of the same shape.
        labels: The right classes, int32 [n].
        batch_size: Images in one call to the variant.
        tie: Where the original's two best probabilities are closer than this, either class may win.

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
    return Parity(
        batch_size=batch_size,
        max_difference=float(difference.max()),
        mean_difference=float(difference.mean()),
        top1_agreement=float(agree.mean()),
        top1_disagreements=int(np.sum(~agree & (first - second >= tie))),
        accuracy=_accuracy(actual, labels),
    )


def hash_images(images: NDArray[np.uint8], labels: NDArray[np.int32]) -> str:
    """Return the SHA-256 of pixels and classes."""
    digest = hashlib.sha256(repr(images.shape).encode())
    digest.update(np.ascontiguousarray(images).data)
    digest.update(np.ascontiguousarray(labels.astype("<i4")).data)
    return digest.hexdigest()


def describe(certificate: Certificate) -> str:
    """Return the certificate as a table for people."""
    rows: list[Sequence[str]] = [("", "batch", "max difference", "mean", "same class", "accuracy")]
    rows.append(("keras", "", "", "", "", f"{certificate.accuracy:.2%}"))
    rows += [
        (
            name,
            str(row.batch_size),
            f"{row.max_difference:.1e}",
            f"{row.mean_difference:.1e}",
            f"{row.top1_agreement:.2%}",
            f"{row.accuracy:.2%}",
        )
        for name, parities in certificate.variants.items()
        for row in parities
    ]
    table = "\n".join(f"  {a:<12} {b:>5}  {c:>14}  {d:>8}  {e:>10}  {f:>8}" for a, b, c, d, e, f in rows)
    budget = certificate.budget.max_difference
    return f"{table}\n  on {certificate.images:,} held-out images; largest difference allowed {budget:.0e}"


def _predict(predict: Predict, images: NDArray[np.uint8], batch_size: int, title: str) -> Probabilities:
    starts = range(0, len(images), batch_size)
    return np.concatenate([predict(images[start : start + batch_size]) for start in track(starts, f"  {title:<28}")])


def _accuracy(probabilities: Probabilities, labels: NDArray[np.int32]) -> float:
    return float(np.mean(probabilities.argmax(axis=1) == labels))
