"""Throughput in one process: onnxruntime in a loop, and the engine that serves, in a loop."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from benchmarks.studies.gpu.files import Results, describe, list_batches, list_files, open_engine, parse_args, title
from export.manifest import Manifest
from resnet import BadInput
from serving.runtimes.base import Images
from serving.runtimes.gpu import cuda

ROUNDS, SECONDS = 3, 0.15


class RawLoop:
    """Bare onnxruntime, with a binding, a CUDA graph and fixed buffers for each batch size.

    Attributes:
        graphs: Whether CUDA graphs are used.
    """

    def __init__(
        self, path: Path, manifest: Manifest, batches: Sequence[int], device: str, options: Mapping[str, str] = {}
    ) -> None:
        """Load a model and warm it up.

        Args:
            path: The ONNX file.
            manifest: Its manifest.
            batches: Batch sizes.
            device: `cuda` or `cpu`.
            options: Further options of the CUDA provider.

        Raises:
            BadInput: onnxruntime cannot load the model, or cannot start CUDA.
        """
        self.graphs = device == "cuda"
        if device == "cuda":
            onnxruntime.preload_dlls()
        try:
            self._open(path, manifest, batches, device, options)
        except BadInput:
            raise
        except Exception as error:  # onnxruntime's exceptions have no common base below Exception
            if not self.graphs:
                raise BadInput(f"{path} cannot be loaded by onnxruntime: {error}") from None
            print(f"{path} runs in the raw loop without CUDA graphs: {error}", flush=True)
            self.graphs = False
            self._open(path, manifest, batches, device, options)

    def run(self, images: Images) -> NDArray[np.float32]:
        """Copy images to the device, compute, and copy the probabilities back."""
        source, _, output = self._bound[len(images)]
        source.update_inplace(images)
        self.run_resident(images)
        probabilities: NDArray[np.float32] = output.numpy()
        return probabilities

    def run_resident(self, images: Images) -> None:
        """Compute the batch that is already on the device, of the same size as `images`."""
        self._bound[len(images)][1]()

    def _open(
        self, path: Path, manifest: Manifest, batches: Sequence[int], device: str, more: Mapping[str, str]
    ) -> None:
        options = {"enable_cuda_graph": str(int(self.graphs)), **cuda.find_options(path, manifest), **more}
        providers: list[Any] = [("CUDAExecutionProvider", options)] if device == "cuda" else []
        session = onnxruntime.InferenceSession(
            path, providers=[*providers, "CPUExecutionProvider"], enable_fallback=False
        )
        if device == "cuda" and session.get_providers()[0] != "CUDAExecutionProvider":
            raise BadInput("onnxruntime could not start CUDA; check the driver, or use --device cpu")
        self._bound: dict[int, tuple[Any, Callable[[], None], Any]] = {}
        for number, size in enumerate(batches, start=1):
            make = onnxruntime.OrtValue.ortvalue_from_shape_and_type
            source = make([size, *manifest.input.shape[1:]], np.uint8, device, 0)
            output = make([size, *manifest.output.shape[1:]], np.float32, device, 0)
            binding, run = session.io_binding(), onnxruntime.RunOptions()
            binding.bind_ortvalue_input(manifest.input.name, source)
            binding.bind_ortvalue_output(manifest.output.name, output)
            if self.graphs:
                run.add_run_config_entry("gpu_graph_id", str(number))
            self._bound[size] = source, _bind(session, binding, run), output
            for _ in range(cuda.RUNS_TO_CAPTURE):
                self._bound[size][1]()


def _bind(session: Any, binding: Any, options: Any) -> Callable[[], None]:
    return lambda: session.run_with_iobinding(binding, options)


def measure(
    run: Callable[[Images], object], batch: Images, seconds: float = SECONDS, rounds: int = ROUNDS
) -> list[float]:
    """Return the images per second of a loop over `run` with the same batch, one figure per round."""
    rates = []
    run(batch)
    for _ in range(rounds):
        calls, start = 0, time.perf_counter()
        while (now := time.perf_counter()) < start + seconds or not calls:
            run(batch)
            calls += 1
        rates.append(calls * len(batch) / (now - start))
    return rates


def make_batch(manifest: Manifest, images: int) -> Images:
    """Return a batch of noise in a model's shape."""
    return np.random.default_rng(images).integers(0, 256, (images, *manifest.input.shape[1:]), np.uint8)


class Loops:
    """The measurements of one file."""

    def __init__(self, path: Path, args: argparse.Namespace, results: Results) -> None:
        """Prepare to measure a file."""
        self._path, self._device, self._tiny, self._results = path, args.device, args.tiny, results
        self._seconds = 0.02 if args.tiny else SECONDS

    @cached_property
    def _manifest(self) -> Manifest:
        return describe(self._path)

    @property
    def _batches(self) -> Sequence[int]:
        return list_batches(self._manifest, self._tiny)

    def raw(self) -> None:
        """Measure bare onnxruntime, with copies and without."""
        started = time.monotonic()
        loop = RawLoop(self._path, self._manifest, self._batches, self._device)
        start_seconds = time.monotonic() - started
        self._measure("raw", loop.run, start_seconds)
        self._measure("resident", loop.run_resident, start_seconds)

    def engine(self, way: str, graphs: bool = True) -> None:
        """Measure the engine that serves."""
        started = time.monotonic()
        engine = open_engine(self._path, self._manifest, self._device, max(self._batches), graphs)
        self._measure(way, engine.run, time.monotonic() - started)

    def _measure(self, way: str, run: Callable[[Images], object], start_seconds: float) -> None:
        for images in self._batches:
            rates = measure(run, make_batch(self._manifest, images), self._seconds)
            self._results.add(
                "loop", file=title(self._path), way=way, images=images, rates=rates, start_seconds=start_seconds
            )


def main() -> None:
    """Measure all files."""
    args = parse_args(__doc__)
    results = Results(args)
    for path in list_files(args.folders, "fp32", "fp16"):
        loops = Loops(path, args, results)
        results.attempt(f"{title(path)} raw", loops.raw)
        results.attempt(f"{title(path)} engine", partial(loops.engine, "engine"))
        if args.device == "cuda" and path.parent.parent.name == "resnet18":
            results.attempt(f"{title(path)} no graphs", partial(loops.engine, "no graphs", graphs=False))
    results.end()


if __name__ == "__main__":
    main()
