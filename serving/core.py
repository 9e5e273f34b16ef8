"""All of a server but its transport: what answers calls, and finds out whether they get through."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from serving.config import Limits
from serving.models.registry import ModelRegistry
from serving.protocols.base import RepositoryControl, ServerContext, list_services, load_protocols
from serving.protocols.health import Health
from serving.protocols.inputs import InputDecoder
from serving.protocols.stream import Streams
from serving.runtimes.cores import count_cores
from serving.threads import WorkerPool
from serving.transports.auth import Tokens
from serving.transports.call import Methods
from serving.transports.dispatcher import Dispatcher
from serving.watchdog import Watchdog

if TYPE_CHECKING:
    from serving.observability.tracing import Tracing
    from serving.rollouts.rollouts import Rollouts
    from serving.rollouts.shadows import Shadows

# Those of the models; gRPC's own services, health and reflection, have no status of their own.
SERVICES = tuple(name for name in list_services() if not name.startswith("grpc."))
CONTROL_THREADS = 4  # some for what takes microseconds while others load models

log = logging.getLogger(__name__)


class ServerCore:
    """A server without a transport: it answers what its dispatcher is given.

    Attributes:
        dispatcher: Takes calls, of any transport.
        models: The models that it serves.
    """

    def __init__(
        self,
        models: ModelRegistry,
        limits: Limits,
        tokens: Tokens,
        transport: str,
        repository: RepositoryControl | None = None,
        shadows: Shadows | None = None,
        rollouts: Rollouts | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        """Be ready for calls, and not announce it yet.

        Args:
            models: Loaded and warm models.
            limits: The limits that requests must keep.
            tokens: The tokens that callers need.
            transport: Name of the transport, for people.
            repository: Loads and unloads models on request; None refuses to.
            shadows: Compares the answers of versions on request; None refuses to.
            rollouts: Rolls versions out on request; None refuses to.
            tracing: Traces calls.
        """
        self.models, self._streams, self._health = models, Streams(), Health()
        self.ready = False
        """Whether requests are taken."""
        self.transport = transport
        """The transport that receives calls."""
        self.live = True
        """Whether requests get through; if not, only a restart helps."""
        self._workers, self._control = WorkerPool(count_cores(), "decode"), WorkerPool(CONTROL_THREADS, "control")
        self._decoder = InputDecoder(limits)
        self._watchdog: Watchdog | None = None
        methods = self._find_methods(repository, shadows, rollouts)
        self.dispatcher = Dispatcher(tracing.follow_calls(methods) if tracing else methods, limits, tokens)
        self.refusals: Mapping[str, int] = self.dispatcher.refusals
        """Number of calls that were refused before their request was read, by the name of the status."""

    def open(self) -> None:
        """Announce that requests are taken, and follow what is served."""
        self.announce(True)
        self.models.subscribe(self._announce_model)

    def announce(self, ready: bool) -> None:
        """Set whether the server, its services and its models take requests, as health checks report it."""
        self.ready = ready
        self._health.set("", ready and self.models.serves_any())
        for service in SERVICES:
            self._health.set(service, ready)
        for name in self.models.names():
            self._health.set(name, ready and bool(self.models.get(name).versions))

    def _announce_model(self, name: str, served: bool) -> None:
        self._health.set(name, served)
        self._health.set("", self.models.serves_any())

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

        self._watchdog = Watchdog(self.models, self._decoder, self._workers, set_live)
        self._watchdog.start()

    def drain(self, grace_seconds: float) -> None:
        """Refuse new requests, and answer the active ones.

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
        self.dispatcher.close()
        self._streams.close()
        self.models.close()
        self.models.drain(grace_seconds)
        self.dispatcher.drain(max(0.0, end - time.monotonic()))
        self._streams.abort()

    def close(self) -> None:
        """End the threads, once everything is drained."""
        self._workers.close()
        self._control.close()

    def _find_methods(
        self, repository: RepositoryControl | None, shadows: Shadows | None, rollouts: Rollouts | None
    ) -> Methods:
        """Return the methods of all protocols, by path."""
        context = ServerContext(
            models=self.models,
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
