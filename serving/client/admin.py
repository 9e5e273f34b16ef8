"""Client for operators of a server: its health, and by `resnet.v1.Admin` what it runs, and rollouts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

import grpc

from protos import admin_pb2 as pb
from protos.admin_pb2_grpc import AdminStub
from serving.client.access import ANYONE, CallerAccess
from serving.client.channel import HEALTH, from_rpc, to_options
from serving.errors import Unsupported

STATUS_SECONDS = 10.0
SERVING = b"\x08\x01"  # HealthCheckResponse(status=SERVING); the client does not depend on grpcio-health-checking
START_SECONDS = 900.0  # the server loads the version first, which may measure and prove it


class AdminClient:
    """A connection to one server. Its methods raise the errors of `serving.errors`, and retry nothing."""

    def __init__(self, server: str, access: CallerAccess = ANYONE) -> None:
        """Prepare a connection, which the first call opens.

        Args:
            server: HOST:PORT or unix:PATH.
            access: What the server asks of its callers; `is_serving` needs no token, `read_status` a caller's, and the
                other methods an administrator's.
        """
        self._channel = access.open_channel(server, to_options(server, tls=None))
        self._stub, self._metadata = AdminStub(self._channel), access.metadata

    def is_serving(self) -> bool:
        """Return whether the server takes requests, by its health service."""
        with _errors():
            check: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(HEALTH)
            return check(b"", timeout=STATUS_SECONDS) == SERVING

    def read_status(self, model: str = "") -> pb.GetStatusResponse:
        """Return what the server says of one model, or of all."""
        with _errors():
            request = pb.GetStatusRequest(model=model)
            return self._stub.GetStatus(request, timeout=STATUS_SECONDS, metadata=self._metadata)

    def start_rollout(self, model: str, version: int, settings: pb.RolloutSettings) -> None:
        """Start a rollout; return once the version is loaded."""
        with _errors():
            request = pb.StartRolloutRequest(model=model, version=version, settings=settings)
            self._stub.StartRollout(request, timeout=START_SECONDS, metadata=self._metadata)

    def stop_rollout(self, model: str) -> None:
        """Roll the running rollout of a model back."""
        with _errors():
            request = pb.StopRolloutRequest(model=model)
            self._stub.StopRollout(request, timeout=STATUS_SECONDS, metadata=self._metadata)

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def _errors() -> Iterator[None]:
    """Raise a failed call as the error that the server raised, or as the connection error."""
    try:
        yield
    except grpc.RpcError as error:
        failure = from_rpc(error)
        if isinstance(failure, Unsupported):
            raise Unsupported("it has no service resnet.v1.Admin; run a newer version of resnet there") from None
        raise failure from None
