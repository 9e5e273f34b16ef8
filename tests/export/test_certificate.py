"""What the figures of a certificate must be to be believed."""

from __future__ import annotations

import math

import msgspec
import pytest

from export.certificate import Budget, Certificate, Variant
from tests.versions import make_row


@pytest.fixture
def small_network() -> None:
    """Nothing is trained here."""


def make_variant(budget: Budget, *changes: dict[str, float]) -> Variant:
    """Return a variant with one row for each change, at batch sizes 1, 2 and so on, of 10 images."""
    rows = []
    for size, change in enumerate(changes, 1):
        rows.append(make_row(size, change.get("accuracy", 1.0), 10))
        rows[-1] = msgspec.structs.replace(rows[-1], **{k: v for k, v in change.items() if k != "accuracy"})
    return Variant("onnx", "model.onnx", "fp32", "", budget, rows, {})


BOTH = Budget(max_difference=1e-5, accuracy_drop=0.1, evidence="point")


@pytest.mark.parametrize(
    ("budget", "changes", "clauses"),
    [
        (BOTH, [{}, {"max_difference": 1e-5, "accuracy": 0.9}], []),
        (Budget(max_difference=1.0), [{"accuracy": 0.1, "max_logit_difference": 99.0}], []),
        (Budget(accuracy_drop=1.0), [{"max_difference": 1.0, "top1_disagreements": 9}], []),
        (BOTH, [{}, {"top1_disagreements": 1}, {}], ["1 of 10 predictions of onnx at batch size 2 name another class"]),
        (
            BOTH,
            [{"max_difference": 2.0}, {"max_difference": math.nan}, {"max_difference": 3.0}],
            ["the largest difference of onnx at batch size 2 is nan, above 1e-05"],
        ),
        (
            BOTH,
            [{"max_difference": 1.0, "top1_disagreements": 2, "accuracy": 0.8}, {"accuracy": 0.7}],
            [
                "the largest difference of onnx at batch size 1 is 1, above 1e-05",
                "2 of 10 predictions of onnx at batch size 1 name another class than Keras",
                "the accuracy of onnx at batch size 2 is 70.00%, 30.00 points below Keras' 100.00%; 10 are allowed",
            ],
        ),
        (
            Budget(max_difference=1.0, max_logit_difference=0.01),
            [{"max_logit_difference": 0.01}],
            [],
        ),
        (
            Budget(max_difference=1.0, max_logit_difference=0.01),
            [{"max_logit_difference": 0.01}, {"max_logit_difference": 0.0101}],
            ["the largest difference of logits of onnx at batch size 2 is 0.0101, above 0.01"],
        ),
        (
            Budget(accuracy_drop=0.3),
            [{}, {"accuracy": 0.9}],
            ["the 10 held-out images do not show that onnx loses at most 30 points of accuracy: 1 lost and 0 gained"],
        ),
        (Budget(accuracy_drop=0.3), [{}], []),
        (
            Budget(accuracy_drop=0.3),
            [{"max_difference": math.nan}],
            ["some answers of onnx at batch size 1 are not numbers"],
        ),
        (
            Budget(accuracy_drop=0.0, evidence="point"),
            [{}, {"accuracy": 0.9}],
            ["the accuracy of onnx at batch size 2"],
        ),
        (BOTH, [{}, {"drop_bound": 0.1}], ["the figures of onnx at batch size 2 contradict each other: 0 lost and 0"]),
        (Budget(), [{}], ["onnx has no budget"]),
        (Budget(max_logit_difference=1.0), [{}], ["onnx has no budget"]),
        (BOTH, [], ["there are no comparisons for onnx"]),
        (Budget(), [], ["there are no comparisons for onnx", "onnx has no budget"]),
    ],
)
def test_a_budget_is_exact(budget: Budget, changes: list[dict[str, float]], clauses: list[str]) -> None:
    """A figure at its limit is within it, one beyond is named at its worst batch size, one without a limit is free."""
    found = list(make_variant(budget, *changes).violations(10, 1.0))
    assert len(found) == len(clauses), found
    assert all(text.startswith(clause) for text, clause in zip(found, clauses, strict=True))


def test_one_image_of_a_million_is_enough() -> None:
    """To be outside; what floating point adds to a loss is less."""
    limit = Budget(accuracy_drop=1e-6, evidence="point")
    for accuracy, count in ((1 - 1e-6, 0), (1 - 2e-6, 1)):
        variant = Variant("onnx", "", "fp32", "", limit, [make_row(1, accuracy, 10**6)], {})
        assert len(list(variant.violations(10**6, 1.0))) == count


def test_a_certificate_holds_with_one_image_and_each_format() -> None:
    """Without an image, or one of the formats, it does not; one more variant must hold too."""
    exact = Budget(max_difference=1e-5)
    onnx = Variant("onnx", "model.onnx", "fp32", "", exact, [make_row(images=1)], {})
    saved_model = msgspec.structs.replace(onnx, name="saved_model", path=".")
    loss = Budget(accuracy_drop=0.01, evidence="point")
    half = Variant("onnx-fp16", "model.fp16.onnx", "fp16", "", loss, [make_row(accuracy=0.0, images=1)], {})
    both = [saved_model, onnx]
    assert list(Certificate(1, "hash", 1.0, 0.0, both).violations()) == []
    nothing, *contradictions = Certificate(0, "hash", 1.0, 0.0, both).violations()
    assert nothing == "it was made without images"
    assert all("contradict each other" in text for text in contradictions)
    assert list(Certificate(1, "hash", 1.0, 0.0, [onnx]).violations()) == ["there are no comparisons for saved_model"]
    (clause,) = Certificate(1, "hash", 1.0, 0.0, [*both, half]).violations()
    assert clause.startswith("the accuracy of onnx-fp16 at batch size 1 is 0.00%")
    assert Certificate(1, "hash", 1.0, 0.0, both).find("saved_model") is saved_model
    assert Certificate(1, "hash", 1.0, 0.0, [onnx]).find("saved_model") is None


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        (Budget(max_difference=1e-5), "a difference of 1e-05"),
        (Budget(max_difference=1e-5, max_logit_difference=0.01), "a difference of 1e-05 and 0.01 of logits"),
        (Budget(accuracy_drop=0.005), "0.5 points less accuracy with 95 % confidence"),
        (BOTH, "a difference of 1e-05 and 10 points less accuracy as measured"),
        (
            Budget(max_difference=0.0, accuracy_drop=0.0),
            "a difference of 0 and 0 points less accuracy with 95 % confidence",
        ),
    ],
)
def test_a_budget_is_told_in_words(budget: Budget, text: str) -> None:
    """As the table of the certificate prints it; accuracy in points, which are hundredths."""
    assert str(budget) == text
