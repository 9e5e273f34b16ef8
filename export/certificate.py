"""The parity certificate: how far every converted model of a version is from the original, and how far it may be.

It is a part of the manifest. Loading this module needs no TensorFlow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Annotated, Literal

import msgspec

from export import statistics

ROUNDING = 1e-9  # error of a difference of two accuracies; one image of a million is a thousand times as much
REQUIRED = ("onnx", "saved_model")  # variants without which a certificate does not hold
# Limits of full precision, which no option of an export widens: a certificate with wider ones is none.
MAX_DIFFERENCE, MAX_LOGIT_DIFFERENCE, TIE = 1e-5, 0.01, 1e-5
PATHS = {"onnx": "model.onnx", "saved_model": "."}  # of the variants in full precision that others load by these names

Count = Annotated[int, msgspec.Meta(ge=0, le=statistics.MOST_IMAGES)]
"""A number of images."""

EvidenceRule = Literal["bound", "point"]
"""How a loss of accuracy is held against its budget: by its upper bound at 95 % confidence, or as it was measured."""


class Budget(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The permitted difference of a variant from the original; a limit of None is not checked.

    Attributes:
        max_difference: Largest absolute difference of any probability. If it is set, the predicted classes must be the
            same too.
        max_logit_difference: Largest absolute difference of any logit, as `export.statistics.compute_logits` has them.
        accuracy_drop: Largest loss of accuracy, as a share: 0.005 is half a point.
        evidence: What of the loss of accuracy must be within `accuracy_drop`.
        tie: If the two best probabilities of the original are closer than this, either class is right.
    """

    max_difference: float | None = None
    max_logit_difference: float | None = None
    accuracy_drop: float | None = None
    evidence: EvidenceRule = "bound"
    tie: float = TIE

    def __str__(self) -> str:
        limits = []
        if self.max_difference is not None:
            limits.append(f"a difference of {self.max_difference:.3g}")
        if self.max_logit_difference is not None:
            limits.append(f"{self.max_logit_difference:g} of logits")
        if self.accuracy_drop is not None:
            how = " with 95 % confidence" if self.evidence == "bound" else " as measured"
            limits.append(f"{100 * self.accuracy_drop:g} points less accuracy{how}")
        return " and ".join(limits)


