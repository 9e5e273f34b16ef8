"""The comparison of converted models with the Keras original, on images that the model was not trained on."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from export import statistics
from export.certificate import Certificate, Parity, Variant
from resnet import CheckFailed
from training.calibration import measure_error

Probabilities = NDArray[np.float32]
Predict = Callable[[NDArray[np.uint8]], Probabilities]
"""From uint8 [n, height, width, channels] to float32 [n, classes]."""

BATCH_SIZES = (1, 3, 64)
WORST = 10  # images that the certificate lists for each variant and batch size


class Comparison(NamedTuple):
    """A comparison of variants with the original.

    Attributes:
        certificate: Its figures.
        predictions: The classes that each variant answered, int32 [n], by its name; at the smallest batch size.
    """

    certificate: Certificate
    predictions: dict[str, NDArray[np.int32]]


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
    expected: Probabilities,
    variants: Sequence[tuple[Variant, Predict]],
    images: NDArray[np.uint8],
    labels: NDArray[np.int32],
) -> Comparison:
    """Compare every variant with the original on all images, at every batch size of `BATCH_SIZES`.

    Args:
        expected: The answers of the Keras original, float32 [n, classes].
        variants: The converted models, each with the function that runs it; their rows are ignored.
        images: Held-out images, uint8 [n, height, width, channels].
        labels: Their labels, int32 [n].

    Returns:
        A comparison whose certificate has new rows for all variants.

    Raises:
        RunError: A model cannot be run.
        ShapeError: The output of a variant has another shape or dtype than that of the original.
    """
    measured = []
    predictions: dict[str, NDArray[np.int32]] = {}
    for variant, run in variants:
        rows = []
        for size in BATCH_SIZES:
            actual = predict(run, images, size, f"{variant.name}, batch size {size}")
            rows.append(compare(expected, actual, labels, size, variant.budget.tie))
            predictions.setdefault(variant.name, actual.argmax(axis=1).astype(np.int32))
        measured.append(msgspec.structs.replace(variant, rows=rows))
    calibration = measure_error(expected, labels)
    accuracy, heldout = _accuracy(expected, labels), hash_images(images, labels)
    return Comparison(Certificate(len(images), heldout, accuracy, calibration, measured), predictions)


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
    check_form(expected, actual, batch_size)
    difference = np.abs(expected.astype(np.float64) - actual)
    logits, actual_logits = statistics.compute_logits(expected), statistics.compute_logits(actual)
    logit_difference = np.abs(logits - actual_logits)
    cosines = statistics.compute_cosines(logits, actual_logits)
    answers, actual_answers = expected.argmax(axis=1), actual.argmax(axis=1)
    agree, right, actual_right = answers == actual_answers, answers == labels, actual_answers == labels
    second, first = np.sort(expected, axis=1)[:, -2:].T
    lost, gained = int(np.sum(right & ~actual_right)), int(np.sum(~right & actual_right))
    return Parity(
        batch_size=batch_size,
        max_difference=float(difference.max()),
        mean_difference=float(difference.mean()),
        max_logit_difference=float(logit_difference.max()),
        p999_logit_difference=float(np.quantile(logit_difference, 0.999)),
        top1_agreement=float(agree.mean()),
        top1_disagreements=int(np.sum(~agree & (first - second >= tie))),
        accuracy=_accuracy(actual, labels),
        lost=lost,
        gained=gained,
        drop_bound=statistics.bound_drop(lost, gained, len(labels)),
        mcnemar=statistics.compute_mcnemar(lost, gained),
        calibration_error=measure_error(actual, labels),
        class_agreement=_average(agree, labels, expected.shape[1]),
        class_cosine=_average(cosines, labels, expected.shape[1]),
        worst=np.argsort(-np.nan_to_num(difference.max(axis=1), nan=np.inf), kind="stable")[:WORST].tolist(),
    )


def check_form(expected: Probabilities, actual: Probabilities, batch_size: int) -> None:
    """Raise `ShapeError` if answers have another shape or dtype than those of the original."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise ShapeError(
            f"at batch size {batch_size} the output is {actual.dtype} {list(actual.shape)}, "
            f"the original's is {expected.dtype} {list(expected.shape)}"
        )


def hash_images(images: NDArray[np.uint8], labels: NDArray[np.int32]) -> str:
    """Return the SHA-256 of pixels and labels."""
    digest = hashlib.sha256(repr(images.shape).encode())
    digest.update(np.ascontiguousarray(images).data)
    digest.update(np.ascontiguousarray(labels.astype("<i4")).data)
    return digest.hexdigest()


