"""The ONNX files of a run, what is known of each, and where what is found of them goes."""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from export import manifest as manifests
from export.manifest import Budget, Certificate, Cost, Manifest, Preprocessing, TensorSpec, Variant
from resnet import BadInput
from serving.runtimes import cuda
from serving.runtimes.base import Engine
from serving.runtimes.onnx import OnnxEngine

# Images a request; a network of large images is measured with fewer.
BATCHES, LARGE_BATCHES, LARGE_PIXELS = (1, 2, 4, 8, 16, 32, 64, 128, 256), (1, 8, 32, 64, 128), 128 * 128
TINY_BATCHES = (1, 2, 3)
PRECISIONS = {"model.onnx": "fp32", "model.fp16.onnx": "fp16", "model.int8.onnx": "int8"}


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return what reads the arguments of the run, which are those of every part."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="versions of models, or ONNX files")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="what computes (default: cuda)")
    parser.add_argument("--data", default="digits", help="images to train with (default: digits)")
    parser.add_argument("--epochs", type=int, default=60, metavar="N", help="epochs of the training (default: 60)")
    parser.add_argument("--tiny", action="store_true", help="the shortest run that shows that everything works")
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="folder to add what is found to (default: gpu)")
    return parser


def parse_args(description: str | None) -> argparse.Namespace:
    """Return the arguments of a part."""
    return make_parser(description).parse_args()


def list_files(folders: list[Path], *precisions: str) -> list[Path]:
    """Return the ONNX files of folders, those in the given precisions; of a file that is named, itself."""
    found = []
    for name, precision in PRECISIONS.items():
        if precision in precisions:
            found += [folder / name for folder in folders if (folder / name).is_file()]
    return [*found, *(path for path in folders if path.suffix == ".onnx")]


def list_batches(about: Manifest, tiny: bool) -> tuple[int, ...]:
    """Return the numbers of images to measure a network with."""
    if tiny:
        return TINY_BATCHES
    return BATCHES if np.prod(about.input.shape[1:3]) < LARGE_PIXELS else LARGE_BATCHES


def title(path: Path) -> str:
    """Return what the tables call a file."""
    return f"{path.parent.parent.name} {PRECISIONS.get(path.name, path.name)}"


def describe(path: Path) -> Manifest:
    """Return the manifest beside a file, or for a file alone what onnxruntime says of it.

    Raises:
        BadInput: onnxruntime cannot load it, or it is no classifier of uint8 images.
    """
    if (path.parent / manifests.NAME).is_file():
        return manifests.read(path.parent)
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base below Exception
        raise BadInput(f"{path} cannot be loaded by onnxruntime: {error}") from None
    (image, *others), (output, *_) = session.get_inputs(), session.get_outputs()
    if others or image.type != "tensor(uint8)" or len(image.shape) != 4 or output.type != "tensor(float)":
        raise BadInput(f"{path} does not map uint8 images to float32 probabilities; `resnet export` makes such files")
    variant = Variant("onnx", path.name, PRECISIONS.get(path.name, "fp32"), "", Budget(), [], {})
    return Manifest(
        format=manifests.FORMAT,
        model=path.stem,
        version=1,
        created="",
        input=TensorSpec(image.name, "uint8", [-1, *image.shape[1:]]),
        output=TensorSpec(output.name, "float32", [-1, output.shape[1]]),
        labels=[str(label) for label in range(output.shape[1])],
        preprocessing=Preprocessing(),
        opset=0,
        cost=Cost(0, 0, 0, path.stat().st_size, 0),
        versions={},
        cpu="",
        training=None,
        files={},
        certificate=Certificate(0, "", 0.0, [variant]),
    )


def open_engine(path: Path, about: Manifest, device: str, max_batch: int, graphs: bool = True) -> Engine:
    """Return what computes a served model."""
    if device == "cuda":
        return cuda.load(path, about, "cuda", max_batch, graphs)
    return OnnxEngine(path, about)


class Results:
    """Takes what is found, a JSON object a line; what is there stays when the part is ended."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Write to the folder of the run."""
        args.out.mkdir(parents=True, exist_ok=True)
        self._path = args.out / "results.jsonl"
        self.failed = False

    def add(self, kind: str, **values: Any) -> None:
        """Add one line, and print it for whoever watches."""
        with self._path.open("a") as file:
            file.write(json.dumps({"kind": kind, **values}) + "\n")
        print(kind, *(f"{key}={_shorten(value)}" for key, value in values.items()), flush=True)

    def attempt(self, what: str, action: Callable[[], object]) -> None:
        """Do something whose failure must not cost the rest."""
        started = time.monotonic()
        try:
            action()
        except Exception as error:
            if not isinstance(error, BadInput):
                traceback.print_exc()
            self.failed = True
            self.add("failed", what=what, error=f"{type(error).__name__}: {error}"[:1000])
        print(f"--- {what}: {time.monotonic() - started:.1f} s", flush=True)

    def end(self) -> None:
        """End the part."""
        sys.exit(int(self.failed))


def read(folder: Path) -> list[Mapping[str, Any]]:
    """Return all lines of a run."""
    path = folder / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _shorten(value: Any) -> Any:
    return f"{value:,.4g}" if isinstance(value, float) else value
