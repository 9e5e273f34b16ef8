"""What int8 costs a network: by calibration after its training, and by a training in its arithmetic.

Every int8 file that `resnet export` tries is made of each run, and answers the held-out images. `lost`, `gained` and
`loss below`, at 95 % confidence, are in relation to the float original of the same run, as in a certificate; the last
column is the same in relation to that of the first run, which a training with `--quantize` started from. Speeds are
multiples of that of the run's ONNX file in fp32, at batch sizes 1 and 32, on this machine. The last line of the output
is one JSON object.

Examples:
  resnet train --data cifar10 --image-size 32 --model efficientnetb0 --recipe quick --epochs 8 --out runs/efficient
  resnet train --data cifar10 --image-size 32 --from runs/efficient --quantize int8 --out runs/efficient-int8
  python -m benchmarks.studies.quantize runs/efficient runs/efficient-int8
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from resnet import BadInput, cli
from resnet.table import render

HEADER = ("run", "int8", "right", "lost", "gained", "loss below", "speed 1", "speed 32", "loss of the first below")
BATCH = 64

Classes = NDArray[np.intp]


class Row(NamedTuple):
    """The answers of one file.

    Attributes:
        run: Name of the run folder.
        method: How its precision was lowered; `fp32` if it was not.
        classes: The class of each held-out image, [n].
        speedup: Speed as a multiple of that in fp32, by batch size.
    """

    run: str
    method: str
    classes: Classes
    speedup: dict[int, float]


def main() -> None:
    """Print a row for each run and each of its int8 files."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.quantize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders with the same test images")
    folders = parser.parse_args().runs
    from training.backend import start_tensorflow

    start_tensorflow(required=True)
    from export import source

    sources = [source.load(folder) for folder in folders]
    evidence = sources[0].evidence
    for folder, other in zip(folders, sources, strict=True):
        if not np.array_equal(other.evidence.images, evidence.images):
            raise BadInput(f"{folder} has other held-out images than {folders[0]}; name runs with the same data")
    table, figures, first = [], [], None
    for folder, loaded in zip(folders, sources, strict=True):
        exact = None
        for row in measure(folder.resolve().name, loaded):
            exact = row if exact is None else exact
            first = row if first is None else first
            figures.append(compare(row, exact, first, evidence.targets))
            table.append(_describe(figures[-1]))
            print(f"{row.run}: {row.method}", flush=True)
    print(render(HEADER, table, left=2))
    print(json.dumps({"images": len(evidence.targets), "rows": figures}))


def measure(name: str, loaded: Any) -> Iterator[Row]:
    """Yield the answers of a run in fp32, and those of each int8 file.

    Args:
        name: Of the run.
        loaded: The `export.source.Source` of the run.
    """
    from export import precision, speed
    from export.formats import ONNX, OPSET

    images = loaded.evidence.images
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        ONNX.write(loaded.model, {}, folder, OPSET)
        exact = ONNX.load(folder / ONNX.path)
        yield Row(name, "fp32", _classify(exact, images), {})
        for reduction in precision.list_reductions("int8", loaded.evidence.calibration, loaded.quantized):
            reduction.write(folder / ONNX.path, folder / "int8.onnx")
            reduced = ONNX.load(folder / "int8.onnx")
            speedup = speed.measure_speedup(exact, reduced, images)
            yield Row(name, reduction.method, _classify(reduced, images), speedup)


def compare(row: Row, exact: Row, first: Row, targets: NDArray[np.int32]) -> dict[str, Any]:
    """Return the figures of a row in relation to two others: bounds in percentage points, the accuracy as a share."""
    from export.statistics import bound_drop

    def count(reference: Row) -> tuple[int, int]:
        right, before = row.classes == targets, reference.classes == targets
        return int(np.sum(before & ~right)), int(np.sum(right & ~before))

    lost, gained = count(exact)
    return {
        "run": row.run,
        "method": row.method,
        "accuracy": float(np.mean(row.classes == targets)),
        "lost": lost,
        "gained": gained,
        "bound": 100 * bound_drop(lost, gained, len(targets)),
        "bound_of_first": 100 * bound_drop(*count(first), len(targets)),
        "speedup": row.speedup,
    }


def _classify(predict: Any, images: NDArray[np.uint8]) -> Classes:
    starts = range(0, len(images), BATCH)
    return np.concatenate([predict(images[start : start + BATCH]).argmax(axis=1) for start in starts])


def _describe(figures: dict[str, Any]) -> list[str]:
    return [
        figures["run"],
        figures["method"],
        f"{figures['accuracy']:.2%}",
        str(figures["lost"]),
        str(figures["gained"]),
        f"{figures['bound']:.2f} points",
        *(f"{figures['speedup'][size]:.1f}x" if figures["speedup"] else "" for size in (1, 32)),
        f"{figures['bound_of_first']:.2f} points",
    ]


if __name__ == "__main__":
    sys.exit(cli.call(main, "error"))
