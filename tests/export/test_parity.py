"""The comparison itself, on numbers that can be checked by hand."""

from __future__ import annotations

import hashlib
import math

import msgspec
import numpy as np
import pytest
from rich.progress import Progress

from export import parity, statistics
from export.certificate import Budget, Certificate, Parity, Variant
from export.parity import BudgetError, RunError, ShapeError
from tests.versions import make_row

EXPECTED = np.array([[0.7, 0.2, 0.1], [0.1, 0.5, 0.4], [0.30000, 0.34999, 0.35001]], np.float32)
BUDGET = Budget(max_difference=1e-5, max_logit_difference=0.01)
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


def test_losses_gains_and_classes_without_images_are_counted() -> None:
    """The original is right on the first two; the variant on the first and the last."""
    row = compare(EXPECTED[:, [0, 2, 1]])
    assert (row.lost, row.gained) == (1, 1)
    assert row.accuracy == pytest.approx(2 / 3)
    assert row.drop_bound == statistics.bound_drop(1, 1, 3)
    assert row.mcnemar == 1
    assert row.class_agreement == [1.0, 0.0, None]
    assert row.class_cosine[2] is None
    assert row.class_cosine[0] is not None
    assert row.class_cosine[0] < 1


def test_logits_show_what_probabilities_hide() -> None:
    """A class whose probability is a millionth of a millionth may be a hundred times as probable."""
    expected = np.array([[1.0, 1e-12, 1e-14]], np.float32)
    actual = np.array([[1.0, 1e-12, 1e-12]], np.float32)
    row = parity.compare(expected, actual, np.zeros(1, np.int32), 1, 0.0)
    assert row.max_difference < 1e-11
    assert row.max_logit_difference == pytest.approx(np.log(100) * 2 / 3, rel=1e-6)
    assert row.p999_logit_difference == pytest.approx(row.max_logit_difference, rel=0.01)


def test_answers_that_are_no_numbers_are_the_worst() -> None:
    """Each figure that they take part in is none either."""
    actual = EXPECTED.copy()
    actual[1, 2] = np.nan
    row = compare(actual)
    assert row.worst[0] == 1
    figures = row.max_difference, row.mean_difference, row.max_logit_difference, row.calibration_error
    assert np.isnan(figures).all()
    assert np.isnan(np.array(row.class_cosine, float)).tolist() == [False, True, True]  # and None


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


def certificate(budget: Budget = BUDGET, accuracy: float = 1.0, images: int = 1000, **changes: float) -> Certificate:
    """Return a certificate that holds but for the accuracy of one row, and `changes` of it."""
    good, bad = [make_row(images=images)], [make_row(3, accuracy, images, **changes)]
    onnx = Variant("onnx", "model.onnx", "fp32", "", BUDGET, good, {})
    if budget.accuracy_drop is None:
        return Certificate(images, "hash", 1.0, 0.0, [onnx, Variant("saved_model", ".", "fp32", "", budget, bad, {})])
    saved_model = msgspec.structs.replace(onnx, name="saved_model", path=".")
    reduced = Variant("onnx-int8", "model.int8.onnx", "int8", "", budget, bad, {})
    return Certificate(images, "hash", 1.0, 0.0, [onnx, saved_model, reduced])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_difference": 2e-5}, "largest difference of saved_model at batch size 3 is 2e-05, above 1e-05"),
        ({"max_difference": float("nan")}, "largest difference of saved_model at batch size 3 is nan"),
        ({"top1_disagreements": 2}, "2 of 1000 predictions of saved_model at batch size 3 name another class"),
        ({"max_logit_difference": 0.02}, "difference of logits of saved_model at batch size 3 is 0.02, above 0.01"),
        ({"max_logit_difference": float("nan")}, "difference of logits of saved_model at batch size 3 is nan"),
    ],
)
def test_a_broken_budget_is_named(changes: dict[str, float], message: str) -> None:
    """The error says which figure of which variant, and by how much; NaN is outside of any budget."""
    parity.check(certificate())
    with pytest.raises(BudgetError, match=message):
        parity.check(certificate(**changes))


def test_a_figure_is_named_once_at_its_worst() -> None:
    """Not once for each batch size: the sentence would say the same many times."""
    rows = [make_row(size, max_difference=size * 1e-3) for size in (1, 64, 3)]
    variant = Variant("onnx", "model.onnx", "fp32", "", BUDGET, rows, {})
    assert list(variant.violations(6, 1.0)) == ["the largest difference of onnx at batch size 64 is 0.064, above 1e-05"]


