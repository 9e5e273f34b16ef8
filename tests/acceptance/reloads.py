"""Reload a served model again and again under load, and check that its clients do not notice.

Two versions of one model, the second a copy of the first, take turns: each reload loads, checks and warms up one of
them and drains the other, by the RPC that Triton's clients call. Meanwhile a load generator in another process sends
requests. The table shows latencies without and with reloads. The check fails if a request failed, was answered by a
version that is neither of the two, or with other probabilities than before. The last line of the output is one JSON
object.

Examples:
  python -m tests.acceptance.reloads demo/models/digits --reloads 100
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import grpc
import msgspec
import numpy as np

from benchmarks.harness.process import serve
from benchmarks.load.processes import LoadProcesses
from benchmarks.load.samples import Sample
from benchmarks.load.targets import ServerTarget, Workload
from export import manifest, repository
from export.source import load_heldout
from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from resnet import CheckFailed, cli
from resnet.table import render
from serving.client import Client

WORKLOAD = Workload(images=1, in_flight=4)
PERCENTS = (50, 99, 100)
HEADER = ("reloads", "p50 ms", "p99 ms", "longest ms", "images/s")


def main() -> None:
    """Measure, reload, and compare."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.acceptance.reloads",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, help="model of a repository, its latest version")
    parser.add_argument("--reloads", type=int, default=100, help="number of reloads (default: 100)")
    args = parser.parse_args()
    version = repository.latest(args.model)
    pixels, _ = load_heldout(version)
    with tempfile.TemporaryDirectory() as folder, LoadProcesses() as processes:
        name = _publish_twice(version, Path(folder))
        with serve(Path(folder), "--watch=0", "--versions=1") as server:
            target = ServerTarget(server.address, name, pixels, processes)
            target.measure(WORKLOAD, seconds=1)
            with _Witness(server.address, pixels[:3]) as witness:
                started = time.perf_counter()
                quiet = target.measure(WORKLOAD, seconds=10)
                seconds, during = _reload(server.address, name, args.reloads, target)
    samples = {"without": quiet, "with": during}
    latencies = {name: np.percentile(sample.latencies_ms, PERCENTS).tolist() for name, sample in samples.items()}
    rows = [
        [name, *(f"{ms:.2f}" for ms in latencies[name]), f"{sample.images_per_second:,.0f}"]
        for name, sample in samples.items()
    ]
    print(render(HEADER, rows))
    print(
        f"{args.reloads} reloads in {seconds:.1f} s; {len(quiet.latencies_ms) + len(during.latencies_ms):,} requests "
        f"in {time.perf_counter() - started:.1f} s, none failed; {witness.count:,} answers compared, all equal"
    )
    print(json.dumps(latencies | {"reloads": args.reloads, "seconds": seconds}))


def _publish_twice(version: Path, folder: Path) -> str:
    """Copy a version into a repository twice, as 1 and 2, and return the model's name."""
    original = manifest.read(version)
    for number in (1, 2):
        copy = folder / original.model / str(number)
        shutil.copytree(version, copy)
        msgspec.structs.replace(original, version=number).write(copy)
    return original.model


def _reload(address: str, name: str, reloads: int, target: ServerTarget) -> tuple[float, Sample]:
    """Have the versions take turns under load; return the duration of all reloads in seconds, and the sample."""
    seconds: list[float] = []

    def reload() -> None:
        started = time.perf_counter()
        with grpc.insecure_channel(address) as channel:
            stub = GRPCInferenceServiceStub(channel)
            for turn in range(reloads):
                config = json.dumps({"version_policy": {"specific": {"versions": [2 - turn % 2]}}})
                parameters = {"config": pb.ModelRepositoryParameter(string_param=config)}
                stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name=name, parameters=parameters))
        seconds.append(time.perf_counter() - started)

    thread = threading.Thread(target=reload)
    thread.start()
    samples = []
    while thread.is_alive():
        samples.append(target.measure(WORKLOAD, seconds=2))
    thread.join()
    if not seconds:
        raise CheckFailed("a reload failed; its error is above")
    rate = float(np.mean([sample.images_per_second for sample in samples]))
    return seconds[0], Sample(np.concatenate([sample.latencies_ms for sample in samples]), rate)


class _Witness:
    """Sends the same request again and again, and compares every answer with the first."""

    def __init__(self, address: str, images: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> None:
        self.count = 0
        self._address, self._images = address, images
        self._stop = threading.Event()
        self._problems: list[BaseException] = []
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            with Client(self._address) as client:
                first = client.classify(self._images)
                while not self._stop.wait(0.005):
                    answer = client.classify(self._images)
                    if answer.images != first.images or answer.version not in (1, 2):
                        raise CheckFailed(f"version {answer.version} answered {answer.images}, not {first.images}")
                    self.count += 1
        except Exception as error:
            self._problems.append(error)

    def __enter__(self) -> _Witness:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        for problem in self._problems:
            raise problem


if __name__ == "__main__":
    sys.exit(cli.call(main, "error"))
