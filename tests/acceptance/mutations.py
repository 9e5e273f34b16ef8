"""Send mutated messages and image files: each gets an answer or a status that blames the request, and costs nothing.

Valid requests of all three protocols, and image files of six kinds, are mutated in one or several places, mostly along
their structure, and sent over several connections, many at a time. No status may be INTERNAL or UNKNOWN, the server's
memory and threads stay within bounds, and a valid request gets the same bits before and afterwards. The last line of
the output is one JSON object.

Examples:
  python -m tests.acceptance.mutations demo/models --messages 20000 --images 2000
"""

from __future__ import annotations

import json
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc

from benchmarks.harness.process import serve
from benchmarks.harness.tree import read_peak_bytes
from protos import classifier_pb2 as pb
from resnet import cli
from tests.acceptance.arguments import expect, parse
from tests.acceptance.attempts.attempt import CLASSIFY
from tests.acceptance.callers import LOCAL
from tests.acceptance.footprint import MIB, Footprint
from tests.acceptance.messages import ModelUnderTest, ValidRequest
from tests.acceptance.mutators import mutate_bytes, mutate_message
from tests.acceptance.witness import describe

KINDS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")
CONNECTIONS = 4
IN_FLIGHT = 64  # over all connections; fewer than the server allows on one
PATIENCE_SECONDS = 60.0
MAX_MEGABYTES = 500
MAX_THREADS = 32
FAULTS = {"INTERNAL", "UNKNOWN", "UNAVAILABLE", "CANCELLED", "DEADLINE_EXCEEDED", "DATA_LOSS"}  # never the request's


def main() -> None:
    """Send the mutations."""
    args = parse(
        "mutations",
        __doc__,
        transport="auto",
        messages=(200_000, "mutated messages"),
        images=(20_000, "mutated image files"),
        seed=(0, "seed of the mutations"),
    )
    print(json.dumps(mutate(args.repository, args.transport, args.messages, args.images, args.seed)))


def mutate(repository: Path, transport: str, messages: int, images: int, seed: int) -> dict[str, float]:
    """Send mutations; return the number of each status, and what they cost the server.

    Raises:
        CheckFailed: The server blamed itself, grew, or answers a valid request otherwise than before.
    """
    model, choice = ModelUnderTest(repository), random.Random(seed)
    valid = model.classify(3)
    with serve(repository, f"--transport={transport}", "--no-tune", "--log-level=error") as server:
        with grpc.insecure_channel(server.address) as channel:
            before = _classify(channel, valid)
        start = Footprint.read(server.pid)
        codes: Counter[str] = Counter()
        for title, mutations in (
            ("messages", _mutate_messages(model, messages, choice)),
            ("images", _mutate_images(model, images, choice)),
        ):
            counts, problems = send(server.address, mutations)
            print(f"{title}: {dict(counts)}", flush=True)
            expect(not problems, f"{len(problems)} mutated {title} were not blamed: {'; '.join(problems[:5])}")
            codes += counts
        expect(server.alive, "the server has ended")
        end = Footprint.read(server.pid)
        growth = read_peak_bytes(server.pid) / MIB - start.megabytes
        expect(growth <= MAX_MEGABYTES, f"the memory grew by {growth:.0f} MB, more than {MAX_MEGABYTES}")
        expect(end.threads - start.threads <= MAX_THREADS, f"the threads grew from {start.threads} to {end.threads}")
        with grpc.insecure_channel(server.address) as channel:
            expect(_classify(channel, valid) == before, "a valid request is answered otherwise than before")
    return {**codes, "MB": growth, "threads": end.threads - start.threads}


def send(address: str, requests: Iterator[ValidRequest]) -> tuple[Counter[str], list[str]]:
    """Send requests, many at a time; return the number of each status, and what was not the request's fault."""
    codes: Counter[str] = Counter()
    problems: list[str] = []
    room = threading.Semaphore(IN_FLIGHT)

    def end(request: ValidRequest, call: Any) -> None:
        code = call.code().name
        codes[code] += 1
        if code in FAULTS:
            problems.append(f"{describe(call)} to {request.path} with {request.message[:200].hex()}")
        room.release()

    channels = [grpc.insecure_channel(address, LOCAL) for _ in range(CONNECTIONS)]
    for number, request in enumerate(requests):
        room.acquire()
        method: Any = channels[number % CONNECTIONS].unary_unary(request.path)
        call = method.future(request.message, timeout=PATIENCE_SECONDS)
        call.add_done_callback(partial(end, request))
    for _ in range(IN_FLIGHT):
        room.acquire()
    for channel in channels:
        channel.close()
    return codes, problems


def _mutate_messages(model: ModelUnderTest, count: int, choice: random.Random) -> Iterator[ValidRequest]:
    requests = model.list_requests()
    for _ in range(count):
        request = choice.choice(requests)
        yield request._replace(message=mutate_message(request.message, choice))


def _mutate_images(model: ModelUnderTest, count: int, choice: random.Random) -> Iterator[ValidRequest]:
    draws: list[Callable[[], bytes]] = [partial(model.draw, kind, 40) for kind in KINDS]
    files = [draw() for draw in draws]
    for _ in range(count):
        encoded = pb.EncodedImages(images=[mutate_bytes(choice.choice(files), choice)])
        yield ValidRequest(CLASSIFY, pb.ClassifyRequest(encoded=encoded).SerializeToString())


def _classify(channel: grpc.Channel, request: ValidRequest) -> list[bytes]:
    """Return the classifications of each image, as they come over the wire."""
    method: Any = channel.unary_unary(request.path)
    response = pb.ClassifyResponse.FromString(method(request.message, timeout=PATIENCE_SECONDS))
    return [image.SerializeToString(deterministic=True) for image in response.classifications]


if __name__ == "__main__":
    sys.exit(cli.call(main, "error"))