def describe(certificate: Certificate) -> str:
    """Return the certificate as tables to print: the differences, then the accuracy."""
    differences = [
        ("difference", "batch", "largest", "mean", "largest of logits", "99.9 % within", "cosine", "same class")
    ]
    accuracies = [("accuracy", "batch", "right", "lost", "gained", "McNemar p", "loss below", "calibration error")]
    if certificate.uncalibrated_error is not None:
        before = f"{certificate.uncalibrated_error:.4f}"
        accuracies.append(("uncalibrated", "", f"{certificate.accuracy:.2%}", "", "", "", "", before))
    accuracies.append(
        ("keras", "", f"{certificate.accuracy:.2%}", "", "", "", "", f"{certificate.calibration_error:.4f}")
    )
    for variant in certificate.variants:
        for row in variant.rows:
            name, size = variant.name, str(row.batch_size)
            cosines = [cosine for cosine in row.class_cosine if cosine is not None]
            differences.append(
                (
                    name,
                    size,
                    f"{row.max_difference:.1e}",
                    f"{row.mean_difference:.1e}",
                    f"{row.max_logit_difference:.1e}",
                    f"{row.p999_logit_difference:.1e}",
                    f"{min(cosines, default=math.nan):.6f}",
                    f"{row.top1_agreement:.2%}",
                )
            )
            accuracies.append(
                (
                    name,
                    size,
                    f"{row.accuracy:.2%}",
                    str(row.lost),
                    str(row.gained),
                    f"{row.mcnemar:.2g}",
                    f"{100 * row.drop_bound:.2f} points",
                    f"{row.calibration_error:.4f}",
                )
            )
    lines = [*_lay_out(differences), *_lay_out(accuracies)]
    lines.append(f"  on {certificate.images:,} held-out images; cosine: lowest mean of a class; loss: 95 % confidence")
    if certificate.uncalibrated_error is not None:
        lines.append(f"  the training divided the logits by {certificate.temperature:.3g}, to calibrate the confidence")
    for variant in certificate.variants:
        farthest = max(variant.rows, key=lambda row: row.max_difference, default=None)
        worst = ", ".join(map(str, farthest.worst[:3])) if farthest and farthest.max_difference else ""
        speed = ", ".join(f"{times:.1f}x at batch size {size}" for size, times in variant.speedup.items())
        lines.append(f"  {variant.name:<12} {variant.precision}, allowed {variant.budget}")
        notes = [
            variant.method,
            variant.arithmetic and f"compared with {variant.arithmetic}",
            speed and f"speed {speed}",
            worst and f"largest differences on images {worst}",
        ]
        lines += [f"{'':<15}{note}" for note in notes if note]
    return "\n".join(lines)


def _lay_out(table: Sequence[Sequence[str]]) -> list[str]:
    """Return the rows of a table as lines, each column as wide as its widest text."""
    widths = [max(len(text) for text in column) for column in zip(*table, strict=True)]
    return [
        f"  {row[0]:<{widths[0]}}"
        + "".join(f"  {text:>{width}}" for text, width in zip(row[1:], widths[1:], strict=True))
        for row in table
    ]


def predict(run: Predict, images: NDArray[np.uint8], batch_size: int, title: str) -> Probabilities:
    """Return the answers of a model to all images, float32 [n, classes], computed in batches of exactly one size.

    Args:
        run: The model.
        images: uint8 [n, height, width, channels].
        batch_size: Images per call; the last batch, or the only one, is filled with further copies of the images.
        title: What the model is called, in the progress display.

    Raises:
        RunError: The model cannot be run.
    """
    count = len(images)
    starts = range(0, count, batch_size)
    try:
        with _track(starts, title) as batches:
            answers = [run(images[_fill(start, batch_size, count)]) for start in batches]
            return np.concatenate(answers)[:count]
    except ParityError:
        raise
    except Exception as error:  # each library has its own exceptions
        raise RunError(f"{title}: the model cannot be run: {error}") from error


def _fill(start: int, size: int, count: int) -> slice | NDArray[np.intp]:
    """Return the indices of a batch; after the last image the first ones follow again."""
    return slice(start, start + size) if start + size <= count else np.arange(start, start + size) % count


@contextmanager
def _track(starts: range, title: str) -> Iterator[Iterable[int]]:
    """Show progress where `rich` is installed; the display ends even if a model fails."""
    try:
        from rich import get_console
        from rich.progress import Progress
    except ImportError:
        yield starts
        return
    with Progress(disable=get_console().is_jupyter) as progress:  # there it would need a package of its own
        yield progress.track(starts, description=f"  {title:<28}")


def _accuracy(probabilities: Probabilities, labels: NDArray[np.int32]) -> float:
    return float(np.mean(probabilities.argmax(axis=1) == labels))


def _average(values: NDArray[Any], labels: NDArray[np.int32], classes: int) -> list[float | None]:
    """Return the mean of the values of each class; None for a class without any."""
    counts = np.bincount(labels, minlength=classes)
    sums = np.bincount(labels, weights=values, minlength=classes)
    return [float(total / count) if count else None for total, count in zip(sums, counts, strict=True)]