class Parity(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The comparison of one variant at one batch size with the Keras original, on the same images.

    Attributes:
        batch_size: Images per call.
        max_difference: Largest absolute difference of any probability.
        mean_difference: Mean absolute difference of all probabilities.
        max_logit_difference: Largest absolute difference of any logit; see `export.statistics.compute_logits`.
        p999_logit_difference: Absolute difference that 99.9 % of the logits do not exceed.
        top1_agreement: Share of images with the same predicted class, 0 to 1.
        top1_disagreements: Number of images with another predicted class, without ties of the original.
        accuracy: Share of correctly classified images, 0 to 1.
        lost: Number of images that only the original classifies correctly.
        gained: Number of images that only the variant classifies correctly.
        drop_bound: Upper bound of the loss of accuracy, at 95 % confidence; see `export.statistics.bound_drop`.
        mcnemar: p value of the hypothesis that both are equally accurate; see `export.statistics.compute_mcnemar`.
        calibration_error: Difference between confidence and accuracy; see `training.calibration.measure_error`.
        class_agreement: `top1_agreement` of the images of each class; None for a class without images.
        class_cosine: Mean cosine between the logits of the images of each class; None for a class without images.
        worst: Indices of the images with the largest differences, at most ten, largest first.
    """

    batch_size: int
    max_difference: float
    mean_difference: float
    max_logit_difference: float
    p999_logit_difference: float
    top1_agreement: float
    top1_disagreements: Count
    accuracy: float
    lost: Count
    gained: Count
    drop_bound: float
    mcnemar: float
    calibration_error: float
    class_agreement: list[float | None]
    class_cosine: list[float | None]
    worst: list[int]


class Variant(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One converted model and its comparison with the original.

    Attributes:
        name: Name of its format, as `onnx` or `saved_model`; `onnx-fp16` and `onnx-int8` in lower precision.
        path: Its file inside the version folder; `.` for a SavedModel, which is the folder itself.
        precision: Precision of its computation: `fp32`, `fp16` or `int8`.
        method: How its precision was lowered, in words; empty for fp32.
        budget: The permitted difference.
        rows: The comparison at each batch size.
        speedup: Its speed on the CPU of the exporting machine, as a multiple of that of `onnx`, by batch size.
        arithmetic: The arithmetic of the comparison, in words, if it is another than that of the library that runs the
            file.
    """

    name: str
    path: str
    precision: str
    method: str
    budget: Budget
    rows: list[Parity]
    speedup: dict[int, float]
    arithmetic: str = ""

    def violations(self, images: int, accuracy: float) -> Iterator[str]:
        """Yield a clause for every figure outside the budget, with its worst value.

        Args:
            images: Number of images of the comparison.
            accuracy: Accuracy of the original, 0 to 1.
        """
        if not self.rows:
            yield f"there are no comparisons for {self.name}"
        if self.budget.max_difference is None and self.budget.accuracy_drop is None:
            yield f"{self.name} has no budget"
        if not self.rows:
            return
        yield from self.list_differences(images)
        yield from self._list_contradictions(images, accuracy)
        if self.budget.accuracy_drop is not None:
            yield from self._list_losses(images, accuracy, self.budget.accuracy_drop)

    def list_misfits(self) -> Iterator[str]:
        """Yield a clause if the variant is not what its name says, or has wider limits than an export gives it."""
        kind, _, precision = self.name.partition("-")
        path = f"model.{precision}.onnx" if precision and kind == "onnx" else PATHS.get(self.name, self.path)
        is_onnx = self.path.endswith(".onnx")
        if (self.path, self.precision) != (path, precision or "fp32") or is_onnx != (kind == "onnx"):
            yield f"{self.name} is {self.path!r} in {self.precision}"
        if self.precision != "fp32":
            return
        budget, limit, logits = self.budget, self.budget.max_difference, self.budget.max_logit_difference
        if limit is None and budget.accuracy_drop is None:
            return  # it has no budget
        if (
            limit is None
            or not 0 < limit <= MAX_DIFFERENCE
            or not (logits is None or 0 < logits <= MAX_LOGIT_DIFFERENCE)
            or not 0 <= budget.tie <= TIE
        ):
            yield f"{self.name} is allowed {budget}, more than any export allows in full precision"

    def list_differences(self, images: int) -> Iterator[str]:
        """Yield a clause for each limit of a difference that is exceeded."""
        limit = self.budget.max_difference
        row = self._worst(lambda row: row.max_difference)
        if limit is not None and not row.max_difference <= limit:  # NaN is outside too
            yield f"the largest difference {self._name(row)} is {row.max_difference:.3g}, above {limit:.3g}"
        elif math.isnan(row.max_difference):
            yield f"some answers {self._name(row)} are not numbers"
        row = self._worst(lambda row: row.max_logit_difference)
        logits = self.budget.max_logit_difference
        if logits is not None and not row.max_logit_difference <= logits:
            found = f"{row.max_logit_difference:.3g}"
            yield f"the largest difference of logits {self._name(row)} is {found}, above {logits:g}"
        row = self._worst(lambda row: row.top1_disagreements)
        if limit is not None and row.top1_disagreements:
            predictions = f"{row.top1_disagreements} of {images} predictions {self._name(row)}"
            yield f"{predictions} name another class than Keras"

    def _list_contradictions(self, images: int, accuracy: float) -> Iterator[str]:
        """Yield a clause if a row has an accuracy or a bound that does not follow from its lost and gained images."""
        for row in self.rows:
            follows = accuracy - (row.lost - row.gained) / max(1, images)
            bound = statistics.bound_drop(row.lost, row.gained, max(1, images))
            agree = abs(row.accuracy - follows) <= ROUNDING and abs(row.drop_bound - bound) <= ROUNDING
            if not agree or row.lost + row.gained > images:
                yield (
                    f"the figures {self._name(row)} contradict each other: {row.lost} lost and {row.gained} gained of "
                    f"{images} images are an accuracy of {follows:.2%} and a loss of at most {100 * bound:.2f} points"
                )
                return

    def _list_losses(self, images: int, accuracy: float, drop: float) -> Iterator[str]:
        """Yield a clause if the accuracy is too low, or the images cannot show that it is not."""
        row = self._worst(lambda row: -row.accuracy)
        # In floating point, 59.2 % less 59.1 % is slightly more than 0.1 %.
        if not accuracy - row.accuracy <= drop + ROUNDING:
            yield (
                f"the accuracy {self._name(row)} is {row.accuracy:.2%}, {100 * (accuracy - row.accuracy):.2f} points "
                f"below Keras' {accuracy:.2%}; {100 * drop:g} are allowed"
            )
            return
        row = self._worst(lambda row: row.drop_bound)
        if self.budget.evidence == "bound" and not row.drop_bound <= drop + ROUNDING:
            needed = statistics.count_needed(row.lost, row.gained, images, drop)
            more = f"about {needed:,} images like these would" if needed else "no number of images like these would"
            yield (
                f"the {images:,} held-out images do not show that {self.name} loses at most {100 * drop:g} points of "
                f"accuracy: {row.lost} lost and {row.gained} gained at batch size {row.batch_size} may be a loss of "
                f"{100 * row.drop_bound:.2f} points, at 95 % confidence; {more}, and --evidence point accepts the "
                "loss as measured"
            )

    def _worst(self, figure: Callable[[Parity], float]) -> Parity:
        """Return the row with the largest value of a figure; NaN is larger than any number."""
        return max(self.rows, key=lambda row: math.inf if math.isnan(figure(row)) else figure(row))

    def _name(self, row: Parity) -> str:
        return f"of {self.name} at batch size {row.batch_size}"


class Certificate(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The comparison of every variant with the original, on images that the model was not trained on.

    Attributes:
        images: Number of images.
        images_sha256: Hash of their pixels and labels.
        accuracy: Share of images that the Keras original classifies correctly, 0 to 1.
        calibration_error: Its calibration error; see `Parity`.
        variants: The converted models, those of `REQUIRED` among them.
        temperature: The number by which its training divided the logits; see `training.calibration`.
        uncalibrated_error: Its calibration error before that; None if the training left the logits as they were.
    """

    images: Count
    images_sha256: str
    accuracy: float
    calibration_error: float
    variants: list[Variant]
    temperature: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    uncalibrated_error: float | None = None

    def find(self, name: str) -> Variant | None:
        """Return the variant with this name, or None."""
        return next((variant for variant in self.variants if variant.name == name), None)

    def violations(self) -> Iterator[str]:
        """Yield a clause for every figure outside its budget, and for missing comparisons."""
        for name in REQUIRED:
            if not self.find(name):
                yield f"there are no comparisons for {name}"
        if self.images < 1:
            yield "it was made without images"
        names = [variant.name for variant in self.variants]
        if len(set(names)) < len(names) or len({variant.path for variant in self.variants}) < len(names):
            yield "two variants have one name, or one file"
        for variant in self.variants:
            yield from variant.list_misfits()
        for variant in self.variants:
            yield from variant.violations(self.images, self.accuracy)
