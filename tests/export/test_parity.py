"""The comparison itself, on numbers that can be checked by hand."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from export import parity
from export.manifest import Budget, Certificate, Parity, Variant
from export.parity import BudgetError, ShapeError

EXPECTED = np.array([[0.7, 0.2, 0.1], [0.1, 0.5, 0.4], [0.30000, 0.34999, 0.35001]], np.float32)
BUDGET = Budget(max_difference=1e-5)
LABELS = np.array([0, 1, 1], np.int32)


@pytest.fixture
def small_network() -> None:
    """Nothing is trained here."""


def compare(actual: np.ndarray, tie: float = 1e-3) -> Parity:
    """Compare with `EXPECTED` at batch size 3."""
    return parity.compare(EXPECTED, actual, LABELS, 3, tie)


def test_equal_answers_have_no_difference() -> None:
    """All figures are those of the original."""
    row = compare(EXPECTED.copy())
    assert (row.max_difference, row.mean_difference) == (0, 0)
    assert (row.top1_agreement, row.top1_disagreements) == (1, 0)
    assert row.accuracy == pytest.approx(2 / 3)


def test_differences_are_the_largest_and_the_mean_of_all_probabilities() -> None:
    """A move of 0.09 from one class to another: the largest is 0.09, the mean 0.18 / 9."""
    actual = EXPECTED.copy()
    actual[0] += np.array([-0.09, 0.09, 0], np.float32)
    row = compare(actual)
    assert row.max_difference == pytest.approx(0.09, abs=1e-6)
    assert row.mean_difference == pytest.approx(0.02, abs=1e-6)
    assert row.top1_disagreements == 0
    assert row.worst == [0, 1, 2]


def test_classes_and_the_worst_images_are_named() -> None:
    """Class 1 has two images, of which one is answered otherwise; class 2 has none."""
    actual = EXPECTED.copy()
    actual[1] = [0.1, 0.4, 0.5]
    row = compare(actual)
    assert row.class_agreement == [1.0, 0.5, None]
    assert row.worst == [1, 0, 2]
    many = np.tile(EXPECTED, (5, 1))
    later = many.copy()
    later[11] += 0.01
    assert parity.compare(many, later, np.tile(LABELS, 5), 3, 1e-3).worst == [11, *range(9)]


def test_another_class_counts_unless_the_original_was_a_tie() -> None:
    """The last row's best two differ by 2e-5: below a tie of 1e-3, above one of 1e-5."""
    actual = EXPECTED[:, [0, 2, 1]]  # turns the second and the third answer
    assert compare(actual).top1_agreement == pytest.approx(1 / 3)
    assert compare(actual, tie=1e-3).top1_disagreements == 1
    assert compare(actual, tie=1e-5).top1_disagreements == 2


@pytest.mark.parametrize("actual", [EXPECTED[:, :2], EXPECTED[:2], EXPECTED.astype(np.float64)])
def test_another_shape_or_dtype_is_a_failure_of_its_own(actual: np.ndarray) -> None:
    """There is nothing to compare then."""
    with pytest.raises(ShapeError, match="the original's is float32"):
        compare(actual)


def certificate(budget: Budget = BUDGET, **changes: float) -> Certificate:
    """Return a certificate that holds but for `changes` in one row."""
    good = {"max_difference": 1e-7, "mean_difference": 1e-8, "top1_agreement": 1.0, "accuracy": 0.9}
    row = Parity(batch_size=1, top1_disagreements=0, class_agreement=[1.0], worst=[0], **good)
    rows, bad = [row], [msgspec.structs.replace(row, batch_size=3, **changes)]
    onnx = Variant("onnx", "model.onnx", "fp32", "", BUDGET, rows, {})
    return Certificate(10, "hash", 0.9, [onnx, Variant("saved_model", ".", "fp32", "", budget, bad, {})])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_difference": 2e-5}, "largest difference of saved_model at batch size 3 is 2e-05, above 1e-05"),
        ({"max_difference": float("nan")}, "largest difference of saved_model at batch size 3 is nan"),
        ({"top1_disagreements": 2}, "2 of 10 predictions of saved_model at batch size 3 name another class"),
    ],
)
def test_a_broken_budget_is_named(changes: dict[str, float], message: str) -> None:
    """The error says which figure of which variant, and by how much; NaN is outside of any budget."""
    parity.check(certificate())
    with pytest.raises(BudgetError, match=message):
        parity.check(certificate(**changes))


def test_a_figure_is_named_once_at_its_worst() -> None:
    """Not once for each batch size: the sentence would say the same many times."""
    row = certificate().variants[0].rows[0]
    rows = [msgspec.structs.replace(row, batch_size=size, max_difference=size * 1e-3) for size in (1, 64, 3)]
    variant = Variant("onnx", "model.onnx", "fp32", "", BUDGET, rows, {})
    assert list(variant.violations(10, 0.9)) == [
        "the largest difference of onnx at batch size 64 is 0.064, above 1e-05"
    ]


def test_answers_that_are_no_numbers_are_within_no_budget() -> None:
    """Also where only the accuracy counts: the first class may be right by chance."""
    with pytest.raises(BudgetError, match="some answers of saved_model at batch size 3 are not numbers"):
        parity.check(certificate(Budget(accuracy_drop=0.5), max_difference=float("nan")))


def test_a_certificate_of_an_earlier_release_keeps_its_digest() -> None:
    """It names no arithmetic, and a field that was not there is not written."""
    variant = certificate().variants[0]
    assert b"arithmetic" not in msgspec.json.encode(variant)
    assert b"arithmetic" in msgspec.json.encode(msgspec.structs.replace(variant, arithmetic="float16"))


def test_a_budget_of_accuracy_allows_other_answers_but_not_worse_ones() -> None:
    """Half a point: 0.2 points less is within it, a point less is not, and what is no number is not. A loss of exactly
    the budget is within it too, though 0.9 - 0.899 is more than 0.001 to a computer.
    """
    drop = Budget(accuracy_drop=0.005)
    parity.check(certificate(drop, accuracy=0.898, max_difference=0.3, top1_disagreements=5))
    parity.check(certificate(drop, accuracy=0.99))
    parity.check(certificate(Budget(accuracy_drop=0.001), accuracy=0.899))
    with pytest.raises(BudgetError, match="is 89.80%, 0.20 points below"):
        parity.check(certificate(Budget(accuracy_drop=0.001), accuracy=0.898))
    with pytest.raises(BudgetError, match="is 89.00%, 1.00 points below Keras' 90.00%; 0.5 are allowed"):
        parity.check(certificate(drop, accuracy=0.89))
    with pytest.raises(BudgetError, match="is nan%"):
        parity.check(certificate(drop, accuracy=float("nan")))


def test_missing_evidence_does_not_hold() -> None:
    """A certificate without a variant, a row or a budget proves nothing."""
    empty = Certificate(0, "hash", 0.9, [])
    assert len(list(empty.violations())) == 3
    bare = Certificate(
        1, "hash", 0.9, [Variant(name, "", "", "", Budget(), [], {}) for name in ("onnx", "saved_model")]
    )
    assert [text.rpartition(" ")[2] for text in bare.violations()] == ["onnx", "budget", "saved_model", "budget"]
