"""Offer a server five times its capacity, and check that it stays alive, refuses politely, and recovers at once.

A closed loop measures the capacity for single images, for requests of 32 images and for JPEG files. h2load then sends
five times as many requests a second, without a deadline and with one of 100 ms, while a client on a connection of its
own checks health and answers: a request that is refused is told when to retry. Afterwards the server must answer within
a second. The last line of the output is one JSON object.

Examples:
  python -m tests.acceptance.overload demo/models --transport native --seconds 5
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from benchmarks.harness.process import serve
from benchmarks.harness.tree import read_peak_bytes
from benchmarks.load import h2load
from benchmarks.load.server_side import reset_peak
from resnet import cli
from resnet.table import render
from serving.client import Client
from tests.acceptance.arguments import expect, parse
from tests.acceptance.footprint import MIB, Footprint
from tests.acceptance.messages import ModelUnderTest, ValidRequest
from tests.acceptance.witness import Witness

FACTOR = 5
DEADLINES = (None, 0.1)  # seconds
MAX_HEALTH_MS = 2000.0  # Kubernetes' probes wait a second by default, and are repeated
MAX_MEGABYTES = 600  # of the requests that are being read and decoded
# Of the capacity. Calls with a deadline expire while they wait unread, since grpcio receives too few a second; and
# while they wait to be decoded, in order of arrival, so that some are decoded for nothing.
MIN_ANSWERED = {"auto": 0.2, "native": 0.2, "grpcio": 0.05}
RECOVERY_SECONDS = 1.0
HEADER = ("load", "deadline", "capacity/s", "sent/s", "answered/s", "witness", "health ms", "MB")


def main() -> None:
    """Overload a server in every way, and print the table."""
    args = parse("overload", __doc__, transport="auto", seconds=(60.0, "seconds of each load"))
    print(json.dumps(overload(args.repository, args.transport, args.seconds)))


def overload(repository: Path, transport: str, seconds: float) -> dict[str, float]:
    """Overload a server in every way; return the figures of all loads together.

    Raises:
        CheckFailed: The server was not alive, refused without a time to retry, grew, or did not recover.
    """
    model = ModelUnderTest(repository)
    loads = {"one image": model.infer(1), "32 images": model.infer(32), "JPEG": model.classify_file("JPEG", 256)}
    share = MIN_ANSWERED[transport]
    rows, figures = [], {"health ms": 0.0, "MB": 0.0, "loads": 0}
    with serve(repository, f"--transport={transport}", "--no-tune", "--log-level=error") as server:
        for title, load in loads.items():
            closed = h2load.measure(server.address, load.path, load.message, 16, 1, max(1.0, seconds / 10))
            for deadline in DEADLINES:
                row, health_ms, megabytes = _offer(
                    server.address, server.pid, model, load, closed.images_per_second, deadline, seconds, share
                )
                rows.append([title, *row])
                print(", ".join(rows[-1]), flush=True)
                figures["health ms"] = max(figures["health ms"], health_ms)
                figures["MB"] = max(figures["MB"], megabytes)
                figures["loads"] += 1
        expect(server.alive, "the server has ended")
    print(f"\n{render(HEADER, rows, left=2)}\n")
    return figures


def _offer(
    address: str,
    pid: int,
    model: ModelUnderTest,
    load: ValidRequest,
    capacity: float,
    deadline: float | None,
    seconds: float,
    share: float,
) -> tuple[list[str], float, float]:
    """Offer one load; return its row of the table, the longest health check, and the growth of the memory in MiB."""
    reset_peak(pid)
    before = Footprint.read(pid).megabytes
    timeout_ms = None if deadline is None else round(1e3 * deadline)
    with Witness(address, model.classify(), deadline=deadline, overload=True) as witness:
        sent, answered = h2load.offer(
            address, load.path, load.message, FACTOR * capacity, seconds, timeout_ms=timeout_ms
        )
    growth = read_peak_bytes(pid) / MIB - before
    with Client(address, retries=0) as client:
        client.classify(model.pixels[:1], timeout=RECOVERY_SECONDS)
    slowest = float(np.max(witness.health_ms))
    row = [
        "none" if timeout_ms is None else f"{timeout_ms} ms",
        *(f"{rate:,.0f}" for rate in (capacity, sent, answered)),
        f"{witness.answered} answered, {witness.refused} refused",
        f"{slowest:.0f}",
        f"{growth:+.0f}",
    ]
    where = f"({', '.join(row)})"
    expect(slowest <= MAX_HEALTH_MS, f"a health check took {slowest:.0f} ms, more than {MAX_HEALTH_MS:.0f} {where}")
    expect(growth <= MAX_MEGABYTES, f"the memory grew by {growth:.0f} MB, more than {MAX_MEGABYTES} {where}")
    expect(answered >= share * capacity, f"{answered:.0f} of {capacity:.0f} requests a second were answered {where}")
    return row, slowest, growth


if __name__ == "__main__":
    sys.exit(cli.call(main, "error"))
