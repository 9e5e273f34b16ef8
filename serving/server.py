"""A server: all protocols on one port, over one transport."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

from serving.config import Limits, Transport
from serving.core import ServerCore
from serving.models.registry import ModelRegistry
from serving.protocols.base import RepositoryControl
from serving.transports import unix
from serving.transports.auth import Tokens
from serving.transports.choice import choose
from serving.transports.grpcio import GrpcioTransport
from serving.transports.native import NativeTransport
from serving.transports.tls import ServerTls

if TYPE_CHECKING:
    from serving.observability.tracing import Tracing
    from serving.rollouts.rollouts import Rollouts
    from serving.rollouts.shadows import Shadows

CLOSE_SECONDS = 0.5  # for clients to hear that the server ends

log = logging.getLogger(__name__)


class Server(ServerCore):
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
            repository: As in `ServerCore`, like the following ones.
            shadows: Compares versions.
            rollouts: Rolls versions out.
            tracing: Traces calls.
            transport: Receives calls; `auto` chooses as `serving.transports.choice` says.

        Raises:
            BadInput: The port cannot be bound, or a file of certificates or tokens cannot be read or used.
        """
        kind, reason = choose(transport, host, tls is not None)
        tokens = Tokens(host, token, admin_token)
        super().__init__(models, limits, tokens, kind, repository, shadows, rollouts, tracing)
        self._transport = NativeTransport(self.dispatcher) if kind == "native" else GrpcioTransport(self.dispatcher)
        self._socket: Path | None = None
        self.address = self._listen(host, port, tls)
        """HOST:PORT or unix:PATH, as clients write it."""
        self._transport.start()
        log.info("the transport is %s, %s", kind, reason)
        self.open()

    def stop(self, grace_seconds: float) -> None:
        """Refuse new requests, answer the active ones, and close.

        Args:
            grace_seconds: Time for active requests; later ones are cut off.
        """
        end = time.monotonic() + grace_seconds
        self.drain(grace_seconds)
        # What is left needs no answer: calls whose request never came.
        self._transport.stop(min(CLOSE_SECONDS, max(0.0, end - time.monotonic())))
        self.close()
        if self._socket:
            self._socket.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(grace_seconds=10)

    def _listen(self, host: str, port: int, tls: ServerTls | None) -> str:
        """Listen, and return the address."""
        if host.startswith(unix.PREFIX):
            self._socket = unix.claim(host)
            self._transport.listen(f"{unix.PREFIX}{self._socket}", tls)
            return f"{unix.PREFIX}{self._socket}"
        host = f"[{host}]" if ":" in host and not host.startswith("[") else host
        return f"{host}:{self._transport.listen(f'{host}:{port}', tls)}"
