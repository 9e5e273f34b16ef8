"""The closed loop of a load generator in C, which leaves the cores to the server: h2load, of Debian's nghttp2-client.

It repeats one request, over HTTP/2 as gRPC has it, or over HTTP/1.1. Of gRPC's own status it knows nothing, so an
answer is looked at before, and the bytes of all answers are held against it afterwards.
"""

from __future__ import annotations

import re
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
from tests.acceptance.wire import pack_message

WARM_UP_SECONDS = 0.3
PATIENCE_SECONDS = 60
OK = 200
LIKENESS = 0.9  # of the bytes of answers, whose numbers vary in length; a refusal of gRPC has none


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
    """Put a method of gRPC under load.

    Args:
        address: HOST:PORT, without encryption.
        path: Of the method, as /inference.GRPCInferenceService/ModelInfer.
        message: The request, serialized.
        in_flight: Requests at a time, over all connections; a multiple of their number.
        images: Images of the request.
        seconds: Length of the stretch, which follows a moment of warm-up.
        connections: Over which the requests go.
        threads: Of h2load, at most one for each connection.
        rate: Requests a second, sent whether others are answered or not, as long as fewer than `in_flight` are under
            way; None sends the next when one is answered.

    Raises:
        BadInput: h2load is not installed or cannot run, or the server does not answer the request.
        CheckFailed: Under load it refused requests: how many, h2load cannot tell.
    """
    if in_flight % connections:
        raise BadInput(f"{in_flight} requests in flight are no multiple of {connections} connections")
    size = len(pack_message(_ask(address, path, message)))
    headers = {"content-type": "application/grpc", "te": "trailers"}
    streams = ["-c", str(connections), "-m", str(in_flight // connections), "-t", str(min(threads, connections))]
    if rate is not None:
        streams.append(f"--rps={rate / connections:.1f}")
    log, received = _run(f"http://{address}{path}", pack_message(message), headers, streams, seconds)
    if received < LIKENESS * size * len(log):
        raise CheckFailed(
            f"{address} refused requests under load: {len(log):,} answers had {received:,} bytes, where one has {size}"
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
    """Send a method of gRPC so many requests a second, whatever becomes of them.

    Args:
        address: HOST:PORT, without encryption; it answers one request before.
        path: Of the method.
        message: The request, serialized.
        rate: Requests a second, over all connections.
        seconds: How long.
        connections: Over which the requests go; each has as many in flight as the server allows.
        timeout_ms: After which the callers want no answer, as the server is told; None is for ever.

    Returns:
        Requests that were sent, and that were answered in time, each a second: an answer has bytes, a refusal has none.
    """
    size = len(pack_message(_ask(address, path, message)))
    headers = {"content-type": "application/grpc", "te": "trailers"}
    if timeout_ms is not None:
        headers["grpc-timeout"] = f"{timeout_ms}m"
    streams = ["-c", str(connections), "-m", "1024", f"--rps={rate / connections:.1f}"]
    log, received = _run(f"http://{address}{path}", pack_message(message), headers, streams, seconds)
    whole = WARM_UP_SECONDS + seconds
    return len(log) / whole, received / size / whole


def measure_http(
    url: str, body: bytes, in_flight: int, images: int, seconds: float, headers: Mapping[str, str] | None = None
) -> Sample:
    """Put a URL under load with POST requests over HTTP/1.1, each in flight on a connection of its own.

    Args:
        url: With http, without encryption.
        body: Of the request.
        in_flight: Requests at a time.
        images: Images of the request.
        seconds: Length of the stretch, which follows a moment of warm-up.
        headers: Of the request, as its content-type.

    Returns:
        Latencies of what was answered with the status 200; any other counts as a failure, under its number.

    Raises:
        BadInput: h2load is not installed or cannot run.
        CheckFailed: Nothing was answered.
    """
    log, _ = _run(url, body, headers or {}, ["--h1", "-c", str(in_flight)], seconds)
    return _summarize(log, url, images, seconds)


def _ask(address: str, path: str, message: bytes) -> bytes:
    """Return the answer to a request."""
    with grpc.insecure_channel(address, UNLIMITED) as channel:
        method: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(path)
        try:
            return method(message, timeout=PATIENCE_SECONDS, wait_for_ready=True)
        except grpc.RpcError as error:
            raise BadInput(f"{address} does not answer {path}: {error.details()} ({error.code().name})") from None


def _run(
    url: str, body: bytes, headers: Mapping[str, str], options: Sequence[str], seconds: float
) -> tuple[NDArray[np.int64], int]:
    """Return the log, rows of start, status and length of a request in microseconds, and the bytes of all answers."""
    with tempfile.TemporaryDirectory() as folder:
        sent, log = Path(folder, "body"), Path(folder, "log")
        sent.write_bytes(body)
        # h2load's own warm-up is left out of its log, but not out of the bytes.
        duration = f"--duration={1000 * (WARM_UP_SECONDS + seconds):.0f}ms"
        lines = [f"--header={name}: {value}" for name, value in headers.items()]
        command = ["h2load", duration, f"--data={sent}", f"--log-file={log}", *lines, *options, url]
        try:
            run = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise BadInput("h2load is not installed; it is in Debian's package nghttp2-client") from None
        received = re.search(r"\((\d+)\) data$", run.stdout, re.MULTILINE)
        if run.returncode or not received:
            raise BadInput(f"h2load failed on {url}: {(run.stderr or run.stdout).strip()}")
        return np.array(log.read_text().split(), np.int64).reshape(-1, 3), int(received[1])


def _summarize(log: NDArray[np.int64], name: str, images: int, seconds: float) -> Sample:
    if OK not in log[:, 1]:
        raise CheckFailed(f"{name} answered nothing; the statuses that came are {_count(log[:, 1])}")
    ends = log[:, 0] + log[:, 2]
    start = log[:, 0].min() + 1e6 * WARM_UP_SECONDS
    log = log[(start <= ends) & (ends < start + 1e6 * seconds)]
    answered = log[log[:, 1] == OK]
    failures = _count(log[log[:, 1] != OK, 1])
    return Sample(answered[:, 2] / 1e3, len(answered) * images / seconds, failures)


def _count(statuses: NDArray[np.int64]) -> Mapping[str, int]:
    return dict(Counter(str(status) for status in statuses.tolist()))
