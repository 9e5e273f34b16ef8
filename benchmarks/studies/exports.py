"""Cost and accuracy of an export, for networks of keras.applications, a ResNeXt, and our family.

The networks have random weights, which suffice to measure the conversion. Only the statistics of batch normalization
are computed from images, as in a trained network: if they stayed at 0 and 1, activations would grow from block to
block, and with them the rounding errors of the original. Each network is exported in a process of its own, on crops of
two photographs that come with scikit-learn.

The table shows the largest difference and the share of equal top-1 classes over the certificate's batch sizes, the
graph nodes before and after cleaning, and the duration and peak memory of the export alone.

Examples:
  python -m benchmarks.studies.exports
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from resnet.table import render

CROPS = 64
STATISTICS_IMAGES = 16  # of the crops, for the statistics of batch normalization
# The networks, with the preprocessing that each expects.
APPLICATIONS = {
    "ResNet50": "caffe",
    "ResNet50V2": "tf",
    "MobileNetV2": "tf",
    "EfficientNetB0": "identity",
    "DenseNet121": "torch",
    "ConvNeXtTiny": "identity",
    "MobileNetV3Small": "identity",
    "EfficientNetV2B0": "identity",
    "InceptionV3": "tf",
}
RESNEXT = "ResNeXt"
FAMILY = {"resnet18": 32, "resnet50": 224, "resnet56": 32}  # with image sizes
NETWORKS = (*APPLICATIONS, RESNEXT, *FAMILY)
HEADER = ("network", "input", "max difference", "same class", "nodes before", "after", "seconds", "peak memory")


def main() -> None:
    """Export all networks and print the table."""
    rows = []
    for name in NETWORKS:
        child = subprocess.run(
            [sys.executable, "-m", "benchmarks.studies.exports", name], check=True, capture_output=True, text=True
        )
        figures = json.loads(child.stdout.splitlines()[-1])
        print(f"{name} was exported in {figures['seconds']:.0f} s", flush=True)
        rows.append(
            [
                name,
                f"{figures['size']} px",
                f"{figures['difference']:.1e}",
                f"{figures['agreement']:.2%}",
                str(figures["converted"]),
                str(figures["nodes"]),
                f"{figures['seconds']:.0f}",
                f"{figures['memory']:.1f} GB",
            ]
        )
    print(render(HEADER, rows))


def measure(name: str) -> dict[str, Any]:
    """Export one network, and return its figures; memory is in gigabytes."""
    from training.backend import start_tensorflow

    start_tensorflow()
    import keras

    from export import manifest, source
    from export.export import export
    from training.model import ARCHITECTURES, build

    keras.utils.set_random_seed(0)
    size = FAMILY.get(name, 224)
    if name in FAMILY:
        model = build(ARCHITECTURES[name], (size, size, 3), 1000)
    elif name == RESNEXT:
        model = _build_resnext(size)
    else:
        model = getattr(keras.applications, name)(weights=None, input_shape=(size, size, 3))
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(io.StringIO()):
        folder, crops = Path(temporary), _make_crops(size)
        _compute_statistics(model, crops["x_train"])
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
        exported = manifest.read(Path(export(loaded, folder / "models" / name)))
        seconds = time.perf_counter() - started
    rows = [row for variant in exported.certificate.variants for row in variant.rows]
    return {
        "size": size,
        "difference": max(row.max_difference for row in rows),
        "agreement": min(row.top1_agreement for row in rows),
        "converted": exported.cost.nodes_converted,
        "nodes": exported.cost.nodes,
        "seconds": seconds,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }


def _build_resnext(size: int) -> Any:
    """Return a ResNeXt of Xie et al. (2017) with one block in each stage: 3x3 convolutions in 32 groups."""
    import keras

    layers = keras.layers

    def convolve(x: Any, filters: int, side: int, stride: int = 1, groups: int = 1) -> Any:
        x = layers.Conv2D(filters, side, stride, padding="same", groups=groups, use_bias=False)(x)
        return layers.BatchNormalization()(x)

    image = keras.Input((size, size, 3), dtype="uint8")
    x = layers.ReLU()(convolve(layers.Rescaling(1 / 255)(image), 64, 7, 2))
    x = layers.MaxPooling2D(3, strides=2, padding="same")(x)
    for width, stride in ((128, 1), (256, 2), (512, 2), (1024, 2)):
        y = layers.ReLU()(convolve(x, width, 1))
        y = layers.ReLU()(convolve(y, width, 3, stride, groups=32))
        x = layers.ReLU()(layers.Add()([convolve(y, 2 * width, 1), convolve(x, 2 * width, 1, stride)]))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(image, layers.Dense(1000, activation="softmax")(x))


def _compute_statistics(model: Any, images: Any) -> None:
    """Compute the statistics of batch normalization from images."""
    import keras

    layers = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0  # the statistics of the next batch replace the earlier ones
    model(images[:STATISTICS_IMAGES], training=True)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum


def _make_crops(size: int) -> dict[str, Any]:
    """Return crops of two photographs, one class each, as the arrays of an .npz data set."""
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
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.exports",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("network", nargs="?", choices=NETWORKS, help="network to measure, as JSON (default: all)")
    network = parser.parse_args().network
    if network:
        print(json.dumps(measure(network)))
    else:
        main()
