"""Measure what a shadow costs the requests of the version whose answers it compares.

Version 2 is a copy of version 1. Three servers answer by version 1: one without a shadow, one that compares 10 % of the
requests with version 2, and one that compares all. They get the same Poisson arrivals of single held-out images, one
server after the other, at 50 % and 95 % of the capacity that a closed loop measures first. Latencies and rates are
medians of the rounds, ratios those of the rounds to the server without a shadow. The last line of the output is one
JSON object. Options of `resnet serve` are passed on to the servers.

Examples:
  python -m benchmarks.studies.shadow demo/models --precision fp32
  python -m benchmarks.studies.shadow demo/models --other original
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import grpc
import msgspec
import numpy as np

from benchmarks.harness import environment
from benchmarks.harness.process import serve
from benchmarks.load.endpoints import PROTOCOLS, Endpoint, Input
from benchmarks.load.generator import ClosedLoop, OpenLoop
from benchmarks.load.processes import LoadProcesses
from benchmarks.load.samples import summarize, summarize_closed
from export import manifest, reference, repository
from protos import admin_pb2
from protos.admin_pb2_grpc import AdminStub
from resnet import CheckFailed, cli
from resnet.options import AMOUNT, COUNT
from resnet.table import render

PERCENTS = (0, 10, 100)  # of the requests; 0 is no shadow
SHARES = (0.5, 0.95)  # of the capacity
IN_FLIGHT = 32  # of the closed loop that measures the capacity
IMAGES = 256  # different ones
WARM_UP_SECONDS, WARM_UP_RATE = 1.0, 10.0
SETTLE_SECONDS = 0.2  # without a further comparison, until the next server is measured
PATIENCE_SECONDS = 120.0  # Keras may have to be loaded
HEADER = ("load", "shadow", "p50 ms", "ratio", "p99 ms", "ratio", "images/s", "ratio", "failed", "compared", "dropped")


class ShadowCondition(NamedTuple):
    """What a server is measured under.

    Attributes:
        share: Offered load as a share of the capacity.
        percent: Share of the requests that the shadow compares; 0 without a shadow.
    """

    share: float
    percent: int


class ShadowFigures(NamedTuple):
    """One measurement, or the medians of several.

    Attributes:
        p50_ms: Median latency, from the time when a request was due.
        p99_ms: The 99th percentile.
        images_per_second: Throughput.
        failed: Share of the requests without an answer.
        compared: Share of the images that the shadow compared.
        dropped: Share of the images that it should have compared, had the server been idle.
    """

    p50_ms: float
    p99_ms: float
    images_per_second: float
    failed: float
    compared: float
    dropped: float


class ComparedImages(NamedTuple):
    """Images of a shadow so far."""

    compared: int
    dropped: int
    failed: int


ShadowRound = dict[ShadowCondition, ShadowFigures]


class ShadowedServer:
    """A server of both versions, and the load that it is put under."""

    def __init__(self, endpoint: Endpoint, percent: int, processes: LoadProcesses) -> None:
        """Prepare to measure.

        Args:
            endpoint: The method of the server, with the requests.
            percent: Share of the requests that its shadow compares; 0 without a shadow.
            processes: The load generator.
        """
        self.percent = percent
        self._endpoint, self._processes = endpoint, processes

    def warm_up(self) -> None:
        """Send requests until the shadow has compared one.

        Raises:
            CheckFailed: It compares none.
        """
        self.measure_capacity(WARM_UP_SECONDS)
        if not self.percent:
            return
        end = time.monotonic() + PATIENCE_SECONDS
        while not self._settle().compared:
            if time.monotonic() > end:
                problem = self._read_shadow().problem or "its server was never idle"
                raise CheckFailed(f"the shadow compared nothing in {PATIENCE_SECONDS:g} s: {problem}")
            self.measure(WARM_UP_RATE, WARM_UP_SECONDS)

    def measure_capacity(self, seconds: float) -> float:
        """Return the requests a second of a closed loop."""
        self._processes.connect(self._endpoint)
        load = ClosedLoop(IN_FLIGHT)
        return summarize_closed(self._processes.run(load, seconds), load, 1, seconds).images_per_second

    def measure(self, rate: float, seconds: float, seed: int = 0) -> ShadowFigures:
        """Measure an open loop of so many requests a second.

        Raises:
            CheckFailed: The server answered nothing.
        """
        self._processes.connect(self._endpoint)
        before = self._settle()
        load, end = OpenLoop(rate, seed=seed), WARM_UP_SECONDS + seconds
        trace = self._processes.run(load, end)
        after = self._settle()
        sample = summarize(trace, load, 1, WARM_UP_SECONDS, end)
        answered, failed = len(sample.latencies_ms), sum(sample.failures.values())
        if not answered:
            raise CheckFailed(f"{self._endpoint.address} answered nothing: {dict(sample.failures)}")
        p50, p99 = np.percentile(sample.latencies_ms, (50, 99)).tolist()
        images = len(trace.codes)  # those of the warm-up too
        return ShadowFigures(
            p50,
            p99,
            sample.images_per_second,
            failed / (failed + answered),
            (after.compared - before.compared) / images,
            (after.dropped - before.dropped) / images,
        )

    def _settle(self) -> ComparedImages:
        """Wait until the shadow compares no more, and return its numbers.

        Raises:
            CheckFailed: The other version failed to compute an image.
        """
        before, numbers = None, self._count()
        while numbers != before:
            time.sleep(SETTLE_SECONDS)
            before, numbers = numbers, self._count()
        if numbers.failed:
            raise CheckFailed(f"the shadow failed for {numbers.failed} images: {self._read_shadow().problem}")
        return numbers

    def _count(self) -> ComparedImages:
        shadow = self._read_shadow()
        return ComparedImages(shadow.agreement.images, shadow.dropped, shadow.failed)

    def _read_shadow(self) -> admin_pb2.ShadowStatus:
        with grpc.insecure_channel(self._endpoint.address) as channel:
            status = AdminStub(channel).GetStatus(admin_pb2.GetStatusRequest(), timeout=PATIENCE_SECONDS)
        return status.models[0].shadow


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.shadow",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("repository", type=Path, help="model repository")
    parser.add_argument("--model", help="name of the model (default: the first one)")
    parser.add_argument("--other", choices=("2", "original"), default="2", help="what to compare with (default: 2)")
    parser.add_argument("--seconds", type=AMOUNT, default=10, help="duration of a measurement (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=COUNT, default=5, help="measurements behind each figure (default: %(default)s)"
    )
    args, options = parser.parse_known_args()  # the rest is for the servers
    folder = args.repository / args.model if args.model else repository.models(args.repository)[0]
    with ExitStack() as stack:
        copies = Path(stack.enter_context(TemporaryDirectory(prefix="resnet-shadow-")))
        copy_twice(repository.latest(folder), copies / folder.name)
        processes = stack.enter_context(LoadProcesses())
        requests = pack_requests(copies / folder.name / "1")
        servers = []
        for percent in PERCENTS:
            shadow = [f"--shadow={folder.name}={args.other}:{percent}"] if percent else []
            server = stack.enter_context(serve(copies, "--log-level=error", *shadow, *options))
            servers.append(ShadowedServer(requests(server.address), percent, processes))
        capacity, rounds = measure(servers, args.seconds, args.rounds)
    print(f"\ncapacity: {capacity:,.0f} requests/s\n{describe_rounds(rounds)}")
    figures = {
        **environment.describe(("onnxruntime", "grpcio", "pygrpc-native", "numpy")),
        "other": args.other,
        "options": options,
        "seconds": args.seconds,
        "capacity": capacity,
        "rounds": [
            [{**condition._asdict(), **row._asdict()} for condition, row in round_.items()] for round_ in rounds
        ],
    }
    print(json.dumps(figures))


def measure(servers: Sequence[ShadowedServer], seconds: float, rounds: int) -> tuple[float, list[ShadowRound]]:
    """Measure the capacity of the first server, and all servers at each share of it.

    Args:
        servers: The first one has no shadow.
        seconds: Duration of one measurement.
        rounds: Measurements of each server at each share. The servers get the same arrivals, and change their order
            from one round to the next.

    Returns:
        The capacity in requests a second, and the rounds.
    """
    for server in servers:
        server.warm_up()
    capacity = servers[0].measure_capacity(seconds)
    print(f"capacity: {capacity:,.0f} requests/s", flush=True)
    measured = []
    for number in range(rounds):
        figures = {}
        for share in SHARES:
            for index in range(len(servers)):
                server = servers[(number + index) % len(servers)]
                condition = ShadowCondition(share, server.percent)
                figures[condition] = server.measure(share * capacity, seconds, seed=number)
                print(f"round {number + 1}: {condition}, {figures[condition]}", flush=True)
        measured.append(figures)
    return capacity, measured


def describe_rounds(rounds: Sequence[ShadowRound]) -> str:
    """Return the table: medians, and the medians of the ratios to the server without a shadow in the same round."""
    cells = []
    for condition in sorted(rounds[0]):
        rows = [round_[condition] for round_ in rounds]
        bases = [round_[condition._replace(percent=0)] for round_ in rounds]
        row = ShadowFigures(*np.median(rows, axis=0).tolist())
        p50, p99, rate = np.median(
            [np.divide(one[:3], base[:3]) for one, base in zip(rows, bases, strict=True)], axis=0
        )
        cells.append(
            [
                f"{condition.share:.0%}",
                f"{condition.percent} %" if condition.percent else "none",
                *(f"{row.p50_ms:.2f}", f"{p50:.2f}"),
                *(f"{row.p99_ms:.2f}", f"{p99:.2f}"),
                *(f"{row.images_per_second:,.0f}", f"{rate:.2f}"),
                *(f"{share:.1%}" for share in (row.failed, row.compared, row.dropped)),
            ]
        )
    return render(HEADER, cells, left=2)


def copy_twice(source: Path, model: Path) -> None:
    """Write a version as versions 1 and 2 of a model with the label `stable` for 1.

    Args:
        source: Folder of a version of a model with the same name.
        model: REPOSITORY/NAME to make.
    """
    recorded = manifest.read(source)
    for number in (1, 2):
        folder = model / str(number)
        shutil.copytree(source, folder)
        msgspec.structs.replace(recorded, version=number).write(folder)
    repository.label(model, "stable", 1)


def pack_requests(version: Path) -> Callable[[str], Endpoint]:
    """Return a function from the address of a server to an endpoint with requests of a held-out image each."""
    recorded = manifest.read(version)
    pixels = reference.load(version, recorded).images[:IMAGES]
    protocol = PROTOCOLS["native"]
    shape = Input(recorded.model, recorded.input.name, (1, *pixels.shape[1:]), "UINT8")
    requests = tuple(protocol.pack(shape, image) for image in np.split(pixels, len(pixels)))
    return lambda address: Endpoint(address, protocol.path, requests, 1, shape, "native")


if __name__ == "__main__":
    sys.exit(cli.call(main, "error"))
