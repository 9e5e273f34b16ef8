"""gRPC outside the interpreter's lock: `pygrpc-native` speaks HTTP/2 in Rust, and hands calls over in batches.

grpcio spends about 0.3 ms of a core on a call, most of it under the lock, so one process answers 3,000 to 5,000 calls a
second. Here one thread receives calls in batches and enqueues their images; the thread that computed a batch answers.
Streams and everything else pass through to a grpcio server behind it, on a Unix socket in a private folder.

It lacks TLS, a limit on connections and their age, and a limit on the size of a message before it is read: it is for
trusted callers.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from contextlib import suppress
from typing import Any

from resnet import BadInput
from serving.errors import ServingError, Trailers, to_trailers
from serving.threads import start_vital
from serving.transports.address import cannot_listen
from serving.transports.call import Call, Metadata, Unary
from serving.transports.dispatcher import Dispatcher
from serving.transports.grpcio import GrpcioTransport
from serving.transports.tls import ServerTls
from serving.transports.unix import MAX_PATH

with suppress(ImportError):  # `choice.find_problem` reports it
    import pygrpc_native

IO_THREADS = 2  # of the library; with 8 on 16 cores calls took longer, because each wakes the interpreter
# Calls, and bytes of calls, that are received at a time: while they are copied, no other thread runs.
BATCH, BATCH_BYTES = 64, 2**19
MAX_BACKLOG = 4096  # calls that are received before the first of them is dispatched
# Refusing calls one by one takes the cores from the engine: at ten times its capacity, a server that paused after so
# many refusals answered 90 % of the capacity, and 73 % without pauses.
MANY_REFUSALS, PAUSE_SECONDS = 16, 0.005
FLUSH_SECONDS = 0.3  # for responses to leave: the library closes connections without flushing them
RESERVED = "grpc-"  # prefix of gRPC's own trailers, which the library refuses to send

log = logging.getLogger(__name__)


class NativeTransport:
    """A server of `pygrpc-native`, from `start` to `stop`, with one of grpcio behind it."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        """Serve the methods of `dispatcher`."""
        self.dispatcher = dispatcher
        self._methods = [(path, method) for path, method in dispatcher.methods.items() if isinstance(method, Unary)]
        self._calls: dict[int, _NativeCall] = {}
        self._fallback = GrpcioTransport(dispatcher, polled=False)  # for streams, which have threads anyway

    def listen(self, address: str, tls: ServerTls | None = None) -> int:
        """Listen on HOST:PORT or unix:PATH, and return the port.

        Raises:
            BadInput: The address cannot be bound.
        """
        assert tls is None, "the native transport has no TLS"
        try:
            self._folder = tempfile.TemporaryDirectory(prefix="resnet-", ignore_cleanup_errors=True)
            socket = f"{self._folder.name}/grpc"
            if len(os.fsencode(socket)) > MAX_PATH:
                self._folder.cleanup()
                raise OSError(f"its path would be longer than the {MAX_PATH} bytes that a socket's may have")
            self._fallback.listen(f"unix:{socket}")
        except (OSError, BadInput) as error:
            raise BadInput(
                f"--transport native needs a Unix socket in a temporary folder, which cannot be made ({error}); "
                "set TMPDIR to a short path that can be written"
            ) from None
        limits = dict(self.dispatcher.limits.to_options())
        try:
            self._front = pygrpc_native.NativeGrpcFront(
                address,
                [(path, False) for path, _ in self._methods],
                io_threads=IO_THREADS,
                call_details=True,
                keepalive_time_ms=limits["grpc.keepalive_time_ms"],
                keepalive_timeout_ms=limits["grpc.keepalive_timeout_ms"],
                max_concurrent_streams=limits["grpc.max_concurrent_streams"],
                max_metadata_size=limits["grpc.max_metadata_size"],
            )
            self._front.set_fallback(socket)
        except (OSError, ValueError):
            self._folder.cleanup()
            raise cannot_listen(address) from None
        return int(self._front.bound_port)

    def start(self) -> None:
        """Receive calls."""
        self._fallback.start()
        self._front.start()
        start_vital(self._receive, "receive")

    def stop(self, grace_seconds: float) -> None:
        """Close; streams have `grace_seconds` to finish, unary calls without an answer fail."""
        end = time.monotonic() + min(grace_seconds, FLUSH_SECONDS)
        self._fallback.stop(grace_seconds)
        time.sleep(max(0.0, end - time.monotonic()))
        self._front.close()
        self._folder.cleanup()

    def _receive(self) -> None:
        """Receive calls until the server closes; after many refusals, pause and take the backlog at once."""
        size, behind = BATCH, False
        while (events := self._front.recv_batch_details(size)) is not None:
            if behind:
                events = self._catch_up(events)
            refused = 0
            for kind, number, which, message, _, details in events:
                if kind == pygrpc_native.EVENT_CALL:
                    path, method = self._methods[which]
                    payload = message or b""
                    call = self._calls[number] = _NativeCall(self, number, path, payload, details)
                    self.dispatcher.dispatch(call, method)
                    refused += call.refused
                    size = max(1, min(BATCH, BATCH_BYTES // (1 + len(payload))))
                elif gone := self._calls.pop(number, None):
                    gone.cancelled = True
                    gone.leave()
            behind = refused > max(MANY_REFUSALS, len(events) // 2)
            if behind:
                time.sleep(PAUSE_SECONDS)  # the cores are for the requests that were admitted

    def _catch_up(self, events: list[Any]) -> list[Any]:
        """Return the whole backlog, the latest call first, without the calls that were cancelled.

        There is a backlog when calls arrive faster than they can be dispatched. In order of arrival every call would be
        dispatched late, and miss its deadline, while the engine is idle.
        """
        while len(events) < MAX_BACKLOG and (more := self._front.recv_batch_details(BATCH, 0)):
            events += more
        gone = {number for kind, number, *_ in events if kind != pygrpc_native.EVENT_CALL}
        events.reverse()
        return [event for event in events if event[0] != pygrpc_native.EVENT_CALL or event[1] not in gone]

    def respond(self, number: int, response: bytes, trailers: Trailers) -> None:
        """Send the response to a call, unless the caller is gone."""
        self._calls.pop(number, None)
        self._front.respond(number, response, None, trailers)

    def fail(self, number: int, error: ServingError) -> None:
        """Send an error to a call."""
        self._calls.pop(number, None)
        trailers = [(key, value) for key, value in to_trailers(error) if not key.startswith(RESERVED)]
        self._front.fail(number, error.status.code, str(error), trailers)


class _NativeCall(Call):
    """A call of the library."""

    def __init__(self, transport: NativeTransport, number: int, path: str, payload: bytes, details: Any) -> None:
        metadata: Metadata
        metadata, self._peer, remaining = details
        super().__init__(path, payload, metadata, remaining)
        self._transport, self._number = transport, number

    @property
    def peer(self) -> str:
        """Address of the caller."""
        return str(self._peer)

    def _send(self, response: bytes, trailers: Trailers) -> None:
        self._transport.respond(self._number, response, trailers)

    def _send_error(self, error: ServingError) -> None:
        self._transport.fail(self._number, error)