def test_answers_that_are_no_numbers_are_within_no_budget() -> None:
    """Also where only the accuracy counts: the first class may be right by chance."""
    with pytest.raises(BudgetError, match="some answers of onnx-int8 at batch size 3 are not numbers"):
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
    drop = Budget(accuracy_drop=0.005, evidence="point")
    parity.check(certificate(drop, accuracy=0.998, max_difference=0.3, max_logit_difference=9.0, top1_disagreements=5))
    parity.check(certificate(drop, accuracy=0.995))
    parity.check(certificate(Budget(accuracy_drop=0.003, evidence="point"), accuracy=0.997))
    with pytest.raises(BudgetError, match="is 99.80%, 0.20 points below"):
        parity.check(certificate(Budget(accuracy_drop=0.001), accuracy=0.998))
    with pytest.raises(BudgetError, match="is 99.00%, 1.00 points below Keras' 100.00%; 0.5 are allowed"):
        parity.check(certificate(drop, accuracy=0.99))
    broken = certificate(drop)
    broken.variants[2].rows[0] = msgspec.structs.replace(broken.variants[2].rows[0], accuracy=float("nan"))
    with pytest.raises(BudgetError, match="is nan%"):
        parity.check(broken)


def test_images_must_show_that_the_loss_is_within_the_budget() -> None:
    """Two lost of 1,000 are 0.2 points as measured, but may be 0.6. One is within half a point."""
    drop = Budget(accuracy_drop=0.005)
    parity.check(certificate(drop, accuracy=0.999))
    with pytest.raises(BudgetError) as caught:
        parity.check(certificate(drop, accuracy=0.998))
    assert str(caught.value).endswith(
        "the 1,000 held-out images do not show that onnx-int8 loses at most 0.5 points of accuracy: 2 lost and 0 "
        "gained at batch size 3 may be a loss of 0.60 points, at 95 % confidence; about 1,496 images like these would, "
        "and --evidence point accepts the loss as measured"
    )
    parity.check(certificate(Budget(accuracy_drop=0.005, evidence="point"), accuracy=0.998))
    with pytest.raises(BudgetError, match="no number of images like these would"):
        parity.check(certificate(Budget(accuracy_drop=0.002), accuracy=0.998))


@pytest.mark.parametrize(
    "changes",
    [
        {"lost": 1},
        {"gained": 1},
        {"drop_bound": 0.0},
        {"drop_bound": 0.01},
        {"drop_bound": math.nan},
        {"lost": 501, "gained": 501, "drop_bound": statistics.bound_drop(501, 501, 1000)},
    ],
)
def test_figures_of_a_row_must_follow_from_its_counts(changes: dict[str, float]) -> None:
    """Whoever edits one of them must edit all; counts can be no more than the images."""
    message = "the figures of saved_model at batch size 3 contradict each other: .* lost and .* gained of 1000 images"
    with pytest.raises(BudgetError, match=message):
        parity.check(certificate(**changes))


def test_missing_evidence_does_not_hold() -> None:
    """A certificate without a variant, a row or a budget proves nothing."""
    empty = Certificate(0, "hash", 0.9, 0.0, [])
    assert len(list(empty.violations())) == 3
    bare = Certificate(
        1, "hash", 0.9, 0.0, [Variant(name, "", "", "", Budget(), [], {}) for name in ("onnx", "saved_model")]
    )
    clauses = ["onnx", "budget", "saved_model", "budget"]
    assert [text.rpartition(" ")[2] for text in bare.violations()][-4:] == clauses


@pytest.mark.parametrize(
    "budget",
    [
        Budget(max_difference=2e-5),
        Budget(max_difference=float("nan")),
        Budget(max_difference=1e-5, max_logit_difference=0.02),
        Budget(max_difference=1e-5, tie=2.0),
        Budget(accuracy_drop=0.99, evidence="point"),
    ],
)
@pytest.mark.parametrize("name", ["onnx", "saved_model"])
def test_a_certificate_sets_no_wider_limits_than_an_export(name: str, budget: Budget) -> None:
    """Whoever can write a version could let any model pass."""
    sound = certificate()
    at = [variant.name for variant in sound.variants].index(name)
    sound.variants[at] = msgspec.structs.replace(sound.variants[at], budget=budget)
    with pytest.raises(BudgetError, match=f"{name} is allowed .*, more than any export allows in full precision"):
        parity.check(sound)


@pytest.mark.parametrize(
    ("changes", "clause"),
    [
        ({"path": "model.copy.onnx"}, "onnx is 'model.copy.onnx' in fp32"),
        ({"precision": "int8"}, "onnx is 'model.onnx' in int8"),
        ({"name": "zzz"}, "zzz is 'model.onnx' in fp32"),
        ({"name": "onnx-int8"}, "onnx-int8 is 'model.onnx' in fp32"),
        ({"name": "saved_model"}, "two variants have one name, or one file"),
        ({"path": "."}, "two variants have one name, or one file"),
    ],
)
def test_a_variant_is_what_its_name_says(changes: dict[str, str], clause: str) -> None:
    """Triton and TensorFlow Serving load by fixed names; no file escapes the comparison under another one."""
    sound = certificate()
    sound.variants[0] = msgspec.structs.replace(sound.variants[0], **changes)  # type: ignore[arg-type]
    with pytest.raises(BudgetError, match=clause):
        parity.check(sound)


