"""Layers that the converter does not know, or not rightly, answer as in Keras; the rest is named before it is tried."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import onnxslim
import pytest

from export.formats import OPSET
from export.formats import onnx as onnx_format
from resnet import BadInput
from tests.export.sources import classifier

LAYERS: dict[str, Callable[[], list[keras.layers.Layer]]] = {
    "exact gelu": lambda: [keras.layers.Conv2D(4, 3, activation="gelu")],
    "celu": lambda: [keras.layers.Conv2D(4, 3, activation="celu")],
    "groups": lambda: [keras.layers.Conv2D(6, 3, groups=3, strides=2, padding="same")],
    "one filter per channel": lambda: [keras.layers.Conv2D(3, 7, groups=3, padding="same")],
    "one-dimensional groups": lambda: [
        keras.layers.Reshape((144, 3)),
        keras.layers.Conv1D(6, 3, groups=3),
        keras.layers.Flatten(),
    ],
    "normalization": lambda: [keras.layers.Normalization(mean=[0.1, 0.2, 0.3], variance=[1, 2, 3])],
}


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_that_the_converter_lacks_is_composed_of_what_it_has(kind: str, tmp_path: Path) -> None:
    """The answers are those of Keras."""
    model = classifier(*LAYERS[kind]())
    images = np.random.default_rng(0).integers(256, size=(3, *model.input_shape[1:]), dtype=np.uint8)
    onnx_format.write(model, {}, tmp_path / "model.onnx", OPSET)
    answers = onnx_format.load(tmp_path / "model.onnx")(images)
    np.testing.assert_allclose(answers, model.predict(images, verbose=0), atol=1e-6)


def test_a_layer_that_cannot_be_converted_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the operator, and before the graph goes on to anything that would crash."""
    monkeypatch.setattr(onnxslim, "slim", lambda _: pytest.fail("the broken graph was simplified"))
    inner = keras.Sequential(
        [keras.layers.Input((12, 12, 3)), keras.layers.Resizing(8, 8, antialias=True, name="half")]
    )
    with pytest.raises(
        BadInput, match="the layer 'half' cannot be converted: ONNX has no .* TensorFlow's ScaleAndTran"
    ):
        onnx_format.write(classifier(inner), {}, tmp_path / "model.onnx", OPSET)
    assert not (tmp_path / "model.onnx").exists()
