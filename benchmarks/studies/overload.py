"""What becomes of a server that is offered many times what it can answer: answers in time, refusals, health, memory.

  python -m benchmarks.studies.overload demo/models --model digits --precision fp32

First it is asked by a closed loop for what it can answer; then h2load sends 2, 5 and 10 times as many requests, with
deadlines and without, while a client of its own asks now and then whether the server is well, and for an image. Shares
are of the capacity; the last line of the output is one JSON object. Options that are not of this command are the
server's.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import grpc
import numpy as np
from grpc_health.v1 import health_pb2
from numpy.typing import NDArray

from benchmarks.harness.process import serve
from benchmarks.harness.tree import read_peak_bytes
from benchmarks.load import h2load
from benchmarks.load.endpoints import Input, pack_kserve
from export import manifest, repository
from resnet import BadInput, CheckFailed

METHOD = "/inference.GRPCInferenceService/ModelInfer"
HEALTH = "/grpc.health.v1.Health/Check"
DEADLINES_MS = (50, 100, 500, None)
FACTORS = (2, 5, 10)
PROBES_A_SECOND = 10
PATIENCE_SECONDS = 10.0


@dataclass
class Probe:
    """A client that asks now and then, from a thread, until the end of its block.

    Attributes:
        address: Of the server.
        message: A request, serialized.
        deadline: In seconds; None is none.
        health_ms: How long the answers of its health took.
        refused_ms: How long refusals took.
    """

    address: str
    message: bytes
    deadline: float | None
    health_ms: list[float] = field(default_factory=list)
    refused_ms: list[float] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ask, name="probe")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _ask(self) -> None:
        with grpc.insecure_channel(self.address) as channel:
            health: Any = channel.unary_unary(HEALTH)
            infer: Any = channel.unary_unary(METHOD)
            question = health_pb2.HealthCheckRequest().SerializeToString()
            while not self._over.wait(1 / PROBES_A_SECOND):
                started = time.perf_counter()
                health(question, timeout=PATIENCE_SECONDS)
                self.health_ms.append(1e3 * (time.perf_counter() - started))
                started = time.perf_counter()
                try:
                    infer(self.message, timeout=self.deadline or PATIENCE_SECONDS)
                except grpc.RpcError as error:
                    if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                        self.refused_ms.append(1e3 * (time.perf_counter() - started))


@dataclass(frozen=True)
class OverloadRow:
    """What one stretch saw.

    Attributes:
        factor: Requests that were to be sent, over the capacity.
        deadline_ms: Of each; None is none.
        sent: Requests a second that were sent; fewer where those under way were as many as may be.
        answered: Answered in time, over the capacity.
        refused_ms: 99 of 100 refusals came within; None where there was none.
        health_ms: The longest that the server took to say that it is well.
        memory_mb: By which its largest resident set grew.
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", type=Path, help="folder of models")
    parser.add_argument("--model", required=True, help="one of them")
    parser.add_argument("--images", type=int, default=1, help="in each request (default: %(default)s)")
    parser.add_argument("--in-flight", type=int, default=32, help="of the closed loop (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=4, help="of each stretch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of all stretches (default: %(default)s)")
    args, options = parser.parse_known_args()  # what is left is for the server
    message = _pack(args.repository / args.model, args.images)
    with serve(args.repository, "--log-level=error", *options) as server:
        rows = measure(server.address, server.pid, message, args.in_flight, args.images, args.seconds, args.rounds)
    print(json.dumps({"images": args.images, "options": options, "rows": [asdict(row) for row in rows]}))


def measure(
    address: str, pid: int, message: bytes, in_flight: int, images: int, seconds: float, rounds: int
) -> list[OverloadRow]:
    """Return the rows of a table, as medians, and print each round; the arguments are those of the command.

    Raises:
        BadInput: h2load is not installed.
        CheckFailed: The server refused what a closed loop asked.
    """
    found: dict[tuple[int, int | None], list[OverloadRow]] = {}
    print(
        f"{'load':>5} {'deadline':>9} {'sent/s':>9} {'in time':>8} {'refused p99':>12} {'health max':>11} {'memory':>9}"
    )
    for _ in range(rounds):
        capacity = h2load.measure(address, METHOD, message, in_flight, images, seconds).images_per_second / images
        print(f"capacity: {capacity:,.0f} requests/s", flush=True)
        for deadline in DEADLINES_MS:
            for factor in FACTORS:
                row = _stretch(address, pid, message, capacity, factor, deadline, seconds)
                found.setdefault((factor, deadline), []).append(row)
                _show(row)
    print("medians")
    medians = [_median(rows) for rows in found.values()]
    for row in medians:
        _show(row)
    return medians


def _stretch(
    address: str, pid: int, message: bytes, capacity: float, factor: int, deadline: int | None, seconds: float
) -> OverloadRow:
    before = read_peak_bytes(pid)
    with Probe(address, message, None if deadline is None else deadline / 1e3) as probe:
        sent, answered = h2load.offer(address, METHOD, message, factor * capacity, seconds, timeout_ms=deadline)
    refused = float(np.percentile(probe.refused_ms, 99)) if probe.refused_ms else None
    grown = (read_peak_bytes(pid) - before) / 2**20
    return OverloadRow(factor, deadline, sent, answered / capacity, refused, max(probe.health_ms), grown)


def _median(rows: list[OverloadRow]) -> OverloadRow:
    def middle(values: list[Any]) -> float:
        return float(np.median(values))

    refused = [row.refused_ms for row in rows if row.refused_ms is not None]
    return OverloadRow(
        rows[0].factor,
        rows[0].deadline_ms,
        middle([row.sent for row in rows]),
        middle([row.answered for row in rows]),
        middle(refused) if refused else None,
        middle([row.health_ms for row in rows]),
        middle([row.memory_mb for row in rows]),
    )


def _show(row: OverloadRow) -> None:
    deadline = "none" if row.deadline_ms is None else f"{row.deadline_ms} ms"
    refused = "-" if row.refused_ms is None else f"{row.refused_ms:.1f} ms"
    print(
        f"{row.factor:4d}x {deadline:>9} {row.sent:9,.0f} {row.answered:8.1%} {refused:>12}"
        f" {row.health_ms:8.1f} ms {row.memory_mb:+6.1f} MB",
        flush=True,
    )


def _pack(folder: Path, images: int) -> bytes:
    """Return a request of noise."""
    about = manifest.read(folder / str(repository.versions(folder)[-1]))
    pixels: NDArray[np.uint8] = np.random.default_rng(0).integers(0, 256, (images, *about.input.shape[1:]), np.uint8)
    return pack_kserve(Input(about.model, about.input.name, pixels.shape, "UINT8"), pixels)


if __name__ == "__main__":
    try:
        main()
    except (BadInput, CheckFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, BadInput) else 1)
