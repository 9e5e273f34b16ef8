"""A real server over HTTP, beside gRPC, and a client that says exactly what it is told."""

from __future__ import annotations

import http.client
import json
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from serving.config import Compute, Limits
from serving.http.server import HttpServer
from serving.http.versions import VersionPages
from serving.models import loader
from serving.models.registry import ModelRegistry
from serving.models.version_policy import parse
from serving.models.watcher import Watcher
from serving.observability.metrics import make_metrics
from serving.rollouts.rollouts import Rollouts
from serving.rollouts.shadows import Shadows
from serving.server import Server
from serving.transports.tls import ServerTls

JSON = "application/json"
PROBLEM = "application/problem+json"


class HttpSite(NamedTuple):
    """A running server.

    Attributes:
        http: Its HTTP side.
        server: Its gRPC side.
        models: Its models.
        pages: What its HTTP side says of the versions.
        shadows: Its shadows.
        rollouts: Its rollouts, whose guard looks only when it is told to.
    """

    http: HttpServer
    server: Server
    models: ModelRegistry
    pages: VersionPages
    shadows: Shadows
    rollouts: Rollouts

    @property
    def address(self) -> str:
        """HOST:PORT of the HTTP side."""
        return self.http.address


class HttpReply(NamedTuple):
    """A response: status, headers by name in lower case, and body."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body, parsed."""
        return json.loads(self.body)


def ask(
    address: str, path: str, body: bytes | object = None, method: str = "", headers: Mapping[str, str] | None = None
) -> HttpReply:
    """Send a request; a body that is not bytes is sent as JSON, and a body makes it a POST."""
    host, _, port = address.rpartition(":")
    content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    connection = http.client.HTTPConnection(host, int(port), timeout=30)
    try:
        connection.request(method or ("GET" if body is None else "POST"), path, content, dict(headers or {}))
        response = connection.getresponse()
        names = {name.lower(): value for name, value in response.getheaders()}
        return HttpReply(response.status, names, response.read())
    finally:
        connection.close()


def connect(address: str) -> socket.socket:
    """Open a connection that nobody speaks on yet."""
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=30)


def read_all(connection: socket.socket) -> bytes:
    """Return what comes until the other side closes."""
    received = b""
    try:
        while part := connection.recv(65536):
            received += part
    except (ConnectionError, TimeoutError):
        pass
    return received


def read_one(connection: socket.socket) -> bytes:
    """Return one response, whose length its head tells, or what comes until the other side closes."""
    received = b""
    while part := connection.recv(65536):
        received += part
        head, found, body = received.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        if found and length and len(body) >= int(length[1]):
            break
    return received


@contextmanager
def serve(repository: Path, versions: str = "latest", **options: Any) -> Iterator[HttpSite]:
    """Serve a repository until the end of the block.

    Args:
        repository: The folder.
        versions: As `--versions`.
        options: `limits`, `token`, `admin_token`, `tls` and `origins`.
    """
    models = ModelRegistry()
    load = partial(loader.load, compute=Compute(device="cpu", tune=False))
    watcher = Watcher(repository, models, load, parse(versions))
    watcher.start()
    shadows, rollouts = Shadows(models, watcher, lambda: True), Rollouts(models, watcher, lambda: True)
    limits = options.get("limits", Limits())
    token, tls = options.get("token"), options.get("tls")
    server = Server(
        models,
        "127.0.0.1",
        0,
        limits,
        token=token,
        admin_token=options.get("admin_token"),
        repository=watcher,
        shadows=shadows,
        rollouts=rollouts,
        transport="grpcio",
    )
    pages, origins = VersionPages(models, watcher), options.get("origins", ())
    with server, open_http(server, pages, tls, origins) as http_side:
        yield HttpSite(http_side, server, models, pages, shadows, rollouts)
        rollouts.close()
        shadows.close()


def open_http(
    server: Server,
    versions: VersionPages | None = None,
    tls: ServerTls | None = None,
    origins: tuple[str, ...] = (),
    port: int = 0,
) -> HttpServer:
    """Serve HTTP on a port, by default a free one."""
    metrics = make_metrics(server.models, "grpcio", server.refusals)
    return HttpServer(server, metrics, "127.0.0.1", port, versions, tls, origins)
