"""What each ONNX file says of itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import onnx
import pytest

from export import manifest, metadata
from export.certificate import Budget
from export.manifest import Preprocessing
from tests.versions import make_graph
from training.images import RESIZES, Resize


@pytest.mark.slow
def test_every_onnx_file_says_what_it_was_proved_with(reduced: Path) -> None:
    """Each precision its own budget, and all of them labels, images and preprocessing."""
    recorded = manifest.read(reduced)
    variants = [variant for variant in recorded.certificate.variants if variant.path.endswith(".onnx")]
    assert [variant.precision for variant in variants] == ["fp32", "fp16", "int8"]
    for variant in variants:
        found = {entry.key: entry.value for entry in onnx.load(reduced / variant.path).metadata_props}
        assert found["heldout_sha256"] == recorded.certificate.images_sha256
        assert Budget(**json.loads(found["budget"])) == variant.budget
        assert json.loads(found["labels"]) == recorded.labels
        assert found["producer"].startswith("keras ")
        steps = json.loads(found["preprocessing"])
        assert (steps["color"], steps["height"], steps["width"]) == ("RGB", 32, 32)
        assert steps["resize"] == recorded.preprocessing.resize
        assert steps["resize_rule"].startswith(RESIZES[recorded.preprocessing.resize])


@pytest.mark.parametrize("resize", get_args(Resize))
def test_the_rule_of_resizing_is_said_in_words(resize: Resize) -> None:
    """What is between the pixels, where their centres are, and what becomes of the aspect ratio."""
    texts = metadata.describe(["a", "b"], (8, 9, 3), Preprocessing(resize=resize), "hash", Budget(max_difference=1e-5))
    assert json.loads(texts["preprocessing"]) == {
        "color": "RGB",
        "height": 8,
        "width": 9,
        "resize": resize,
        "resize_rule": f"{RESIZES[resize]}; the centre of pixel i is at i + 0.5, and the aspect ratio is ignored",
        "values": "uint8, 0 to 255; the graph scales them",
    }


def test_other_metadata_stays(tmp_path: Path) -> None:
    """Texts of the same name are replaced."""
    path = tmp_path / "model.onnx"
    graph = make_graph()
    onnx.helper.set_model_props(graph, {"producer": "someone", "budget": "none"})
    onnx.save(graph, path)
    metadata.write(path, {"budget": "small", "labels": "[]"})
    found = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert found == {"producer": "someone", "budget": "small", "labels": "[]"}
