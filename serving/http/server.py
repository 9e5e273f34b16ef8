"""The HTTP server: uvicorn's protocol on an event loop of its own, with the limits of the gRPC server.

uvicorn, because it is the best kept of the ASGI servers, and can be given what it lacks: limits (`connection`), renewed
certificates, and short calls without a task. h2corn, in Rust, is faster with many connections; but it lets a head
trickle in for ever, closes slow connections without a word, and keeps the certificates of its start. granian, in Rust,
too, is slower with few connections, and keeps them as well.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable, Sequence
from contextlib import suppress
from threading import Event
from typing import Self, cast

from prometheus_client import CollectorRegistry
from uvicorn import Config
from uvicorn.server import ServerState

from resnet import BadInput
from serving.core import ServerCore
from serving.http.app import make_app
from serving.http.connection import HttpConnection, make_factory
from serving.http.endpoint import Exchange
from serving.http.versions import VersionPages
from serving.observability.history import INTERVAL_SECONDS, TrafficHistory
from serving.threads import WorkerPool, start_vital
from serving.transports.address import cannot_listen
from serving.transports.choice import is_local
from serving.transports.tls import ServerTls

WORKERS = 2  # for bodies that take longer than a millisecond to read
BACKLOG = 1024  # connections that wait to be accepted
SWEEP_SECONDS = 1.0  # between looks for slow clients, and for renewed certificates
FLUSH_SECONDS = 0.5  # for the last responses to leave
QUIET = "uvicorn.error", "python_multipart"  # they log a line for what a stranger sends

log = logging.getLogger(__name__)


class HttpServer:
    """Serves HTTP from when it is made until `stop`; as a context manager, until the end of the block.

    Attributes:
        address: HOST:PORT.
        url: The address of its page.
    """

    def __init__(
        self,
        core: ServerCore,
        metrics: CollectorRegistry,
        host: str,
        port: int,
        versions: VersionPages | None = None,
        tls: ServerTls | None = None,
        origins: Sequence[str] = (),
    ) -> None:
        """Listen on a port, and answer.

        Args:
            core: The server whose methods answer; its limits hold for HTTP, too.
            metrics: What /metrics shows.
            host: Name or address of an interface.
            port: 0 takes a free port; see the attribute `address`.
            versions: Describes the served versions; None without a repository.
            tls: Certificate and key; None is without encryption.
            origins: Origins of pages elsewhere that may call, `*` for all.

        Raises:
            BadInput: The port cannot be bound, or a certificate cannot be used.
        """
        for name in QUIET:
            logging.getLogger(name).setLevel(logging.ERROR)
        self._limits, self._tls = core.dispatcher.limits, _Certificates(tls) if tls else None
        self._workers = WorkerPool(WORKERS, "http")
        self._history = TrafficHistory(core.models, core.refusals)
        exchange = Exchange(core.dispatcher, self._workers)
        self._app = make_app(core, exchange, metrics, self._history, versions, origins, is_local(host))
        self._socket = _bind(host, port)
        shown = f"[{host}]" if ":" in host else host
        self.address = f"{shown}:{self._socket.getsockname()[1]}"
        name = "localhost" if host in ("0.0.0.0", "::") else shown
        self.url = f"{'https' if tls else 'http'}://{name}:{self._socket.getsockname()[1]}/"
        self._state = ServerState()
        self._started, self._ended, self._flush_seconds = Event(), Event(), FLUSH_SECONDS
        self._loop = asyncio.new_event_loop()
        self._closing = asyncio.Event()
        start_vital(self._run, "http")
        self._started.wait()

    def stop(self, grace_seconds: float = FLUSH_SECONDS) -> None:
        """Close, once the last responses have left.

        Args:
            grace_seconds: Time for that, if their clients are slow.
        """
        self._flush_seconds = max(FLUSH_SECONDS, grace_seconds)
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._closing.set)
        self._ended.wait(self._flush_seconds + FLUSH_SECONDS)
        self._workers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._started.set()
            self._ended.set()

    async def _serve(self) -> None:
        config = Config(
            self._app,
            log_config=None,
            access_log=False,
            proxy_headers=False,  # what names the caller is for whoever stands in between to say
            lifespan="off",
            ws="none",
            server_header=False,
            timeout_keep_alive=int(min(self._limits.idle_seconds, 2**30)),
        )
        config.load()
        factory = make_factory(self._limits, self._app.find, config, self._state)
        listener = await self._listen(factory)
        self._started.set()
        sampled = self._loop.time()
        while not self._closing.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), SWEEP_SECONDS)
            now = self._loop.time()
            for connection in self._list_connections():
                connection.expire(now)
            if self._tls and self._tls.refresh():  # what is open keeps the old certificate
                old, listener = listener, await self._listen(factory)
                old.close()
            if now - sampled >= INTERVAL_SECONDS - SWEEP_SECONDS / 2:
                sampled = now
                self._workers.submit(self._history.sample)
        listener.close()
        self._socket.close()
        await self._close()

    async def _listen(self, factory: Callable[[], asyncio.Protocol]) -> asyncio.AbstractServer:
        return await self._loop.create_server(
            factory,
            sock=self._socket.dup(),  # which is closed with what listens
            backlog=BACKLOG,
            ssl=self._tls.context if self._tls else None,
            ssl_handshake_timeout=self._limits.handshake_seconds if self._tls else None,
        )

    async def _close(self) -> None:
        """End all connections, those with a response under way when it has left."""
        end = self._loop.time() + self._flush_seconds
        for connection in self._list_connections():
            if connection.is_flushed:
                connection.shutdown()
        while self._loop.time() < end and not (
            all(connection.is_flushed for connection in self._list_connections()) and not self._state.tasks
        ):
            await asyncio.sleep(0.005)
        for connection in self._list_connections():
            connection.abort()

    def _list_connections(self) -> list[HttpConnection]:
        return [cast(HttpConnection, connection) for connection in self._state.connections]


class _Certificates:
    """The certificates of a server.

    Attributes:
        context: Made of the latest files that could be used.
    """

    def __init__(self, tls: ServerTls) -> None:
        self._tls, self._files = tls, tls.follow("the certificate for HTTP")
        self._used = self._files.content
        self.context = self._make_context()

    def refresh(self) -> bool:
        """Return whether there is a new context, of renewed files."""
        self._files.refresh()
        if self._files.content is self._used:
            return False
        self._used = self._files.content
        try:
            self.context = self._make_context()
        except BadInput as error:  # it has changed again meanwhile
            log.error("the certificate for HTTP could not be renewed, the old one stays: %s", error)
            return False
        return True

    def _make_context(self) -> ssl.SSLContext:
        """Return a context: one that was made before would trust a replaced authority on."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        try:
            context.load_cert_chain(self._tls.certificate, self._tls.key)
            if self._tls.client_authority is not None:
                context.load_verify_locations(self._tls.client_authority)
                context.verify_mode = ssl.CERT_REQUIRED
        except (OSError, ssl.SSLError) as error:
            raise BadInput(f"{self._tls.certificate} and its key cannot be used for HTTP: {error}") from None
        return context


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, *_, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        is_both = host == "::" and socket.has_dualstack_ipv6()
        listener = socket.create_server((str(place[0]), port), family=family, backlog=BACKLOG, dualstack_ipv6=is_both)
        # uvicorn writes head and body apart: without this the body waits 40 ms for the client's word on the head.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except (OSError, UnicodeError):
        raise cannot_listen(f"[{host}]:{port}" if ":" in host else f"{host}:{port}", "--http-port") from None
