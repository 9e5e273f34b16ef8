"""h2load against real servers of gRPC and of HTTP, which answer at once."""

from __future__ import annotations

import itertools
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import grpc
import pytest

from benchmarks.load import h2load
from resnet import BadInput, CheckFailed

pytestmark = pytest.mark.skipif(not shutil.which("h2load"), reason="h2load is not installed")

PATH = "/test.Echo/Call"


@contextmanager
def serve(answer: Callable[[bytes, grpc.ServicerContext], bytes]) -> Iterator[str]:
    """Answer a method of bytes, and yield the address."""
    server = grpc.server(ThreadPoolExecutor(8))
    handler = grpc.method_handlers_generic_handler("test.Echo", {"Call": grpc.unary_unary_rpc_method_handler(answer)})
    server.add_generic_rpc_handlers([handler])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(0).wait()


def test_h2load_speaks_grpc() -> None:
    """The server gets the message as it is, and every answer is timed."""
    seen = set()

    def echo(message: bytes, _: grpc.ServicerContext) -> bytes:
        seen.add(message)
        return message

    with serve(echo) as address:
        sample = h2load.measure(address, PATH, b"an image", in_flight=4, images=3, seconds=0.2, connections=2)
    assert seen == {b"an image"}
    assert not sample.failures
    assert sample.images_per_second == pytest.approx(len(sample.latencies_ms) * 3 / 0.2)
    assert (sample.latencies_ms > 0).all()


def test_refusals_under_load_are_not_taken_for_answers() -> None:
    """To h2load they look like success: their status is in gRPC's trailers."""
    calls = itertools.count()

    def refuse(message: bytes, context: grpc.ServicerContext) -> bytes:
        if next(calls):
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
        return message

    with serve(refuse) as address, pytest.raises(CheckFailed, match="refused requests under load"):
        h2load.measure(address, PATH, b"an image", in_flight=1, images=1, seconds=0.1)


def test_a_method_that_is_not_there_is_a_sentence() -> None:
    """It is asked for once before the load."""
    with serve(lambda message, _: message) as address, pytest.raises(BadInput, match="UNIMPLEMENTED"):
        h2load.measure(address, "/test.Echo/Other", b"an image", in_flight=1, images=1, seconds=0.1)


def test_requests_are_shared_evenly_by_connections() -> None:
    """h2load has as many on each."""
    with pytest.raises(BadInput, match="no multiple of 2 connections"):
        h2load.measure("127.0.0.1:1", PATH, b"", in_flight=3, images=1, seconds=0.1, connections=2)


class Page(BaseHTTPRequestHandler):
    """Answers every other request; the rest it has no time for."""

    protocol_version = "HTTP/1.1"
    calls = itertools.count()

    def do_POST(self) -> None:
        """Answer."""
        body = self.rfile.read(int(self.headers["content-length"]))
        good = body == b"an image" and self.headers["content-type"] == "image/x" and next(self.calls) % 2
        self.send_response(200 if good else 503)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def test_h2load_posts_to_a_url() -> None:
    """Over HTTP/1.1, with headers; what is not answered with 200 is counted by its status."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever).start()
        url = f"http://127.0.0.1:{server.server_port}/predict"
        sample = h2load.measure_http(url, b"an image", 2, 1, 0.3, {"content-type": "image/x"})
        server.shutdown()
    assert len(sample.latencies_ms) > 0
    assert sample.failures.keys() == {"503"}


def test_a_server_that_is_not_there_is_a_sentence() -> None:
    """h2load itself ends as if all were well."""
    with pytest.raises(CheckFailed, match="answered nothing"):
        h2load.measure_http("http://127.0.0.1:1/predict", b"an image", 1, 1, 0.1)
