"""What an ONNX file says of itself: its `metadata_props`, texts by name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import msgspec

from export.certificate import Budget
from export.manifest import Preprocessing
from training.images import RESIZES

GEOMETRY = "the centre of pixel i is at i + 0.5, and the aspect ratio is ignored"


def describe(
    labels: Sequence[str], shape: Sequence[int], preprocessing: Preprocessing, heldout: str, budget: Budget
) -> dict[str, str]:
    """Return the metadata of an ONNX file.

    Args:
        labels: Names of the classes, in the order of the output.
        shape: (height, width, channels) of an image.
        preprocessing: How an image file becomes pixels.
        heldout: SHA-256 of the held-out images and their labels, as in the certificate.
        budget: The permitted difference from the Keras original.
    """
    height, width, _ = shape
    steps = {
        "color": preprocessing.color,
        "height": height,
        "width": width,
        "resize": preprocessing.resize,
        "resize_rule": f"{RESIZES[preprocessing.resize]}; {GEOMETRY}",
        "values": "uint8, 0 to 255; the graph scales them",
    }
    return {
        "labels": json.dumps(list(labels)),
        "preprocessing": json.dumps(steps),
        "heldout_sha256": heldout,
        "budget": msgspec.json.encode(budget).decode(),
    }


def write(path: Path, metadata: dict[str, str]) -> None:
    """Set texts of the metadata of an ONNX file; others stay."""
    import onnx

    model = onnx.load(path)
    present = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(model, {**present, **metadata})
    onnx.save(model, path)
