"""An S3 server on this machine, and a proxy in front of it that does what networks and clouds do."""

from __future__ import annotations

import http.client
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal, NamedTuple
from unittest import mock

VARIABLES = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_MAX_ATTEMPTS": "2",
}

Fault = Literal["", "cut", "short", "changed", "busy", "expired", "down"]
"""What becomes of a request: half a body of the whole length, half a body, another one, 503, 403, no answer."""

ERRORS = {
    "busy": (503, "SlowDown", "Please reduce your request rate."),
    "expired": (403, "ExpiredToken", "The provided token has expired."),
}


class StorageRequest(NamedTuple):
    """A request to the storage."""

    method: str
    path: str


class FaultyStorage:
    """An S3 server behind a proxy.

    Attributes:
        url: What AWS_ENDPOINT_URL must be.
        fault: Decides what becomes of a request.
        requests: Number of requests, by method and path.
    """

    def __init__(self, port: int) -> None:
        self.fault: Callable[[StorageRequest], Fault] = lambda _: ""
        self.requests: Counter[StorageRequest] = Counter()
        storage = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _forward(self) -> None:
                request = StorageRequest(self.command, self.path)
                storage.requests[request] += 1
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                fault = storage.fault(request)
                if fault == "down":
                    self.close_connection = True
                    return
                if fault in ERRORS:
                    status, code, message = ERRORS[fault]
                    content = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
                    self._answer(status, {"Content-Type": "application/xml"}, content, len(content))
                    return
                connection = http.client.HTTPConnection("127.0.0.1", port)
                connection.request(self.command, self.path, body, dict(self.headers))
                response = connection.getresponse()
                content = response.read()
                connection.close()
                length = int(response.headers.get("Content-Length", len(content)))
                if fault == "changed":
                    content = bytes(byte ^ 1 for byte in content)
                if fault in ("cut", "short"):
                    content = content[: len(content) // 2]
                    length = len(content) if fault == "short" else length
                self._answer(response.status, dict(response.headers), content, length)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _forward

            def _answer(self, status: int, headers: dict[str, str], content: bytes, length: int) -> None:
                self.send_response(status)
                for key, value in headers.items():
                    if key.lower() not in ("content-length", "connection", "transfer-encoding", "date", "server"):
                        self.send_header(key, value)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                self.wfile.write(content)
                self.close_connection = len(content) < length and self.command != "HEAD"

            def log_message(self, *_: object) -> None:
                pass

        self._server = _QuietServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Listen no longer."""
        self._server.shutdown()
        self._server.server_close()


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        pass  # callers may hang up


@contextmanager
def start_storage() -> Iterator[FaultyStorage]:
    """Run an S3 server with the bucket `bucket`, which the variables of this process name meanwhile."""
    from moto.server import ThreadedMotoServer  # takes a second or two
    from s3fs import S3FileSystem

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it logs each request
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("PUT", "/bucket")
    connection.getresponse().read()
    connection.close()
    storage = FaultyStorage(port)
    S3FileSystem.clear_instance_cache()  # of another server
    try:
        with mock.patch.dict(os.environ, {**VARIABLES, "AWS_ENDPOINT_URL": storage.url}):
            yield storage
    finally:
        S3FileSystem.clear_instance_cache()
        storage.close()
        server.stop()
