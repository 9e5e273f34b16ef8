"""What strangers do to a connection: silence, floods, what is no HTTP. Others are answered all the while."""

from __future__ import annotations

import json
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
from tests.serving.http.site import HttpSite, ask, connect, read_all, read_one, serve

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
    assert b"it is not HTTP/1.1 as this server reads it" in answer


def test_an_idle_connection_makes_room(strict: HttpSite) -> None:
    """The one that was idle for longest."""
    with ExitStack() as stack:
        idle = [stack.enter_context(connect(strict.address)) for _ in range(8)]
        assert ask(strict.address, "/livez").status == 200
        assert read_all(idle[0]) == b""


def test_requests_follow_each_other(strict: HttpSite) -> None:
    """On one connection, each after the answer to the one before."""
    with connect(strict.address) as kept:
        for _ in range(3):
            kept.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert read_one(kept).startswith(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize("early", [b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n", START + b"X: y", b"\x00\xff"])
def test_a_request_that_does_not_wait_ends_the_connection(
    strict: HttpSite, heldout: Heldout, png: Callable[[NDArray[np.uint8]], bytes], early: bytes
) -> None:
    """The one before is answered, and nothing of the other is read."""
    file = png(heldout[0][0])
    with connect(strict.address) as hasty:
        hasty.sendall(START + b"Content-Length: %d\r\n\r\n" % len(file) + file + early)
        answer = read_all(hasty)
    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b"connection: close" in answer


def test_many_that_do_not_wait_do_no_harm(strict: HttpSite) -> None:
    """However many there are, and whatever is wrong with them."""
    wrong = b"POST /classify?a=1 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"
    for _ in range(10):
        with connect(strict.address) as hasty:
            hasty.sendall(START + b"Content-Length: 0\r\n\r\n" + wrong * 230)
            assert read_all(hasty).startswith(b"HTTP/1.1 400 ")


def test_another_protocol_is_not_taken_up(
    strict: HttpSite, heldout: Heldout, png: Callable[[NDArray[np.uint8]], bytes]
) -> None:
    """A client that offers HTTP/2 is answered in HTTP/1.1, and its body is no request."""
    file = png(heldout[0][0])
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
    with connect(strict.address) as kept:
        kept.sendall(START + offer + b"Content-Length: %d\r\n\r\n" % len(file))
        kept.sendall(file)
        assert read_one(kept).startswith(b"HTTP/1.1 200 OK")
    inner = b"GET /livez HTTP/1.1\r\nHost: a.b\r\n\r\n"
    with connect(strict.address) as smuggler:
        smuggler.sendall(START + offer + b"Content-Length: %d\r\n\r\n" % len(inner))
        smuggler.sendall(inner)
        smuggler.settimeout(1)
        assert read_all(smuggler).count(b"HTTP/1.1 ") == 1


def test_a_request_without_its_body_makes_room(strict: HttpSite) -> None:
    """As many of them as there may be connections keep nobody out."""
    with ExitStack() as stack:
        for _ in range(8):
            waiting = stack.enter_context(connect(strict.address))
            waiting.sendall(START + b"Content-Length: 100\r\n\r\n")
        assert ask(strict.address, "/livez").status == 200


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
            answer = read_one(kept)
        assert answer.startswith(b"HTTP/1.1 200 OK")
        assert read_all(kept) == b""


@pytest.mark.parametrize("count", [30, 200])
def test_a_large_body_arrives_in_pieces(strict: HttpSite, heldout: Heldout, count: int) -> None:
    """However it is read: pixels of 92 KB and 614 KB."""
    pixels = heldout[0][np.arange(count) % len(heldout[0])]
    tensor = {"name": "image", "datatype": "UINT8", "shape": pixels.shape}
    head = json.dumps({"inputs": [tensor | {"parameters": {"binary_data_size": pixels.size}}]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    (output,) = ask(strict.address, "/v2/models/digits/infer", head + pixels.tobytes(), headers=headers).json["outputs"]
    assert output["shape"] == [count, 10]
