"""Throughput of a server process under h2load: requests of many images and of single ones, closed loop and open loop.

The server is `serving.server` in one process, on each transport. It is also measured with an engine that computes
nothing, which shows the limit of the server itself. The clients run on the same machine.

Examples:
  python -m benchmarks.studies.gpu.served models/digits/1 --device cuda
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness.process import ServerProcess
from benchmarks.load import h2load
from benchmarks.load.endpoints import PROTOCOLS, Input
from benchmarks.studies.gpu.files import Results, describe, list_batches, list_files, open_engine, parse_args, title
from benchmarks.studies.gpu.loops import make_batch
from export.manifest import Manifest
from resnet import CheckFailed
from resnet.options import COUNT
from serving import process
from serving.config import Batching, Limits
from serving.models import loader, registry
from serving.runtimes.base import Images
from serving.runtimes.gpu.cuda import CudaEngine
from serving.runtimes.gpu.multi_gpu import MultiGpuEngine
from serving.server import Server
from serving.transports import choice

CONNECTIONS, THREADS = 8, 6  # of h2load
SINGLES_IN_FLIGHT = (32, 128, 512)
IMAGES_IN_FLIGHT = 1024  # four of the largest batches, so that the server never waits for its clients
SECONDS = 1.0  # of a measurement
OPEN_LOOP_SHARE = 0.8  # of the throughput of the closed loop
MAX_QUEUE, MAX_CALLS = 16384, 2048


class FreeEngine:
    """Answers at once, with the same probability for all classes."""

    provider = "none"

    def __init__(self, manifest: Manifest) -> None:
        """Answer with as many classes as a model has."""
        self._classes = manifest.output.shape[1]

    def run(self, images: Images) -> NDArray[np.float32]:
        """Map uint8 [n, height, width, 3] to float32 [n, classes]."""
        return np.full((len(images), self._classes), 1 / self._classes, np.float32)


class Service:
    """The measurements of one file behind one transport."""

    def __init__(
        self, path: Path, transport: str, args: argparse.Namespace, results: Results, free: bool = False
    ) -> None:
        """Prepare to measure; `free` leaves out the engine, and all batch sizes but the smallest and the largest."""
        self._path, self._transport, self._results, self._free = path, transport, results, free
        self._device, self._tiny, self._seconds = args.device, args.tiny, 0.3 if args.tiny else SECONDS

    @cached_property
    def _manifest(self) -> Manifest:
        return describe(self._path)

    def measure(self) -> None:
        """Serve the file, and measure all workloads."""
        batches = list_batches(self._manifest, self._tiny)
        started = time.monotonic()
        options = ["--device", self._device, "--transport", self._transport, "--max-batch", str(max(batches))]
        options += ["--free"] * self._free
        command = [sys.executable, "-m", "benchmarks.studies.gpu.served", str(self._path), "--serve", *options]
        with ServerProcess(command) as server:
            address = server.address
            print(f"{title(self._path)} on {self._transport}: up in {time.monotonic() - started:.1f} s", flush=True)
            best = 0.0
            for in_flight in (8,) if self._tiny else SINGLES_IN_FLIGHT:
                best = max(best, self._load(address, 1, in_flight))
            if not self._free:
                self._load(address, 1, 8 if self._tiny else max(SINGLES_IN_FLIGHT), rate=OPEN_LOOP_SHARE * best)
            for images in reversed(batches[1:] if self._transport == "native" and not self._free else batches[-1:]):
                in_flight = CONNECTIONS if self._tiny else max(CONNECTIONS, IMAGES_IN_FLIGHT // images)
                self._load(address, images, in_flight - in_flight % CONNECTIONS)

    def _load(self, address: str, images: int, in_flight: int, rate: float | None = None) -> float:
        """Put the server under load, and return its throughput in images per second."""
        manifest, protocol = self._manifest, PROTOCOLS["kserve"]
        message = protocol.pack(Input(manifest.model, manifest.input.name, (), "UINT8"), make_batch(manifest, images))
        sample = h2load.measure(
            address, protocol.path, message, in_flight, images, self._seconds, CONNECTIONS, THREADS, rate
        )
        if not len(sample.latencies_ms):
            raise CheckFailed(f"none of {in_flight} requests of {images} images was answered within {self._seconds} s")
        p50, p99 = np.percentile(sample.latencies_ms, (50, 99))
        self._results.add(
            "served",
            file="no engine" if self._free else title(self._path),
            transport=self._transport,
            images=images,
            in_flight=in_flight,
            rate=rate,
            images_per_second=sample.images_per_second,
            p50_ms=float(p50),
            p99_ms=float(p99),
            failures=dict(sample.failures),
        )
        return sample.images_per_second


def serve(args: argparse.Namespace) -> None:
    """Serve one file until the process is ended."""
    process.prepare()
    manifest = describe(args.file)
    engine = FreeEngine(manifest) if args.free else open_engine(args.file, manifest, args.device, args.max_batch)
    batching = Batching(max_batch=args.max_batch, max_queue=MAX_QUEUE, max_queue_ms=1e9)
    if isinstance(engine, CudaEngine | MultiGpuEngine):
        model = loader.start(manifest, engine, batching, curve=engine.curve, instances=engine.instances, threads=engine)
    else:
        model = loader.start(manifest, engine, batching)
    limits = Limits(max_images=args.max_batch, max_calls=MAX_CALLS, max_streams=MAX_CALLS)
    with Server(registry.ModelRegistry([model]), "127.0.0.1", 0, limits, transport=args.transport) as server:
        print(f"serving on {server.address}", flush=True)
        while True:
            time.sleep(3600)


def main() -> None:
    """Measure all files on all transports, or serve one."""
    if "--serve" in sys.argv:
        parser = argparse.ArgumentParser()
        parser.add_argument("file", type=Path)
        parser.add_argument("--serve", action="store_true")
        parser.add_argument("--device", default="cuda")
        parser.add_argument("--transport", default="native")
        parser.add_argument("--max-batch", type=COUNT, default=256)
        parser.add_argument("--free", action="store_true")
        serve(parser.parse_args())
        return
    args = parse_args(__doc__)
    results = Results(args)
    files = list_files(args.folders, "fp32", "fp16")[::-1]  # half precision first
    if not files:
        print("left out: there is no ONNX file in fp32 or fp16")
        return
    if not choice.find_problem():
        for path in files:
            results.attempt(f"{title(path)} on native", Service(path, "native", args, results).measure)
    for path in (files[-1], files[0]):
        results.attempt(f"{title(path)} on grpcio", Service(path, "grpcio", args, results).measure)
    for transport in ("native", "grpcio") if not choice.find_problem() else ("grpcio",):
        free = Service(files[-1], transport, args, results, free=True)
        results.attempt(f"no engine on {transport}", free.measure)
    results.end()


if __name__ == "__main__":
    main()
