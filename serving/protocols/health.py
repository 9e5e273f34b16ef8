"""`grpc.health.v1.Health`: whether the server, its services and its models take requests, and whether it lives."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import cast

from google.protobuf.message import Message
from grpc_health.v1 import health_pb2 as pb

from serving.errors import NotFound, Unavailable
from serving.protocols.base import ServerContext, reply_methods, services_of
from serving.protocols.handler import parse_message
from serving.transports.call import Call, Methods, Streaming

SERVICES = services_of(pb.DESCRIPTOR)
LIVENESS = "liveness"  # the name of what only a restart can help; a model of this name is not reported
POLL_SECONDS = 1.0  # between a watch's looks whether its client is still there


class Health:
    """What is served, by name; threads may share it."""

    def __init__(self) -> None:
        self._serving: dict[str, bool] = {LIVENESS: True}
        self._changed = threading.Condition()
        self._closed = False

    def set(self, name: str, serving: bool) -> None:
        """Set whether a service, a model or, by the empty name, the server takes requests."""
        if name != LIVENESS:
            self._set({name: serving and not self._closed})

    def set_live(self, live: bool) -> None:
        """Set whether requests get through the server."""
        self._set({LIVENESS: live})

    def close(self) -> None:
        """Set everything to not serving, for good, except that the server lives."""
        self._closed = True
        self._set({name: False for name in self._serving if name != LIVENESS})

    def _set(self, serving: Mapping[str, bool]) -> None:
        with self._changed:
            self._serving = {**self._serving, **serving}
            self._changed.notify_all()

    def Check(self, request: pb.HealthCheckRequest) -> pb.HealthCheckResponse:
        """Return the status of a name. It takes no lock, so no watch delays it."""
        status = self._find(request.service)
        if status == pb.HealthCheckResponse.SERVICE_UNKNOWN:
            raise NotFound(f"there is no service or model {request.service!r}")
        return pb.HealthCheckResponse(status=status)

    def List(self, _: object) -> Message:
        """Return the status of every name. grpcio-health-checking 1.81 lacks this method, 1.85 has it."""
        status = {name: pb.HealthCheckResponse(status=self._find(name)) for name in self._serving}
        return cast(Message, pb.HealthListResponse(statuses=status))  # type: ignore[attr-defined, unused-ignore]

    def watch(self, call: Call, requests: Iterator[bytes]) -> Iterator[bytes]:
        """Yield the status of a name, now and at each change, until the server ends."""
        name = parse_message(pb.HealthCheckRequest.FromString, next(requests, b"")).service
        sent = None
        while call.is_active():
            with self._changed:
                status = self._find(name)
                if status == sent:
                    if self._closed:
                        raise Unavailable("the server is shutting down")
                    self._changed.wait(POLL_SECONDS)
                    continue
            yield pb.HealthCheckResponse(status=status).SerializeToString()
            sent = status

    def _find(self, name: str) -> int:
        status = pb.HealthCheckResponse
        serving = self._serving.get(name)
        if serving is None:
            return status.SERVICE_UNKNOWN
        return status.SERVING if serving else status.NOT_SERVING


def find_methods(context: ServerContext) -> Methods:
    """Return the methods of the service, by path."""
    methods = reply_methods(pb.DESCRIPTOR, context.health, context.control, skip=("Watch",), probes=("Check",))
    return methods | {f"/{SERVICES[0]}/Watch": Streaming(context.health.watch, separate=True)}
