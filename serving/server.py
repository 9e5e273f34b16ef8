"""A server: all protocols on one port, over one transport."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Self

from serving.config import Limits, Transport
from serving.models.registry import ModelRegistry
from serving.protocols.base import RepositoryControl, ServerContext, list_services, load_protocols
from serving.protocols.health import Health
from serving.protocols.inputs import InputDecoder
from serving.protocols.stream import Streams
from serving.runtimes.cores import count_cores
from serving.threads import WorkerPool
from serving.transports import unix
from serving.transports.auth import Tokens
from serving.transports.call import Methods
from serving.transports.choice import choose
from serving.transports.dispatcher import Dispatcher
from serving.transports.grpcio import GrpcioTransport
from serving.transports.native import NativeTransport
from serving.transports.tls import ServerTls
from serving.watchdog import Watchdog

if TYPE_CHECKING:
    from serving.observability.tracing import Tracing
    from serving.rollouts.rollouts import Rollouts
    from serving.rollouts.shadows import Shadows

# Those of the models; gRPC's own services, health and reflection, have no status of their own.
SERVICES = tuple(name for name in list_services() if not name.startswith("grpc."))
CONTROL_THREADS = 4  # some for what takes microseconds while others load models
CLOSE_SECONDS = 0.5  # for clients to hear that the server ends

log = logging.getLogger(__name__)


class Server:
    """Serves models from when it is made until `stop`; as a context manager, until the end of the block."""

    def __init__(
        self,
        models: ModelRegistry,
        host: str,
        port: int,
        limits: Limits,
        tls: ServerTls | None = None,
        token: str | Path | None = None,
        admin_token: str | Path | None = None,
        repository: RepositoryControl | None = None,
        shadows: Shadows | None = None,
        rollouts: Rollouts | None = None,
        tracing: Tracing | None = None,
        transport: Transport = "auto",
    ) -> None:
        """Listen on a port, and answer.

        Args:
            models: Loaded and warm models.
            host: Name or address of an interface, or unix:PATH.
            port: 0 takes a free port; see the attribute `address`.
            limits: The limits that requests must keep.
            tls: Certificate and key; None is without encryption.
            token: The callers' tokens, or their file; None lets everybody call.
            admin_token: The administrators' tokens, for loading and unloading models; without them nobody may, except
                on a server for this machine only that has no `token`.
            repository: Loads and unloads models on request; None refuses to.
            shadows: Compares the answers of versions on request; None refuses to.
            rollouts: Rolls versions out on request; None refuses to.
            tracing: Traces calls.
            transport: Receives calls; `auto` chooses as `serving.transports.choice` says.

        Raises:
            BadInput: The port cannot be bound, or a file of certificates or tokens cannot be read or used.
        """
        kind, reason = choose(transport, host, tls is not None)
        self._models, self._streams, self._health = models, Streams(), Health()
        self.ready = False
        """Whether requests are taken."""
        self.transport = kind
        """The transport that receives calls."""
        self.live = True
        """Whether requests get through; if not, only a restart helps."""
        self._workers, self._control = WorkerPool(count_cores(), "decode"), WorkerPool(CONTROL_THREADS, "control")
        self._decoder = InputDecoder(limits)
        self._watchdog: Watchdog | None = None
        methods = self._find_methods(repository, shadows, rollouts)
        traced = tracing.follow_calls(methods) if tracing else methods
        dispatcher = Dispatcher(traced, limits, Tokens(host, token, admin_token))
        self.refusals: Mapping[str, int] = dispatcher.refusals
        """Number of calls that were refused before their request was read, by the name of the status."""
        self._transport = NativeTransport(dispatcher) if kind == "native" else GrpcioTransport(dispatcher)
        self._socket: Path | None = None
        self.address = self._listen(host, port, tls)
        """HOST:PORT or unix:PATH, as clients write it."""
        self._transport.start()
        log.info("the transport is %s, %s", kind, reason)
        self.announce(True)
        models.subscribe(self._announce_model)

    def announce(self, ready: bool) -> None:
        """Set whether the server, its services and its models take requests, as health checks report it."""
        self.ready = ready
        self._health.set("", ready and self._models.serves_any())
        for service in SERVICES:
            self._health.set(service, ready)
        for name in self._models.names():
            self._health.set(name, ready and bool(self._models.get(name).versions))

    def _announce_model(self, name: str, served: bool) -> None:
        self._health.set(name, served)
        self._health.set("", self._models.serves_any())

    def watch(self, on_stuck: Callable[[str], None] = log.critical) -> None:
        """Find out from now on whether requests get through, for liveness checks.

        Args:
            on_stuck: Called with a report when none does.
        """

        def set_live(live: bool, report: str) -> None:
            self.live = live
            self._health.set_live(live)
            self.announce(live)
            if not live:
                on_stuck(report)

        self._watchdog = Watchdog(self._models, self._decoder, self._workers, set_live)
        self._watchdog.start()

    def stop(self, grace_seconds: float) -> None:
        """Refuse new requests, answer the active ones, and close.

        Args:
            grace_seconds: Time for active requests; later ones are cut off.
        """
        end = time.monotonic() + grace_seconds
        self.ready = False
        if self._watchdog:
            self._watchdog.stop()
        self._health.close()
        # While requests are active, new ones on open connections are refused as UNAVAILABLE, which clients send
        # elsewhere; gRPC's own stop would cancel some of them.
        self._transport.dispatcher.close()
        self._streams.close()
        self._models.close()
        self._models.drain(grace_seconds)
        self._transport.dispatcher.drain(max(0.0, end - time.monotonic()))
        self._streams.abort()
        # What is left needs no answer: calls whose request never came.
        self._transport.stop(min(CLOSE_SECONDS, max(0.0, end - time.monotonic())))
        self._workers.close()
        self._control.close()
        if self._socket:
            self._socket.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(grace_seconds=10)

    def _find_methods(
        self, repository: RepositoryControl | None, shadows: Shadows | None, rollouts: Rollouts | None
    ) -> Methods:
        """Return the methods of all protocols, by path."""
        context = ServerContext(
            models=self._models,
            decoder=self._decoder,
            workers=self._workers,
            control=self._control,
            streams=self._streams,
            health=self._health,
            server=self,
            repository=repository,
            shadows=shadows,
            rollouts=rollouts,
            transport=self.transport,
        )
        return {
            path: method for protocol in load_protocols() for path, method in protocol.find_methods(context).items()
        }

    def _listen(self, host: str, port: int, tls: ServerTls | None) -> str:
        """Listen, and return the address."""
        if host.startswith(unix.PREFIX):
            self._socket = unix.claim(host)
            self._transport.listen(f"{unix.PREFIX}{self._socket}", tls)
            return f"{unix.PREFIX}{self._socket}"
        host = f"[{host}]" if ":" in host and not host.startswith("[") else host
        return f"{host}:{self._transport.listen(f'{host}:{port}', tls)}"
