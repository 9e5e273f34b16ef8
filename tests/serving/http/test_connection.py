"""What strangers do to a connection: silence, floods, what is no HTTP. Others are answered all the while."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from serving.config import Limits
from serving.http import connection as connections
from serving.http import server
from tests.heldout import Heldout
from tests.serving.http.site import HttpSite, ask, connect, read_all, serve

START = b"POST /classify/digits HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture(scope="module")
def strict(repository: Path) -> Iterator[HttpSite]:
    """A server with narrow limits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "SWEEP_SECONDS", 0.05)
        patch.setattr(connections, "BYTES_PER_SECOND", 1000)
        limits = Limits(handshake_seconds=0.5, max_connections=8, max_metadata_bytes=4096, idle_seconds=60)
        with serve(repository, limits=limits) as site:
            yield site


@pytest.fixture(autouse=True)
def others(strict: HttpSite) -> Iterator[None]:
    """Somebody is answered after each test."""
    yield
    assert ask(strict.address, "/livez").status == 200


@pytest.mark.parametrize("sent", [b"", b"POST /cl", START + b"Content-Le", START + b"X: y\r\n"])
def test_a_head_that_does_not_end_has_a_limit_in_time(strict: HttpSite, sent: bytes) -> None:
    """Whatever was sent of it."""
    with connect(strict.address) as slow:
        slow.sendall(sent)
        answer = read_all(slow)
    assert answer.startswith(b"HTTP/1.1 408 Request Timeout") if sent else answer == b""


def test_a_body_that_does_not_come_has_a_limit_in_time(strict: HttpSite) -> None:
    """However large it was to be."""
    with connect(strict.address) as slow:
        slow.sendall(START + b"Content-Length: 1000\r\n\r\n" + bytes(10))
        answer = read_all(slow)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"the request was not sent in time" in answer


def test_a_body_that_trickles_has_a_limit_in_time(strict: HttpSite) -> None:
    """A byte now and then is too slow; it need not stop altogether."""
    with connect(strict.address) as slow:
        slow.sendall(START + b"Content-Length: 100000\r\n\r\n")
        slow.settimeout(0.02)
        answer = b""
        while not answer:
            try:
                slow.sendall(b"x")
                answer = slow.recv(100)
            except TimeoutError:
                continue
    assert answer.startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize(
    "sent",
    [
        START + b"".join(b"X-%d: %s\r\n" % (number, bytes(100).hex().encode()) for number in range(1000)) + b"\r\n",
        START + b"X: " + b"y" * 1_000_000,
        b"GET /" + b"x" * 1_000_000,
        START + b"X: y\r\n" * 500,
    ],
    ids=["many headers", "one endless header", "an endless path", "headers without an end"],
)
def test_a_flood_of_headers_ends_the_connection(strict: HttpSite, sent: bytes) -> None:
    """With the status for it, as far as the client still reads it."""
    with connect(strict.address) as flood:
        try:
            flood.sendall(sent)
        except ConnectionError:
            return
        answer = read_all(flood)
    assert not answer or answer.startswith(b"HTTP/1.1 431 ")


@pytest.mark.parametrize(
    "sent",
    [
        b"\x00\xff" * 50,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        START + b"Content-Length: -1\r\n\r\n",
        START + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
        START + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\nxx",
        START + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        START + b"X\x00Y: z\r\n\r\n",
        b"GET  / HTTP/9.9\r\n\r\n",
    ],
)
def test_what_is_no_http_is_refused(strict: HttpSite, sent: bytes) -> None:
    """In one sentence."""
    with connect(strict.address) as strange:
        strange.sendall(sent)
        answer = read_all(strange)
    assert answer.startswith(b"HTTP/1.1 400 Bad Request")
    assert b"it is no HTTP" in answer


def test_an_idle_connection_makes_room(strict: HttpSite) -> None:
    """The one that was idle for longest."""
    with ExitStack() as stack:
        idle = [stack.enter_context(connect(strict.address)) for _ in range(8)]
        assert ask(strict.address, "/livez").status == 200
        assert read_all(idle[0]) == b""


def test_requests_may_follow_each_other(strict: HttpSite) -> None:
    """On one connection, without waiting for the answers."""
    with connect(strict.address) as kept:
        kept.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n" * 3)
        kept.sendall(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        answer = read_all(kept)
    assert answer.count(b"HTTP/1.1 200 OK") == 4


def test_a_client_that_reads_nothing_is_disconnected(strict: HttpSite) -> None:
    """Its answers are not kept for ever."""
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.settimeout(30)
        host, _, port = strict.address.rpartition(":")
        deaf.connect((host, int(port)))
        request = b"GET /page/page.css HTTP/1.1\r\nHost: localhost\r\n\r\n"
        with suppress(ConnectionError):
            while True:  # pytest ends the test if the server does not end the connection
                deaf.sendall(request * 100)


def test_a_connection_has_an_age(repository: Path) -> None:
    """As those of gRPC."""
    with serve(repository, limits=Limits(max_connection_age=1e-3)) as site, connect(site.address) as kept:
        answer = b""
        while b"connection: close" not in answer:
            kept.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = kept.recv(4096)
        assert answer.startswith(b"HTTP/1.1 200 OK")
        assert read_all(kept) == b""


def test_calls_may_follow_each_other(
    strict: HttpSite,
    heldout: Heldout,
    probabilities: NDArray[np.float32],
    png: Callable[[NDArray[np.uint8]], bytes],
) -> None:
    """They are answered in order, and nothing of one is taken for the next."""
    files = [png(image) for image in heldout[0][:3]]
    with connect(strict.address) as kept:
        for number, file in enumerate(files):
            last = b"Connection: close\r\n" if number == 2 else b""
            head = START + b"X-Request-Id: r%d\r\nContent-Length: %d\r\n%s\r\n" % (number, len(file), last)
            kept.sendall(head + file)
        answers = read_all(kept)
    assert re.findall(rb"x-request-id: (r\d)", answers) == [b"r0", b"r1", b"r2"]
    found = re.findall(rb'"classes":\[{"label":"\d","index":(\d)', answers)
    assert list(map(int, found)) == probabilities[:3].argmax(axis=1).tolist()


@pytest.mark.parametrize("count", [30, 200])
def test_a_large_body_arrives_in_pieces(strict: HttpSite, heldout: Heldout, count: int) -> None:
    """However it is read: pixels of 92 KB and 614 KB."""
    pixels = heldout[0][np.arange(count) % len(heldout[0])]
    tensor = {"name": "image", "datatype": "UINT8", "shape": pixels.shape}
    head = json.dumps({"inputs": [tensor | {"parameters": {"binary_data_size": pixels.size}}]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    (output,) = ask(strict.address, "/v2/models/digits/infer", head + pixels.tobytes(), headers=headers).json["outputs"]
    assert output["shape"] == [count, 10]
