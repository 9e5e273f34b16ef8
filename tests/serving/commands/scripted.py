"""A real gRPC server whose `resnet.v1.Admin` plays a script."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf.message import Message

from protos import admin_pb2 as pb
from protos.admin_pb2_grpc import AdminServicer, add_AdminServicer_to_server
from serving.errors import ServingError
from serving.transports.grpcio import CODES

AdminReply = pb.GetStatusResponse | ServingError | Callable[[], pb.GetStatusResponse]


class ScriptedAdmin(AdminServicer):
    """Gives the replies of a script, one for each GetStatus; the last one stays.

    Attributes:
        calls: Each request, with the token of its call.
        refusal: Error of every other method; None answers.
    """

    def __init__(self, replies: Sequence[AdminReply], refusal: ServingError | None) -> None:
        self._replies, self.refusal = list(replies), refusal
        self.calls: list[tuple[str | None, Message]] = []

    def GetStatus(self, request: pb.GetStatusRequest, context: grpc.ServicerContext) -> pb.GetStatusResponse:
        """Answer as the script says."""
        self._record(request, context)
        reply = self._replies.pop(0) if len(self._replies) > 1 else self._replies[0]
        if isinstance(reply, ServingError):
            context.abort(CODES[reply.status.code], str(reply))
        return reply() if callable(reply) else reply

    def SetShadow(self, request: pb.SetShadowRequest, context: grpc.ServicerContext) -> pb.SetShadowResponse:
        """Answer, unless all is refused."""
        self._obey(request, context)
        return pb.SetShadowResponse()

    def StartRollout(self, request: pb.StartRolloutRequest, context: grpc.ServicerContext) -> pb.StartRolloutResponse:
        """Answer, unless all is refused."""
        self._obey(request, context)
        return pb.StartRolloutResponse()

    def StopRollout(self, request: pb.StopRolloutRequest, context: grpc.ServicerContext) -> pb.StopRolloutResponse:
        """Answer, unless all is refused."""
        self._obey(request, context)
        return pb.StopRolloutResponse()

    def _obey(self, request: Message, context: grpc.ServicerContext) -> None:
        self._record(request, context)
        if self.refusal:
            context.abort(CODES[self.refusal.status.code], str(self.refusal))

    def _record(self, request: Message, context: grpc.ServicerContext) -> None:
        metadata: dict[str, Any] = dict(context.invocation_metadata())
        self.calls.append((metadata.get("authorization"), request))


@contextmanager
def play(
    *replies: AdminReply, refusal: ServingError | None = None, address: str = "127.0.0.1:0"
) -> Iterator[tuple[str, ScriptedAdmin]]:
    """Serve a script, by default on a free port."""
    server = grpc.server(ThreadPoolExecutor(4))
    script = ScriptedAdmin(replies, refusal)
    add_AdminServicer_to_server(script, server)
    port = server.add_insecure_port(address)
    server.start()
    try:
        yield address if address.startswith("unix:") else f"127.0.0.1:{port}", script
    finally:
        server.stop(0).wait()


class FakeClock:
    """Stands for the module `time` in a command: a pause ends at once, and the user presses Ctrl-C in the last one.

    Attributes:
        pauses: Length of each pause so far, in seconds.
    """

    def __init__(self) -> None:
        self.pauses: list[float] = []
        self._left, self._now = math.inf, 1000.0

    def allow(self, pauses: int) -> None:
        """Press Ctrl-C after so many more pauses."""
        self._left = pauses

    def monotonic(self) -> float:
        """Return the time in seconds."""
        return self._now

    def sleep(self, seconds: float) -> None:
        """Pass the time."""
        self.pauses.append(seconds)
        self._now += seconds
        self._left -= 1
        if not self._left:
            raise KeyboardInterrupt