class ColorModel:
    """Answers with the mean of each colour, and remembers the sizes of its batches."""

    def __init__(self, factor: float = 1.0, error: type[Exception] | None = None) -> None:
        """With a factor of the last answer, or the kind of an error to raise."""
        self.factor = factor
        self.error = error
        self.sizes: list[int] = []

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Return float32 [n, 3]."""
        self.sizes.append(len(images))
        if self.error:
            raise self.error("no kernel")
        means: np.ndarray = images.mean(axis=(1, 2), dtype=np.float32)
        means[images[:, 0, 0, 0] == 65, 2] *= self.factor
        return means


NUMBERS = np.repeat(np.arange(66, dtype=np.uint8), 2 * 2 * 3).reshape(66, 2, 2, 3)
NUMBERS[..., 1] += 100  # the second class has the largest answer
COLORS = np.full(66, 1, np.int32)
ANSWERS = NUMBERS.mean(axis=(1, 2), dtype=np.float32)
VARIANT = Variant("onnx", "model.onnx", "fp32", "method", Budget(max_difference=1e-5, tie=90.0), [], {1: 2.0})


def test_a_certificate_compares_all_images_at_every_batch_size() -> None:
    """In their order, each batch with as many as its size: the last is filled with the first images. The largest answer
    of the last image differs by 65, so that the other class wins; the original's two best are 100 apart: no tie.
    """
    onnx, saved_model = ColorModel(4.0), ColorModel()
    rows = certificate().variants[0].rows  # of an earlier certificate
    variants = [(msgspec.structs.replace(VARIANT, rows=rows), onnx), (certificate().variants[1], saved_model)]
    done, predictions = parity.certify(ANSWERS, variants, NUMBERS, COLORS)
    assert onnx.sizes == saved_model.sizes == [1] * 66 + [3] * 22 + [64] * 2
    assert (done.images, done.accuracy) == (66, 1.0)
    assert done.images_sha256 == parity.hash_images(NUMBERS, COLORS)
    first, second = done.variants
    assert msgspec.structs.replace(first, rows=[]) == VARIANT
    assert [row.batch_size for row in first.rows] == [row.batch_size for row in second.rows] == [1, 3, 64]
    for row in first.rows:
        assert (row.max_difference, row.top1_disagreements, row.worst[0]) == (195.0, 1, 65)
        assert row.accuracy == row.top1_agreement == pytest.approx(65 / 66)
    assert {row.max_difference for row in second.rows} == {0.0}
    lenient = msgspec.structs.replace(VARIANT, budget=Budget(max_difference=1e-5, tie=101.0))
    ties = parity.certify(ANSWERS, [(lenient, onnx)], NUMBERS, COLORS).certificate.variants[0].rows
    assert [row.top1_disagreements for row in ties] == [0, 0, 0]
    assert predictions.keys() == {"onnx", "saved_model"}
    assert predictions["onnx"].tolist() == [1] * 65 + [2]
    assert predictions["onnx"].dtype == np.int32


@pytest.mark.parametrize("count", [1, 2])
def test_few_images_fill_every_batch_size(count: int) -> None:
    """By copies of them: a model that is wrong at batch size 64 only is not proved by one image."""

    def wrong(images: np.ndarray) -> np.ndarray:
        answers: np.ndarray = images.mean(axis=(1, 2), dtype=np.float32)
        return answers + np.float32(len(images) == 64)

    done = parity.certify(ANSWERS[:count], [(VARIANT, wrong)], NUMBERS[:count], COLORS[:count])
    assert [row.max_difference for row in done.certificate.variants[0].rows] == [0, 0, 1]


def test_a_difference_that_is_exactly_a_tie_decides_the_class() -> None:
    """A tie is closer than that."""
    expected = np.array([[0.5, 0.25, 0.25]], np.float32)
    actual = np.array([[0.25, 0.5, 0.25]], np.float32)
    for tie, count in ((0.25, 1), (0.2500001, 0)):
        assert parity.compare(expected, actual, np.zeros(1, np.int32), 1, tie).top1_disagreements == count


def test_a_model_that_cannot_be_run_is_named() -> None:
    """With its batch size, and what its library says."""
    with pytest.raises(RunError) as caught:
        parity.certify(ANSWERS, [(VARIANT, ColorModel(error=ValueError))], NUMBERS, COLORS)
    assert str(caught.value) == "onnx, batch size 1: the model cannot be run: no kernel"
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_comparison_that_fails_ends_its_progress_display(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though its traceback is kept: if the display were left to the garbage collector, both could wait for ever."""
    ended: list[Progress] = []
    monkeypatch.setattr(Progress, "stop", lambda self, stop=Progress.stop: [stop(self), ended.append(self)])
    with pytest.raises(RunError) as caught:
        parity.predict(ColorModel(error=ValueError), NUMBERS, 3, "Keras")
    assert caught.tb is not None
    assert len(ended) == 1


