"""Every error of the table over HTTP: its status, and what to do."""

from __future__ import annotations

import gc
import gzip
import socket
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.config import Limits
from serving.errors import STATUSES, ServingError
from serving.http import problems
from serving.http.server import HttpServer
from tests.serving import gated
from tests.serving.http.site import PROBLEM, HttpReply, HttpSite, ask, connect, open_http, read_all, serve

CLASSIFY = "/classify/digits"
HEAD = b'{"inputs":[{"name":"image","datatype":"UINT8","shape":[1,32,32,3],"parameters":{"binary_data_size":3072}}]}'
INFER, BODY = "/v2/models/digits/infer", HEAD + bytes(3072)
SIZE = {"Inference-Header-Content-Length": str(len(HEAD))}


@pytest.fixture
def held(repository: Path) -> Iterator[tuple[gated.Gated, HttpServer]]:
    """A server that computes when the test says so, one image at a time with one in the queue."""
    with gated.start(repository, max_batch=1, max_queue=1) as server, open_http(server.server) as http:
        yield server, http


def ask_aside(replies: list[HttpReply], http: HttpServer, headers: dict[str, str] | None = None) -> threading.Thread:
    """Send a request from a thread of its own."""
    thread = threading.Thread(
        target=lambda: replies.append(ask(http.address, INFER, BODY, headers=SIZE | (headers or {})))
    )
    thread.start()
    return thread


def test_every_error_is_a_problem() -> None:
    """With the status of the table, and a title in words."""
    for kind in STATUSES:
        error = kind("it failed")
        problem = problems.to_problem(error, "id-1")
        assert problem["status"] == error.status.http
        assert problem["detail"] == problem["error"] == "it failed"
        assert problem["code"] == error.status.name
        assert problem["type"] == f"/docs#{kind.__name__}"
        assert problem["request_id"] == "id-1"
    assert problems.to_problem(ServingError("x"))["title"] == "Serving error"


def test_a_full_queue_says_when_to_come_back(held: tuple[gated.Gated, HttpServer]) -> None:
    """In whole seconds for everybody, in milliseconds for those who know."""
    server, http = held
    replies: list[HttpReply] = []
    threads = [ask_aside(replies, http)]
    server.engine.entered.acquire()
    threads.append(ask_aside(replies, http))
    server.await_queued(1)
    refused = ask(http.address, INFER, BODY, headers=SIZE)
    assert refused.status == 429
    assert refused.headers["content-type"] == PROBLEM
    assert refused.json["code"] == "RESOURCE_EXHAUSTED"
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json["retry_after_ms"] > 0
    server.engine.gate.release(100)
    for thread in threads:
        thread.join()
    assert [reply.status for reply in replies] == [200, 200]


def test_a_request_has_the_time_that_its_proxy_gives(held: tuple[gated.Gated, HttpServer]) -> None:
    """Envoy's header is the deadline: without time it is not computed."""
    _, http = held
    wrong = ask(http.address, INFER, BODY, headers=SIZE | {"X-Envoy-Expected-Rq-Timeout-Ms": "soon"})
    assert "is a number of milliseconds, not 'soon'" in wrong.json["detail"]
    reply = ask(http.address, INFER, BODY, headers=SIZE | {"X-Envoy-Expected-Rq-Timeout-Ms": "0"})
    assert reply.status == 504
    assert reply.json["code"] == "DEADLINE_EXCEEDED"


def test_a_caller_who_goes_costs_nothing(held: tuple[gated.Gated, HttpServer]) -> None:
    """What nobody waits for is not computed."""
    server, http = held
    replies: list[HttpReply] = []
    thread = ask_aside(replies, http)
    server.engine.entered.acquire()
    with connect(http.address) as gone:
        head = f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(BODY)}\r\n"
        head += f"Inference-Header-Content-Length: {len(HEAD)}\r\n\r\n"
        gone.sendall(head.encode() + BODY)
        server.await_queued(1)
    while len(server.server.dispatcher.active) > 1:
        pass
    server.engine.gate.release(100)
    thread.join()
    server.await_code("CANCELLED")
    assert replies[0].status == 200
    assert len(server.engine.batches) == 1


def test_a_failure_of_the_server_has_an_id(repository: Path) -> None:
    """And no detail: the log has them."""
    with gated.start(repository) as server, open_http(server.server) as http:
        server.engine.failure = RuntimeError("the GPU fell off the bus")
        server.engine.gate.release(100)
        reply = ask(http.address, INFER, BODY, headers=SIZE)
    assert reply.status == 500
    assert reply.json["request_id"]
    assert b"GPU" not in reply.body


