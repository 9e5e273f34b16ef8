"""What an export costs and how exact it is, for networks of Keras' applications and of our family.

Each network has random weights, which serve as well as any: what is measured is the conversion. Only the statistics of
batch normalisation are those of images, as in any trained network: where they stay at 0 and 1, nothing keeps the
numbers from growing from block to block, and with them the rounding errors of the original. Each is exported in a
process of its own, on crops of two photographs that come with scikit-learn. Run it as

  python -m benchmarks.studies.exports

It prints a table: largest difference and equal answers over the certificate's batch sizes, nodes before and after
cleaning, seconds and peak memory of the export alone.
"""

from __future__ import annotations

import contextlib
import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

CROPS = 64
SETTLING = 16  # of these
# The network, and what it wants in place of pixels; None takes pixels.
APPLICATIONS = {
    "ResNet50": "caffe",
    "ResNet50V2": "tf",
    "MobileNetV2": "tf",
    "EfficientNetB0": "identity",
    "DenseNet121": "torch",
}
FAMILY = {"resnet18": 32, "resnet50": 224, "resnet56": 32}


def main() -> None:
    """Export all networks and print the table."""
    print("| network | input | max difference | same class | nodes before | after | seconds | peak memory |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name in (*APPLICATIONS, *FAMILY):
        child = subprocess.run(
            [sys.executable, "-m", "benchmarks.studies.exports", name], check=True, capture_output=True, text=True
        )
        found = json.loads(child.stdout.splitlines()[-1])
        print(
            f"| {name} | {found['size']} px | {found['difference']:.1e} | {found['agreement']:.2%} | "
            f"{found['converted']} | {found['nodes']} | {found['seconds']:.0f} | {found['memory']:.1f} GB |",
            flush=True,
        )


def measure(name: str) -> dict[str, Any]:
    """Export one network, and return its figures."""
    from training.commands.train import start_tensorflow

    start_tensorflow()
    import keras

    from export import manifest, source
    from export.export import export
    from training.model import ARCHITECTURES, build

    keras.utils.set_random_seed(0)
    size = FAMILY.get(name, 224)
    make: Callable[[], Any] = (
        (lambda: build(ARCHITECTURES[name], (size, size, 3), 1000))
        if name in FAMILY
        else (lambda: getattr(keras.applications, name)(weights=None))
    )
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(io.StringIO()):
        folder, crops = Path(temporary), _crops(size)
        model = make()
        _settle(model, crops["x_train"])
        model.save(folder / "model.keras")
        (folder / "names.txt").write_text("".join(f"class {index}\n" for index in range(1000)))
        np.savez(folder / "crops.npz", **crops)
        loaded = source.load(
            folder / "model.keras",
            str(folder / "crops.npz"),
            labels=folder / "names.txt",
            preprocess=APPLICATIONS.get(name),
        )
        started = time.perf_counter()
        about = manifest.read(export(loaded, folder / "models" / name))
        seconds = time.perf_counter() - started
    rows = [row for variant in about.certificate.variants for row in variant.rows]
    return {
        "size": size,
        "difference": max(row.max_difference for row in rows),
        "agreement": min(row.top1_agreement for row in rows),
        "converted": about.cost.nodes_converted,
        "nodes": about.cost.nodes,
        "seconds": seconds,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }


def _settle(model: Any, images: Any) -> None:
    """Have batch normalisation take its statistics from some images."""
    import keras

    layers = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
    before = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0  # the statistics of the next batch in place of those before
    model(images[:SETTLING], training=True)
    for layer, momentum in zip(layers, before, strict=True):
        layer.momentum = momentum


def _crops(size: int) -> dict[str, Any]:
    """Return crops of two photographs, which are two classes, as the arrays of an .npz data set."""
    from sklearn.datasets import load_sample_images

    photographs, rng = load_sample_images().images, np.random.default_rng(0)
    labels = np.arange(CROPS) % 2
    crops = []
    for label in labels:
        height, width, _ = photographs[label].shape
        top, left = rng.integers(height - size), rng.integers(width - size)
        crops.append(photographs[label][top : top + size, left : left + size])
    images = np.stack(crops)
    return {
        "x_train": images,
        "y_train": labels,
        "x_test": images,
        "y_test": labels,
        "classes": np.array(["class 0", "class 1"]),
    }


if __name__ == "__main__":
    if len(sys.argv) > 1:
        if sys.argv[1] not in {*APPLICATIONS, *FAMILY}:
            print(f"error: choose of {', '.join((*APPLICATIONS, *FAMILY))}, not {sys.argv[1]}", file=sys.stderr)
            sys.exit(2)
        print(json.dumps(measure(sys.argv[1])))
    else:
        main()
