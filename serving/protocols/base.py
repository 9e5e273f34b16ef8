"""What every protocol is: services, and the methods that answer their calls."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from serving.models.registry import ModelRegistry
from serving.models.version_policy import VersionPolicy
from serving.protocols import PROTOCOLS
from serving.protocols.handler import parse_message
from serving.protocols.inputs import InputDecoder
from serving.protocols.stream import Streams
from serving.threads import WorkerPool
from serving.transports.call import Call, Methods, Unary, log_answered, refuse

if TYPE_CHECKING:
    from serving.protocols.health import Health
    from serving.rollouts.rollouts import Rollouts
    from serving.rollouts.shadows import Shadows


class ServerState(Protocol):
    """Knows how the server is."""

    ready: bool
    """Whether it takes requests."""
    live: bool
    """Whether requests get through it."""


class RepositoryControl(Protocol):
    """Loads and unloads models on request; raises as `serving.models.watcher.Watcher` does."""

    def load(self, name: str, policy: VersionPolicy | None = None) -> None:
        """Serve a model of the repository; `policy` chooses its versions, None keeps the policy that it has."""

    def unload(self, name: str) -> None:
        """Stop serving a model."""


@dataclass(frozen=True, kw_only=True)
class ServerContext:
    """What protocols need of the server.

    Attributes:
        models: The served models.
        decoder: Decodes and validates images.
        workers: Threads that read requests with images, for milliseconds each.
        control: Threads for all other methods; loading a model takes one for minutes.
        streams: The open streams.
        health: Knows what is served.
        server: Knows how the server is.
        repository: Loads and unloads models; None on a server without a repository.
        shadows: The comparisons of answers; None on a server without a repository.
        rollouts: The rollouts of new versions; likewise.
        transport: Name of the transport, for people.
    """

    models: ModelRegistry
    decoder: InputDecoder
    workers: WorkerPool
    control: WorkerPool
    streams: Streams
    health: Health
    server: ServerState
    repository: RepositoryControl | None
    shadows: Shadows | None
    rollouts: Rollouts | None
    transport: str


class WireProtocol(Protocol):
    """What the module of a protocol has."""

    SERVICES: tuple[str, ...]
    """Full names of its services."""

    def find_methods(self, context: ServerContext) -> Methods:
        """Return the methods of its services, by path."""
        ...


def load_protocols() -> list[WireProtocol]:
    """Return the modules of all protocols."""
    return [cast(WireProtocol, importlib.import_module(module)) for module in PROTOCOLS.values()]


def list_services() -> list[str]:
    """Return the full names of all services."""
    return [service for protocol in load_protocols() for service in protocol.SERVICES]


def services_of(file: Any) -> tuple[str, ...]:
    """Return the full names of the services in a .proto file, given its descriptor."""
    return tuple(service.full_name for service in file.services_by_name.values())


def reply(
    function: Callable[[Any], Message],
    request_type: type[Message],
    workers: WorkerPool | None = None,
    limited: bool = True,
) -> Unary:
    """Return a method that maps a request message to a response message.

    Args:
        function: Maps them; raises a `ServingError`.
        request_type: Type of the request.
        workers: Threads to run it on; None runs it on the receiving thread, for what takes microseconds.
        limited: As in `Unary`.
    """

    def answer(call: Call) -> None:
        try:
            response = function(parse_message(request_type.FromString, call.payload)).SerializeToString()
        except Exception as error:
            refuse(call, error)
        else:
            log_answered(call)
            call.respond(response)

    def submit(call: Call) -> None:
        assert workers is not None
        workers.submit(answer, call)

    return Unary(submit if workers else answer, limited)


def reply_methods(
    file: Any,
    servicer: object,
    workers: WorkerPool,
    skip: Collection[str] = (),
    probes: Collection[str] = (),
) -> Methods:
    """Return the methods of a .proto file that compute nothing, by path.

    Args:
        file: Descriptor of the .proto file.
        servicer: Has a function of the same name for each method.
        workers: Threads to run them on.
        skip: Names of methods to leave out.
        probes: Names of methods that are answered at once on the receiving thread, and count against no limit.
    """
    methods: Methods = {}
    for service in file.services_by_name.values():
        for method in service.methods:
            if method.name not in skip:
                is_probe = method.name in probes
                function, request_type = getattr(servicer, method.name), GetMessageClass(method.input_type)
                path = f"/{service.full_name}/{method.name}"
                methods[path] = reply(function, request_type, None if is_probe else workers, not is_probe)
    return methods
