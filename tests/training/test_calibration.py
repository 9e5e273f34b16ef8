"""Confidence is accuracy, in all bins together; a temperature makes it so and changes no class."""

from __future__ import annotations

import json
import math
from pathlib import Path

import keras
import numpy as np
import pytest
from numpy.typing import NDArray

from training.calibration import MOST, fit_temperature, fold_temperature, measure_error, measure_reliability, soften

ANSWERS = np.array([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4], [0.05, 0.9, 0.05]], np.float32)


def make_answers(count: int, scale: float) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Return the probabilities of a network whose logits are `scale` times those that would be calibrated."""
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=2, size=(count, 5))
    calibrated = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = (rng.random((count, 1)) > calibrated.cumsum(axis=1)).sum(axis=1).astype(np.int32)
    return soften(calibrated.astype(np.float32), 1 / scale), labels


@pytest.mark.parametrize("scale", [0.5, 1, 3])
def test_the_temperature_is_found(scale: float) -> None:
    """Overconfident or underconfident: the error falls to that of a calibrated network of as many answers."""
    probabilities, labels = make_answers(20_000, scale)
    temperature = fit_temperature(probabilities, labels)
    assert temperature == pytest.approx(scale, rel=0.03)
    softened = soften(probabilities, temperature)
    assert measure_error(softened, labels) < 0.015
    assert (softened.argmax(axis=1) == probabilities.argmax(axis=1)).all()
    np.testing.assert_allclose(softened.sum(axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 30])
def test_a_few_right_answers_are_no_certainty(count: int) -> None:
    """Of one right answer the confidence becomes 2/3, of thirty 31/32, however sure the network was."""
    probabilities = np.tile(np.array([[0.99999, 0.00001]], np.float32), (count, 1))
    softened = soften(probabilities, fit_temperature(probabilities, np.zeros(count, np.int32)))
    assert softened[0, 0] == pytest.approx((count + 1) / (count + 2), abs=0.001)


def test_extreme_answers_have_a_temperature_within_bounds() -> None:
    """Probabilities of 0 and 1, right or wrong: nothing becomes infinite."""
    probabilities = np.eye(3, dtype=np.float32)
    for labels in ([0, 1, 2], [1, 2, 0]):
        temperature = fit_temperature(probabilities, np.array(labels, np.int32))
        assert 1 / MOST <= temperature <= MOST
        assert np.isfinite(soften(probabilities, temperature)).all()


def test_a_network_that_gives_no_numbers_is_left_as_it_is() -> None:
    """Its error is no number; the other answers are counted."""
    probabilities, labels = make_answers(100, 3)
    probabilities[7] = np.nan
    assert fit_temperature(probabilities, labels) == 1
    assert math.isnan(measure_error(probabilities, labels))
    assert measure_reliability(probabilities, labels).counts.sum() == 99
    nothing = measure_reliability(np.full((3, 2), np.nan, np.float32), np.zeros(3, np.int32))
    assert nothing.error == nothing.counts.sum() == 0


def test_all_answers_are_in_a_bin() -> None:
    """Their counts, sums of confidence and right ones add up."""
    probabilities, labels = make_answers(1000, 1)
    bins = measure_reliability(probabilities, labels)
    assert bins.counts.sum() == 1000
    assert bins.confidence.sum() == pytest.approx(probabilities.max(axis=1).sum(), rel=1e-6)
    assert bins.right.sum() == (probabilities.argmax(axis=1) == labels).sum()


@pytest.mark.parametrize(("units", "activation"), [(4, "softmax"), (1, "sigmoid")])
def test_the_temperature_is_folded_into_the_last_layer(units: int, activation: str) -> None:
    """No layer is added: the answers are those of the logits divided by the temperature."""
    keras.utils.set_random_seed(0)
    image = keras.Input((5,))
    network = keras.Model(image, keras.layers.Dense(units, activation, bias_initializer="normal")(image))
    inputs = np.random.default_rng(0).normal(size=(50, 5)).astype(np.float32)

    def answer() -> NDArray[np.float32]:
        outputs = np.asarray(network(inputs))
        return np.hstack([1 - outputs, outputs]) if units == 1 else outputs

    before = answer()
    fold_temperature(network, 2.5)
    np.testing.assert_allclose(answer(), soften(before, 2.5), atol=1e-6)


def test_a_calibrated_run_says_what_it_was_before(run: Path) -> None:
    """The error of the test images, before and after, and the temperature that explains both."""
    metrics = json.loads((run / "metrics.json").read_text())
    with np.load(run / "heldout.npz") as heldout:
        images, labels = heldout["images"], heldout["labels"]
    probabilities = np.asarray(keras.models.load_model(run / "model.keras").predict(images, verbose=0))
    temperature = metrics["calibration"]["temperature"]
    assert metrics["calibration_error"] == pytest.approx(measure_error(probabilities, labels), abs=0.003)
    before = measure_error(soften(probabilities, 1 / temperature), labels)
    assert metrics["calibration"]["error_before"] == pytest.approx(before, abs=0.003)
    assert (run / "reliability.png").exists()


@pytest.mark.parametrize(
    ("probabilities", "labels", "error"),
    [
        (ANSWERS, [0, 2, 1], (0.3 + 0.6 + 0.1) / 3),
        (ANSWERS, [1, 2, 1], (0.7 + 0.6 + 0.1) / 3),
        ([[0.61, 0.39], [0.65, 0.35]], [0, 1], abs(0.61 - 1 + 0.65) / 2),  # one bin: 0.6 to 0.667
        ([[0.05] * 20, [0.1, *[0.9 / 19] * 19]], [0, 1], (0.95 + 0.1) / 2),  # the first two bins
        ([[1.0, 0.0], [0.0, 1.0]], [0, 1], 0),
        ([[1.0, 0.0], [0.0, 1.0]], [1, 0], 1),
        ([[1.0000001, 0.0]], [0], 0),
        ([[np.nan, 0.0], [0.5, 0.5]], [0, 0], math.nan),
    ],
)
def test_the_calibration_error_is_that_of_fifteen_bins(
    probabilities: NDArray[np.float32], labels: list[int], error: float
) -> None:
    """Confidence less accuracy of each bin, whatever its sign, weighted by its images."""
    measured = measure_error(np.array(probabilities, np.float32), np.array(labels, np.int32))
    assert measured == pytest.approx(error, abs=1e-6, nan_ok=True)


def test_a_thousand_classes_are_as_calibrated_as_two() -> None:
    """A uniform answer is right once in a thousand times."""
    uniform = np.full((1000, 1000), 1e-3, np.float32)
    assert measure_error(uniform, np.arange(1000, dtype=np.int32)) == pytest.approx(0, abs=1e-9)
