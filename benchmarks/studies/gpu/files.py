"""What the parts of a run share: their arguments, the ONNX files with their manifests, and the file of results."""

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
from export.certificate import Budget, Certificate, Variant
from export.files import compute_hash
from export.manifest import Cost, Manifest, Preprocessing, TensorSpec
from resnet import BadInput
from resnet.options import COUNT
from serving.runtimes.base import Engine
from serving.runtimes.gpu import cuda
from serving.runtimes.onnx import OnnxEngine

# Images per request; networks of large images are measured with fewer.
BATCHES, LARGE_BATCHES, LARGE_PIXELS = (1, 2, 4, 8, 16, 32, 64, 128, 256), (1, 8, 32, 64, 128), 128 * 128
TINY_BATCHES = (1, 2, 3)
PRECISIONS = {"model.onnx": "fp32", "model.fp16.onnx": "fp16", "model.int8.onnx": "int8"}


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return the parser of the arguments that the run and its parts have in common."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.gpu",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="folders of model versions, or ONNX files"
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="device of the computation (default: cuda)"
    )
    parser.add_argument("--data", default="digits", help="training images (default: digits)")
    parser.add_argument("--epochs", type=COUNT, default=60, metavar="N", help="training epochs (default: 60)")
    parser.add_argument("--tiny", action="store_true", help="shortest run that tests every part")
    parser.add_argument(
        "--out", type=Path, default=Path("gpu"), help="folder of the results, which are appended (default: gpu)"
    )
    return parser


def parse_args(description: str | None) -> argparse.Namespace:
    """Return the arguments of a part."""
    return make_parser(description).parse_args()


def list_files(folders: list[Path], *precisions: str) -> list[Path]:
    """Return the ONNX files of folders in the given precisions, and the paths that are ONNX files themselves."""
    files = []
    for name, precision in PRECISIONS.items():
        if precision in precisions:
            files += [folder / name for folder in folders if (folder / name).is_file()]
    return [*files, *(path for path in folders if path.suffix == ".onnx")]


def list_batches(manifest: Manifest, tiny: bool) -> tuple[int, ...]:
    """Return the batch sizes to measure a network with."""
    if tiny:
        return TINY_BATCHES
    return BATCHES if np.prod(manifest.input.shape[1:3]) < LARGE_PIXELS else LARGE_BATCHES


def title(path: Path) -> str:
    """Return the name of a file in the tables."""
    return f"{path.parent.parent.name} {PRECISIONS.get(path.name, path.name)}"


def describe(path: Path) -> Manifest:
    """Return the manifest beside a file, or one made from the inputs and outputs of the file.

    Raises:
        BadInput: onnxruntime cannot load the file, or it is no classifier of uint8 images.
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
        files={path.name: compute_hash(path)},
        certificate=Certificate(0, "", 0.0, 0.0, [variant]),
    )


def open_engine(path: Path, manifest: Manifest, device: str, max_batch: int, graphs: bool = True) -> Engine:
    """Return the engine that serves a file on the device."""
    if device == "cuda":
        return cuda.load(path, manifest, "cuda", max_batch, graphs)
    return OnnxEngine(path, manifest)


class Results:
    """The results of a part, written at once, one JSON object per line: none is lost when the part is ended."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Append to results.jsonl in the folder of the run."""
        args.out.mkdir(parents=True, exist_ok=True)
        self._path = args.out / "results.jsonl"
        self.failed = False

    def add(self, kind: str, **values: Any) -> None:
        """Append one result, and print it."""
        with self._path.open("a") as file:
            file.write(json.dumps({"kind": kind, **values}) + "\n")
        print(kind, *(f"{key}={_shorten(value)}" for key, value in values.items()), flush=True)

    def attempt(self, title: str, action: Callable[[], object]) -> None:
        """Run an action; its failure is recorded and does not end the part."""
        started = time.monotonic()
        try:
            action()
        except Exception as error:
            if not isinstance(error, BadInput):
                traceback.print_exc()
            self.failed = True
            self.add("failed", what=title, error=f"{type(error).__name__}: {error}"[:1000])
        print(f"--- {title}: {time.monotonic() - started:.1f} s", flush=True)

    def end(self) -> None:
        """End the part, with exit code 1 if an action failed."""
        sys.exit(int(self.failed))


def read(folder: Path) -> list[Mapping[str, Any]]:
    """Return all results of a run."""
    path = folder / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _shorten(value: Any) -> Any:
    return f"{value:,.4g}" if isinstance(value, float) else value
