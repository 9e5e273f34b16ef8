"""Reload a served model again and again under load, and see what its callers notice.

  python -m tests.acceptance.reloads demo/models/digits

Two versions of one model, the second a copy of the first, take turns: each reload loads, checks and warms one of them
and drains the other, by the RPC that Triton's clients call. Callers in another process note every answer all the while.
It prints latencies without and with reloads, and fails if a request failed, or was answered by a version that was
neither of the two, or with other probabilities than before. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import grpc
import msgspec
import numpy as np

from benchmarks.harness.process import serve
from benchmarks.load.samples import RemoteTarget, Sample
from export import manifest, repository
from export.source import load_heldout
from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from resnet import CheckFailed
from serving.client import Client

IN_FLIGHT = 4


def main() -> None:
    """Measure, reload, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a model of a repository; its latest version is taken")
    parser.add_argument("--reloads", type=int, default=100, help="how many (default: 100)")
    args = parser.parse_args()
    version = repository.latest(args.model)
    pixels, _ = load_heldout(version)
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool,
    ):
        name = _publish_twice(version, Path(folder))
        with serve(Path(folder), "--watch=0", "--versions=1") as server:
            target = RemoteTarget(server.address, name, pixels, pool)
            target.measure(IN_FLIGHT, 1, 1)
            with _Witness(server.address, pixels[:3]) as witness:
                started = time.perf_counter()
                quiet = target.measure(IN_FLIGHT, 1, 10)
                seconds, during = _reload(server.address, name, args.reloads, target)
    rows = {"without": quiet, "with": during}
    print(f"| reloads | p50 ms | p99 ms | longest ms | images/s |\n| --- | {'---: | ' * 4}".rstrip())
    for row, sample in rows.items():
        p50, p99, longest = np.percentile(sample.latencies_ms, (50, 99, 100))
        print(f"| {row} | {p50:.2f} | {p99:.2f} | {longest:.2f} | {sample.images_per_second:,.0f} |")
    print(
        f"{args.reloads} reloads in {seconds:.1f} s; {len(quiet.latencies_ms) + len(during.latencies_ms):,} requests "
        f"in {time.perf_counter() - started:.1f} s, none failed; {witness.count:,} compared, none differs"
    )
    print(
        json.dumps(
            {row: np.percentile(sample.latencies_ms, (50, 99, 100)).tolist() for row, sample in rows.items()}
            | {"reloads": args.reloads, "seconds": seconds}
        )
    )


def _publish_twice(version: Path, folder: Path) -> str:
    """Put two copies of a version into a repository, as 1 and 2, and return the model's name."""
    found = manifest.read(version)
    for number in (1, 2):
        copy = folder / found.model / str(number)
        shutil.copytree(version, copy)
        msgspec.structs.replace(found, version=number).write(copy)
    return found.model


def _reload(address: str, name: str, reloads: int, target: RemoteTarget) -> tuple[float, Sample]:
    """Let the versions take turns under load; return how long it took, and what the load saw meanwhile."""
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
        samples.append(target.measure(IN_FLIGHT, 1, 2))
    thread.join()
    if not seconds:
        raise CheckFailed("a reload failed; see above")
    rate = float(np.mean([sample.images_per_second for sample in samples]))
    return seconds[0], Sample(np.concatenate([sample.latencies_ms for sample in samples]), rate)


class _Witness:
    """Asks the same question all the while, and holds every answer against the first."""

    def __init__(self, address: str, images: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> None:
        self.count = 0
        self._address, self._images = address, images
        self._stop = threading.Event()
        self._problems: list[BaseException] = []
        self._thread = threading.Thread(target=self._ask)

    def _ask(self) -> None:
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
    try:
        main()
    except CheckFailed as error:
        sys.exit(f"error: {error}")
