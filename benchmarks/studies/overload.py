"""Offer a server many times its capacity, and measure answers in time, refusals, health checks and memory.

A closed loop measures the capacity first. Then h2load sends 2, 5 and 10 times as many requests per second, with
deadlines and without, while a separate client checks the server's health and sends a request ten times a second.
Shares are relative to the capacity; the last line of the output is one JSON object. Options of `resnet serve` are
passed on to the server.

Examples:
  python -m benchmarks.studies.overload demo/models --model digits --precision fp32
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from grpc_health.v1 import health_pb2
from numpy.typing import NDArray

from benchmarks.harness.background import Background
from benchmarks.harness.process import serve
from benchmarks.harness.tree import read_peak_bytes
from benchmarks.load import h2load
from benchmarks.load.endpoints import Input, pack_kserve
from export import manifest, repository
from resnet import cli
from resnet.options import AMOUNT, COUNT
from resnet.table import render

INFER = "/inference.GRPCInferenceService/ModelInfer"
HEALTH = "/grpc.health.v1.Health/Check"
DEADLINES_MS = (50, 100, 500, None)
FACTORS = (2, 5, 10)
PROBES_PER_SECOND = 10
PATIENCE_SECONDS = 10.0
HEADER = ("load", "deadline", "sent/s", "in time", "refused p99 ms", "health max ms", "memory MB")


@dataclass
class Probe(Background):
    """A client that checks the health of a server and sends a request, ten times a second, during a `with` block.

    Attributes:
        address: Address of the server.
        message: A serialized request.
        deadline: Deadline of a request in seconds; None for no deadline.
        health_ms: Latencies of the health checks in milliseconds.
        refused_ms: Latencies of refused requests in milliseconds.
    """

    address: str
    message: bytes
    deadline: float | None
    health_ms: list[float] = field(default_factory=list)
    refused_ms: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def run(self) -> None:
        """Check and send."""
        with grpc.insecure_channel(self.address) as channel:
            health: Any = channel.unary_unary(HEALTH)
            infer: Any = channel.unary_unary(INFER)
            check = health_pb2.HealthCheckRequest().SerializeToString()
            while not self.stopped.wait(1 / PROBES_PER_SECOND):
                started = time.perf_counter()
                health(check, timeout=PATIENCE_SECONDS)
                self.health_ms.append(1e3 * (time.perf_counter() - started))
                started = time.perf_counter()
                try:
                    infer(self.message, timeout=self.deadline or PATIENCE_SECONDS)
                except grpc.RpcError as error:
                    if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                        self.refused_ms.append(1e3 * (time.perf_counter() - started))


@dataclass(frozen=True)
class OverloadRow:
    """The figures of one measurement, or their medians.

    Attributes:
        factor: Offered load as a multiple of the capacity.
        deadline_ms: Deadline of each request; None for no deadline.
        sent: Requests sent per second; fewer than offered if the server limits the requests in flight.
        answered: Requests answered in time, as a share of the capacity.
        refused_ms: 99th percentile of the latency of refusals; None if nothing was refused.
        health_ms: Longest latency of a health check.
        memory_mb: Growth of the server's peak memory.
    """

    factor: int
    deadline_ms: int | None
    sent: float
    answered: float
    refused_ms: float | None
    health_ms: float
    memory_mb: float


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.overload",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("repository", type=Path, help="model repository")
    parser.add_argument("--model", required=True, help="name of the model")
    parser.add_argument("--images", type=COUNT, default=1, help="images per request (default: %(default)s)")
    parser.add_argument(
        "--in-flight",
        type=COUNT,
        default=32,
        help="requests in flight of the closed loop (default: %(default)s)",
    )
    parser.add_argument("--seconds", type=AMOUNT, default=4, help="duration of a measurement (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=COUNT, default=3, help="measurements behind each figure (default: %(default)s)"
    )
    args, options = parser.parse_known_args()  # the rest is for the server
    message = _make_request(args.repository / args.model, args.images)
    with serve(args.repository, "--log-level=error", *options) as server:
        rows = measure(server.address, server.pid, message, args.in_flight, args.images, args.seconds, args.rounds)
    print(json.dumps({"images": args.images, "options": options, "rows": [asdict(row) for row in rows]}))


def measure(
    address: str, pid: int, message: bytes, in_flight: int, images: int, seconds: float, rounds: int
) -> list[OverloadRow]:
    """Measure all loads, print each figure as it comes and the table of medians at the end, and return the medians.

    Args:
        address: HOST:PORT of the server.
        pid: Process id of the server.
        message: The serialized request.
        in_flight: Requests in flight of the closed loop.
        images: Images per request.
        seconds: Duration of one measurement.
        rounds: Measurements behind each figure.

    Raises:
        BadInput: h2load is not installed.
        CheckFailed: The server refused requests of the closed loop.
    """
    measured: dict[tuple[int, int | None], list[OverloadRow]] = {}
    for _ in range(rounds):
        capacity = h2load.measure(address, INFER, message, in_flight, images, seconds).images_per_second / images
        print(f"capacity: {capacity:,.0f} requests/s", flush=True)
        for deadline in DEADLINES_MS:
            for factor in FACTORS:
                row = _measure(address, pid, message, capacity, factor, deadline, seconds)
                measured.setdefault((factor, deadline), []).append(row)
                print(
                    ", ".join(f"{name} {cell}" for name, cell in zip(HEADER, _list_cells(row), strict=True)), flush=True
                )
    medians = [_take_medians(rows) for rows in measured.values()]
    print("\n" + render(HEADER, [_list_cells(row) for row in medians], left=2))
    return medians


def _measure(
    address: str, pid: int, message: bytes, capacity: float, factor: int, deadline: int | None, seconds: float
) -> OverloadRow:
    before = read_peak_bytes(pid)
    with Probe(address, message, None if deadline is None else deadline / 1e3) as probe:
        sent, answered = h2load.offer(address, INFER, message, factor * capacity, seconds, timeout_ms=deadline)
    refused = float(np.percentile(probe.refused_ms, 99)) if probe.refused_ms else None
    growth = (read_peak_bytes(pid) - before) / 2**20
    return OverloadRow(factor, deadline, sent, answered / capacity, refused, max(probe.health_ms), growth)


def _take_medians(rows: list[OverloadRow]) -> OverloadRow:
    def median(values: list[Any]) -> float:
        return float(np.median(values))

    refused = [row.refused_ms for row in rows if row.refused_ms is not None]
    return OverloadRow(
        rows[0].factor,
        rows[0].deadline_ms,
        median([row.sent for row in rows]),
        median([row.answered for row in rows]),
        median(refused) if refused else None,
        median([row.health_ms for row in rows]),
        median([row.memory_mb for row in rows]),
    )


def _list_cells(row: OverloadRow) -> list[str]:
    return [
        f"{row.factor}x",
        "none" if row.deadline_ms is None else f"{row.deadline_ms} ms",
        f"{row.sent:,.0f}",
        f"{row.answered:.1%}",
        "-" if row.refused_ms is None else f"{row.refused_ms:.1f}",
        f"{row.health_ms:.1f}",
        f"{row.memory_mb:+.1f}",
    ]


def _make_request(folder: Path, images: int) -> bytes:
    """Return a serialized request of random pixels."""
    version = manifest.read(repository.latest(folder))
    pixels: NDArray[np.uint8] = np.random.default_rng(0).integers(0, 256, (images, *version.input.shape[1:]), np.uint8)
    return pack_kserve(Input(version.model, version.input.name, pixels.shape, "UINT8"), pixels)


if __name__ == "__main__":
    sys.exit(cli.call(main, "error"))