def test_a_failed_comparison_keeps_its_kind() -> None:
    """As a value too large for half precision; it is not said twice that the model cannot be run."""
    with pytest.raises(ShapeError, match="^no kernel$"):
        parity.certify(ANSWERS, [(VARIANT, ColorModel(error=ShapeError))], NUMBERS, COLORS)


def test_images_are_known_by_their_pixels_shape_and_classes() -> None:
    """However they lie in memory: SHA-256 of the shape as Python writes it, the bytes, and classes in 32 bits."""
    content = b"(66, 2, 2, 3)" + NUMBERS.tobytes() + COLORS.astype("<i4").tobytes()
    digest = parity.hash_images(NUMBERS, COLORS)
    assert digest == hashlib.sha256(content).hexdigest()
    assert parity.hash_images(np.asfortranarray(NUMBERS), COLORS.astype(np.int64)) == digest
    assert parity.hash_images(np.repeat(NUMBERS, 2, axis=0)[::2], np.repeat(COLORS, 2)[::2]) == digest
    other, labels = NUMBERS.copy(), COLORS.copy()
    other[65, 1, 1, 2] += 1
    labels[65] = 2
    for changed in ((other, COLORS), (NUMBERS, labels), (NUMBERS.reshape(66, 1, 4, 3), COLORS)):
        assert parity.hash_images(*changed) != digest


def test_a_certificate_is_printed_as_a_table() -> None:
    """Its figures, and for each variant the budget, how it was made and compared, its speed and the worst images."""
    row = make_row(64, 0.5, max_difference=1.26e-7, mean_difference=1e-8, max_logit_difference=2e-5, worst=[5, 4, 3, 2])
    row = msgspec.structs.replace(row, class_cosine=[None, 0.5, 1.0])
    onnx = Variant("onnx", "model.onnx", "fp32", "", Budget(max_difference=1e-5), [row], {})
    loss = Budget(accuracy_drop=0.005)
    half = Variant("onnx-fp16", "model.fp16.onnx", "fp16", "softmax in fp32", loss, [row], {1: 1.25, 64: 2.0}, "halves")
    bare = msgspec.structs.replace(onnx, name="saved_model", rows=[])
    assert parity.describe(Certificate(1234, "hash", 0.9, 0.03, [onnx, half, bare])).splitlines() == [
        "  difference  batch  largest     mean  largest of logits  99.9 % within    cosine  same class",
        "  onnx           64  1.3e-07  1.0e-08            2.0e-05        0.0e+00  0.500000     100.00%",
        "  onnx-fp16      64  1.3e-07  1.0e-08            2.0e-05        0.0e+00  0.500000     100.00%",
        "  accuracy   batch   right  lost  gained  McNemar p    loss below  calibration error",
        "  keras             90.00%                                                    0.0300",
        "  onnx          64  50.00%     3       0       0.25  77.87 points             0.0000",
        "  onnx-fp16     64  50.00%     3       0       0.25  77.87 points             0.0000",
        "  on 1,234 held-out images; cosine: lowest mean of a class; loss: 95 % confidence",
        "  onnx         fp32, allowed a difference of 1e-05",
        "               largest differences on images 5, 4, 3",
        "  onnx-fp16    fp16, allowed 0.5 points less accuracy with 95 % confidence",
        "               softmax in fp32",
        "               compared with halves",
        "               speed 1.2x at batch size 1, 2.0x at batch size 64",
        "               largest differences on images 5, 4, 3",
        "  saved_model  fp32, allowed a difference of 1e-05",
    ]


def test_all_broken_budgets_are_in_one_sentence() -> None:
    """Separated by semicolons, after what they mean."""
    with pytest.raises(BudgetError) as caught:
        parity.check(certificate(max_difference=1.0, top1_disagreements=2))
    assert str(caught.value) == (
        "the converted model gives other answers than the original: "
        "the largest difference of saved_model at batch size 3 is 1, above 1e-05; "
        "2 of 1000 predictions of saved_model at batch size 3 name another class than Keras"
    )