def test_tokens_are_those_of_grpc(repository: Path) -> None:
    """Missing, wrong and right, of callers and administrators; probes and metrics have none."""
    with serve(repository, token="sesame", admin_token="root") as site:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "sesame"}):
            for path, body in ((INFER, BODY), (CLASSIFY, b"x"), ("/status", None), ("/history", None)):
                reply = ask(site.address, path, body, headers=headers)
                assert reply.status == 401
                assert reply.headers["www-authenticate"] == "Bearer"
                assert reply.json["request_id"]
        caller, admin = ({"Authorization": f"Bearer {token}"} for token in ("sesame", "root"))
        assert ask(site.address, INFER, BODY, headers=SIZE | caller).status == 200
        assert ask(site.address, "/models/digits/versions/1/examples", headers=caller).status == 200
        unload = "/v2/repository/models/digits/unload"
        assert ask(site.address, unload, b"", headers=caller).status == 403
        for path in ("/livez", "/readyz", "/readyz/digits", "/metrics", "/", "/docs", "/openapi.json"):
            assert ask(site.address, path).status == 200
        assert ask(site.address, "/openapi.json").json["security"] == [{"token": []}]
        assert ask(site.address, unload, b"", headers=admin).status == 200
        assert ask(site.address, "/readyz").status == 503
        assert site.server.refusals["UNAUTHENTICATED"] == 12


def test_a_stranger_sends_no_body(repository: Path) -> None:
    """Whoever has no token is refused before the body is read."""
    with serve(repository, token="sesame") as site, connect(site.address) as connection:
        connection.sendall(
            b"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999999\r\nExpect: 100-continue\r\n\r\n"
        )
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert b"connection: close" in answer


@pytest.mark.parametrize("how", ["length", "chunked", "gzip"])
def test_a_body_has_a_limit(repository: Path, how: str) -> None:
    """Announced, in pieces, and packed."""
    with serve(repository, limits=Limits(max_message_bytes=10_000)) as site:
        match how:
            case "length":
                reply = ask(site.address, CLASSIFY, bytes(10_001))
            case "gzip":
                reply = ask(
                    site.address, CLASSIFY, gzip.compress(bytes(50_000_000)), headers={"Content-Encoding": "gzip"}
                )
            case _:
                with connect(site.address) as connection:
                    connection.sendall(
                        b"POST /classify HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
                    )
                    send_chunks(connection, 100)
                    assert read_all(connection).startswith(b"HTTP/1.1 413 ")
                return
        assert reply.status == 413
        assert (
            "more than the 10,000 allowed" in reply.json["detail"] or "the 10,000 bytes allowed" in reply.json["detail"]
        )
        assert ask(site.address, "/livez").status == 200


def send_chunks(connection: socket.socket, count: int) -> None:
    """Send chunks of a thousand bytes, until the other side has enough."""
    try:
        for _ in range(count):
            connection.sendall(b"3e8\r\n" + bytes(1000) + b"\r\n")
    except OSError:
        pass


@pytest.mark.parametrize(
    ("body", "coding", "message"),
    [
        (b"plain", "gzip", "the body is not compressed by gzip"),
        (gzip.compress(b"x" * 1000)[:-9], "gzip", "is cut off"),
        (b"x", "br", "this server unpacks gzip, deflate"),
    ],
    ids=["no gzip", "cut off", "another coding"],  # packed bytes have the time in them, which is in no name of a test
)
def test_a_damaged_body_is_refused(site: HttpSite, body: bytes, coding: str, message: str) -> None:
    """And one in a coding that the server does not know."""
    reply = ask(site.address, CLASSIFY, body, headers={"Content-Encoding": coding})
    assert reply.status == 400
    assert message in reply.json["detail"]


def test_a_failed_request_leaves_nothing_behind(site: HttpSite) -> None:
    """Without any collection of garbage its body is gone."""
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        for path in ("/classify?bogus=1", "/classify", INFER):
            for body in (bytes(60_000), bytes(2_000_000)):
                for _ in range(5):
                    assert ask(site.address, path, body).status == 400
        kept, _ = tracemalloc.get_traced_memory()
        assert kept < 4_000_000
    finally:
        tracemalloc.stop()
        gc.enable()


@pytest.mark.parametrize(
    "path", ["/nothing", "/v2/nothing", "/page/../server.py", "/page/%2e%2e/server.py", "/classify/a/b"]
)
def test_nothing_is_where_nothing_is(site: HttpSite, path: str) -> None:
    """Whatever way the path takes."""
    reply = ask(site.address, path)
    assert reply.status == 404
    assert "/docs lists what there is" in reply.json["detail"]


@pytest.mark.parametrize(
    ("path", "method"), [("/classify", "GET"), ("/status", "POST"), ("/livez", "POST"), ("/", "PUT")]
)
def test_a_path_has_its_methods(site: HttpSite, path: str, method: str) -> None:
    """And says which."""
    reply = ask(site.address, path, method=method)
    assert reply.status == 405
    assert reply.headers["allow"] in reply.json["detail"]


def test_a_server_that_ends_refuses(repository: Path) -> None:
    """As one that others should be asked in place of."""
    with gated.start(repository) as server, open_http(server.server) as http:
        server.server.drain(0)
        assert ask(http.address, "/readyz").status == 503
        assert ask(http.address, "/livez").status == 200
        reply = ask(http.address, INFER, BODY, headers=SIZE)
        assert reply.status == 503
        assert reply.json["code"] == "UNAVAILABLE"
