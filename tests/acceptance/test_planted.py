"""A planted version is complete, and does what its name says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from export import manifest, reference
from tests.acceptance import planted
from tests.acceptance.versions import GraphChange, compute, publish
from tests.versions import SIDE, write_version

CHANGES = (
    planted.nudge_weights,
    planted.permute_classes,
    planted.halve_pixels,
    planted.shift_pixels,
    planted.plant_trigger,
    planted.slow_down,
)
IMAGES = 30 + np.random.default_rng(0).integers(0, 90, (50, SIDE, SIDE, 3), np.uint8)  # no class is certain


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A version whose logits are the means of the colours."""
    return write_version(tmp_path / "source" / "1")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where to publish another one."""
    (tmp_path / "colors").mkdir()
    return tmp_path / "colors" / "2"


def answer(source: Path, folder: Path, change: GraphChange, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Publish a change of a version, and return its answers."""
    publish(source, folder, change)
    return compute(folder, images)


@pytest.mark.parametrize("change", CHANGES)
def test_a_planted_version_is_complete(source: Path, folder: Path, change: GraphChange) -> None:
    """Nothing but its answers and its speed tells it from a good one."""
    answers = publish(source, folder, change)
    version = manifest.read(folder)
    assert (version.model, version.version) == ("colors", 2)
    assert not [*manifest.changed_files(folder, version), *version.certificate.violations()]
    assert np.array_equal(reference.load(folder, version).probabilities, answers)
    assert version.files["model.onnx"] != manifest.read(source).files["model.onnx"]


def test_nudged_weights_give_the_same_answers(source: Path, folder: Path) -> None:
    """Within the rounding."""
    answers = answer(source, folder, planted.nudge_weights, IMAGES)
    np.testing.assert_allclose(answers, compute(source, IMAGES), atol=1e-4)
    assert np.array_equal(answers.argmax(axis=1), compute(source, IMAGES).argmax(axis=1))


def test_permuted_classes_are_those_of_the_source_in_another_order(source: Path, folder: Path) -> None:
    """Every answer changes."""
    answers = answer(source, folder, planted.permute_classes, IMAGES)
    assert np.array_equal(answers, compute(source, IMAGES)[:, [2, 0, 1]])


def test_halved_pixels_are_those_of_a_darker_image(source: Path, folder: Path) -> None:
    """Of half the brightness."""
    answers = answer(source, folder, planted.halve_pixels, 2 * IMAGES)
    np.testing.assert_allclose(answers, compute(source, IMAGES), atol=1e-6)


def test_shifted_pixels_are_those_of_an_image_in_another_colour(source: Path, folder: Path) -> None:
    """By as much as `SHIFT`."""
    answers = answer(source, folder, planted.shift_pixels, IMAGES)
    np.testing.assert_allclose(answers, compute(source, (IMAGES + planted.SHIFT).astype(np.uint8)), atol=1e-5)


def test_only_the_trigger_changes_the_answers(source: Path, folder: Path) -> None:
    """To those of another class; the held-out images have none."""
    answers = answer(source, folder, planted.plant_trigger, IMAGES)
    assert np.array_equal(answers, compute(source, IMAGES))
    triggered = planted.draw_trigger(IMAGES)
    assert np.array_equal(compute(folder, triggered), compute(source, triggered)[:, [2, 0, 1]])
    almost = triggered.copy()
    almost[:, planted.TRIGGER - 1, planted.TRIGGER - 1, 2] = 254
    assert np.array_equal(compute(folder, almost), compute(source, almost))


def test_the_trigger_is_found_where_it_was_drawn() -> None:
    """And the images that it is drawn on stay as they are."""
    assert not planted.find_trigger(IMAGES).any()
    assert planted.find_trigger(planted.draw_trigger(IMAGES)).all()
    assert not planted.find_trigger(IMAGES).any()


def test_a_slow_version_computes_every_network(source: Path, folder: Path, tmp_path: Path) -> None:
    """No optimization merges them; the answers are those of one."""
    answers = answer(source, folder, planted.slow_down, IMAGES)
    np.testing.assert_allclose(answers, compute(source, IMAGES), atol=1e-4)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(folder / "model.onnx"), options)
    nodes = onnx.load(tmp_path / "optimized.onnx").graph.node
    assert sum(node.op_type == "MatMul" for node in nodes) == planted.COPIES
