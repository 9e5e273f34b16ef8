"""`grpc.health.v1.Health`: whether the server, its services and its models take requests."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from grpc_health.v1 import health_pb2 as pb

from serving.errors import NotFound, Unavailable
from serving.protocols.calls import parse_message
from serving.transports.call import Call

POLL_SECONDS = 1.0  # after which a watch looks whether its client is still there


class Health:
    """What is served, by name; threads may share it."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self._serving: dict[str, bool] = {}
        self._changed = threading.Condition()
        self._closed = False

    def set(self, name: str, serving: bool) -> None:
        """Note whether something is served: the server as a whole, "", or a service or a model."""
        with self._changed:
            self._serving[name] = serving and not self._closed
            self._changed.notify_all()

    def close(self) -> None:
        """Note that nothing is served any longer, whatever is said later."""
        with self._changed:
            self._closed = True
            self._serving = dict.fromkeys(self._serving, False)
            self._changed.notify_all()

    def Check(self, request: pb.HealthCheckRequest) -> pb.HealthCheckResponse:
        """Say whether something is served; it takes no lock, so that no watch keeps it waiting."""
        status = self._find(request.service)
        if status == pb.HealthCheckResponse.SERVICE_UNKNOWN:
            raise NotFound(f"there is no service or model {request.service!r}")
        return pb.HealthCheckResponse(status=status)

    def watch(self, call: Call, messages: Iterator[bytes]) -> Iterator[bytes]:
        """Say whether something is served, now and whenever that changes, until the server ends."""
        name = parse_message(pb.HealthCheckRequest.FromString, next(messages, b"")).service
        told = None
        while call.is_wanted():
            with self._changed:
                status = self._find(name)
                if status == told:
                    if self._closed:
                        raise Unavailable("the server is shutting down")
                    self._changed.wait(POLL_SECONDS)
                    continue
            yield pb.HealthCheckResponse(status=status).SerializeToString()
            told = status

    def _find(self, name: str) -> int:
        status = pb.HealthCheckResponse
        serving = self._serving.get(name)
        if serving is None:
            return status.SERVICE_UNKNOWN
        return status.SERVING if serving else status.NOT_SERVING
