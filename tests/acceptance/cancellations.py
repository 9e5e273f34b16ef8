"""Cancel calls at random moments: the server computes little for nobody, keeps nothing, and its queue empties.

The calls carry 16 images each, arrive faster than the server answers, and are cancelled within 50 ms. At most a few
batches may have been computed for cancelled calls; memory, threads and descriptors return to what they were. The last
line of the output is one JSON object.

Examples:
  python -m tests.acceptance.cancellations demo/models --transport grpcio --calls 5000
"""

from __future__ import annotations

import heapq
import json
import random
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import grpc

from benchmarks.harness.process import serve
from resnet import cli
from serving.client import Client
from tests.acceptance.arguments import expect, parse
from tests.acceptance.callers import LOCAL
from tests.acceptance.footprint import Footprint
from tests.acceptance.messages import ModelUnderTest, ValidRequest
from tests.acceptance.metrics import OPTION, ServerMetrics

IMAGES = 16  # in a call
IN_FLIGHT = 32
CONNECTIONS = 8  # the native transport closes a connection whose client cancels dozens of calls at once
MAX_SECONDS = 0.05  # until a call is cancelled
MAX_DEAD_SHARE = 0.2  # of the images that were sent: those in the batch that is being computed are too late
MAX_MEGABYTES, MAX_THREADS, MAX_DESCRIPTORS = 200, 16, 8
ALLOWED = {"OK", "CANCELLED", "RESOURCE_EXHAUSTED"}


def main() -> None:
    """Cancel calls."""
    args = parse("cancellations", __doc__, transport="auto", calls=(50_000, "calls to cancel"), seed=(0, "seed"))
    print(json.dumps(cancel(args.repository, args.transport, args.calls, args.seed)))


def cancel(repository: Path, transport: str, calls: int, seed: int) -> dict[str, float]:
    """Send calls and cancel them; return the number of each status, and what was computed for nobody.

    Raises:
        CheckFailed: The server computed too much for nobody, or kept something.
    """
    model = ModelUnderTest(repository)
    options = (f"--transport={transport}", "--no-tune", "--log-level=error", OPTION)
    with serve(repository, *options) as server:
        metrics = ServerMetrics(server)
        send(server.address, model.classify(IMAGES), 200, random.Random(seed))  # all threads exist
        _await_rest(metrics)
        start, before = Footprint.read(server.pid), metrics.sum("resnet_batch_images_sum")
        codes = send(server.address, model.classify(IMAGES), calls, random.Random(seed))
        _await_rest(metrics)
        computed = metrics.sum("resnet_batch_images_sum") - before
        time.sleep(1)  # for the connections to close
        end = Footprint.read(server.pid)
        with Client(server.address, retries=0) as client:
            client.classify(model.pixels[:1], timeout=5)
    dead = (computed - codes["OK"] * IMAGES) / (calls * IMAGES)
    grown = Footprint(*(after - now for after, now in zip(end, start, strict=True)))
    others = {code: count for code, count in codes.items() if code not in ALLOWED}
    expect(not others, f"calls that were cancelled ended with {others}")
    expect(dead <= MAX_DEAD_SHARE, f"{dead:.1%} of the images were computed for nobody, more than {MAX_DEAD_SHARE:.0%}")
    bounds = Footprint(MAX_MEGABYTES, MAX_THREADS, MAX_DESCRIPTORS)
    kept = [name for name, now, bound in zip(grown._fields, grown, bounds, strict=True) if now > bound]
    expect(not kept, f"the server kept {', '.join(kept)}: it grew from {start} to {end}")
    return {**codes, "dead": dead, **grown._asdict()}


def send(address: str, request: ValidRequest, calls: int, choice: random.Random) -> Counter[str]:
    """Send calls over several connections, and cancel each at a random moment; return the number of each status."""
    codes: Counter[str] = Counter()
    room = threading.Semaphore(IN_FLIGHT)
    due: list[tuple[float, int, Any]] = []  # when to cancel which call

    def end(call: Any) -> None:
        codes[call.code().name] += 1
        room.release()

    channels = [grpc.insecure_channel(address, LOCAL) for _ in range(CONNECTIONS)]
    methods: list[Any] = [channel.unary_unary(request.path) for channel in channels]
    for number in range(calls):
        while not room.acquire(blocking=not due):
            at, _, call = heapq.heappop(due)
            time.sleep(max(0.0, at - time.monotonic()))
            call.cancel()
        call = methods[number % CONNECTIONS].future(request.message, timeout=60)
        call.add_done_callback(end)
        heapq.heappush(due, (time.monotonic() + choice.uniform(0, MAX_SECONDS), number, call))
    for at, _, call in sorted(due):
        time.sleep(max(0.0, at - time.monotonic()))
        call.cancel()
    for _ in range(IN_FLIGHT):
        room.acquire()
    for channel in channels:
        channel.close()
    return codes


def _await_rest(metrics: ServerMetrics) -> None:
    left = metrics.await_zero(["resnet_queued_images"])
    expect(not left, f"the queue does not empty: {left}")


if __name__ == "__main__":
    sys.exit(cli.call(main, "error"))
