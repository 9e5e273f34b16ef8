"""h2load, a load generator in C, which leaves the cores to the server; it is in Debian's package nghttp2-client.

It repeats one request, over HTTP/2 as gRPC does, or over HTTP/1.1. It does not know gRPC's own status, so one response
is checked before the load, and the bytes of all responses are compared with it afterwards.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import grpc
import numpy as np
from numpy.typing import NDArray

from benchmarks.load.samples import Sample
from resnet import BadInput, CheckFailed
from serving.client.channel import UNLIMITED

WARM_UP_SECONDS = 0.3
PATIENCE_SECONDS = 60
HTTP_OK = 200
ANSWERED_SHARE = 0.9  # of the expected bytes: responses vary in length with their numbers, and refusals have no bytes


def measure(
    address: str,
    path: str,
    message: bytes,
    in_flight: int,
    images: int,
    seconds: float,
    connections: int = 1,
    threads: int = 1,
    rate: float | None = None,
) -> Sample:
    """Put a gRPC method under load.

    Args:
        address: HOST:PORT, without encryption.
        path: Path of the method, as /inference.GRPCInferenceService/ModelInfer.
        message: The serialized request.
        in_flight: Requests in flight over all connections; a multiple of their number.
        images: Images per request.
        seconds: Duration of the measurement, which follows a short warm-up.
        connections: Number of connections.
        threads: Threads of h2load, at most one per connection.
        rate: Requests per second of an open loop, with at most `in_flight` requests in flight; None is a closed loop.

    Raises:
        BadInput: h2load is not installed or cannot run, or the server does not answer the request.
        CheckFailed: The server refused requests under load; h2load cannot tell how many.
    """
    if in_flight % connections:
        raise BadInput(f"{in_flight} requests in flight are no multiple of {connections} connections")
    size = len(_frame(_call(address, path, message)))
    headers = {"content-type": "application/grpc", "te": "trailers"}
    options = ["-c", str(connections), "-m", str(in_flight // connections), "-t", str(min(threads, connections))]
    if rate is not None:
        options.append(f"--rps={rate / connections:.1f}")
    log, received = _run(f"http://{address}{path}", _frame(message), headers, options, seconds)
    if received < ANSWERED_SHARE * size * len(log):
        raise CheckFailed(
            f"{address} refused requests under load: {len(log):,} responses had {received:,} bytes; one has {size}"
        )
    return _summarize(log, f"{address}{path}", images, seconds)


def offer(
    address: str,
    path: str,
    message: bytes,
    rate: float,
    seconds: float,
    connections: int = 4,
    timeout_ms: int | None = None,
) -> tuple[float, float]:
    """Send requests to a gRPC method at a rate, whether they are answered or not.

    Args:
        address: HOST:PORT, without encryption; it must answer one request before the load.
        path: Path of the method.
        message: The serialized request.
        rate: Requests per second over all connections.
        seconds: Duration.
        connections: Number of connections; each has as many requests in flight as the server allows.
        timeout_ms: Deadline that the server is told, in milliseconds; None is none.

    Returns:
        Requests sent per second, and requests answered in time per second. An answer has bytes, a refusal has none.
    """
    size = len(_frame(_call(address, path, message)))
    headers = {"content-type": "application/grpc", "te": "trailers"}
    if timeout_ms is not None:
        headers["grpc-timeout"] = f"{timeout_ms}m"
    options = ["-c", str(connections), "-m", "1024", f"--rps={rate / connections:.1f}"]
    log, received = _run(f"http://{address}{path}", _frame(message), headers, options, seconds)
    duration = WARM_UP_SECONDS + seconds
    return len(log) / duration, received / size / duration


def measure_http(
    url: str, body: bytes, in_flight: int, images: int, seconds: float, headers: Mapping[str, str] | None = None
) -> Sample:
    """Put a URL under load with POST requests over HTTP/1.1, on one connection per request in flight.

    Args:
        url: The URL, with http, without encryption.
        body: Body of the request.
        in_flight: Requests in flight.
        images: Images per request.
        seconds: Duration of the measurement, which follows a short warm-up.
        headers: Headers of the request, such as its content-type.

    Returns:
        A sample with the latencies of responses with status 200; any other status counts as a failure, under its
        number.

    Raises:
        BadInput: h2load is not installed or cannot run.
        CheckFailed: Nothing was answered.
    """
    log, _ = _run(url, body, headers or {}, ["--h1", "-c", str(in_flight)], seconds)
    return _summarize(log, url, images, seconds)


def _frame(message: bytes) -> bytes:
    """Return a message with gRPC's prefix: not compressed, and its length."""
    return struct.pack(">BI", 0, len(message)) + message


def _call(address: str, path: str, message: bytes) -> bytes:
    """Return the response to one request."""
    with grpc.insecure_channel(address, UNLIMITED) as channel:
        method: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(path)
        try:
            return method(message, timeout=PATIENCE_SECONDS, wait_for_ready=True)
        except grpc.RpcError as error:
            raise BadInput(f"{address} does not answer {path}: {error.details()} ({error.code().name})") from None


def _run(
    url: str, body: bytes, headers: Mapping[str, str], options: Sequence[str], seconds: float
) -> tuple[NDArray[np.int64], int]:
    """Run h2load.

    Returns:
        Its log, one row per request: start in microseconds, HTTP status, duration in microseconds; and the bytes of
        all responses.
    """
    with tempfile.TemporaryDirectory() as folder:
        data, log = Path(folder, "body"), Path(folder, "log")
        data.write_bytes(body)
        # h2load's own warm-up is missing from its log, but not from its count of bytes, so it is not used.
        duration = f"--duration={1000 * (WARM_UP_SECONDS + seconds):.0f}ms"
        lines = [f"--header={name}: {value}" for name, value in headers.items()]
        command = ["h2load", duration, f"--data={data}", f"--log-file={log}", *lines, *options, url]
        try:
            run = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise BadInput("h2load is not installed; install Debian's package nghttp2-client") from None
        received = re.search(r"\((\d+)\) data$", run.stdout, re.MULTILINE)
        if run.returncode or not received:
            raise BadInput(f"h2load failed on {url}: {(run.stderr or run.stdout).strip()}")
        return np.array(log.read_text().split(), np.int64).reshape(-1, 3), int(received[1])


def _summarize(log: NDArray[np.int64], target: str, images: int, seconds: float) -> Sample:
    if HTTP_OK not in log[:, 1]:
        raise CheckFailed(f"{target} answered nothing; the statuses of its responses are {_count(log[:, 1])}")
    ends = log[:, 0] + log[:, 2]
    start = log[:, 0].min() + 1e6 * WARM_UP_SECONDS
    log = log[(start <= ends) & (ends < start + 1e6 * seconds)]
    answered = log[log[:, 1] == HTTP_OK]
    failures = _count(log[log[:, 1] != HTTP_OK, 1])
    return Sample(answered[:, 2] / 1e3, len(answered) * images / seconds, failures)


def _count(statuses: NDArray[np.int64]) -> Mapping[str, int]:
    return dict(Counter(str(status) for status in statuses.tolist()))
