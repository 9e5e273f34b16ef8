"""gRPC outside the interpreter's lock: `pygrpc-native` speaks HTTP/2, in Rust, and hands calls over in batches.

grpcio spends some 0.3 ms of a core on a call, most of it under the lock, so that one process takes in 3,000 to 5,000 a
second. Here a thread takes what has come and leaves it with the batcher; whoever computed a batch answers. Streams and
all else pass through to grpcio's server on a Unix socket behind it, in a folder that is nobody else's.

What it lacks: TLS, a limit on connections and their age, and one on the size of a message before it is read: it is for
callers that are trusted.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
from contextlib import suppress
from typing import Any

from resnet import BadInput
from serving.errors import ServingError, Trailers, to_trailers
from serving.transports.call import Call, Metadata, Unary
from serving.transports.dispatcher import Dispatcher
from serving.transports.grpcio import GrpcioTransport, cannot_listen
from serving.transports.tls import ServerTls
from serving.transports.unix import LONGEST

with suppress(ImportError):  # `choice.find_problem` says why
    import pygrpc_native

IO_THREADS = 2  # of the library; with 8 on 16 cores calls took longer, for each of them wakes the interpreter
# Calls that are taken over at a time, and about how many bytes: while they are copied, no other thread can go on.
BATCH, BATCH_BYTES = 64, 2**19
MOST = 4096  # calls that are taken over, in so many batches, before the first of them is looked at
# Refusing one by one takes the cores from the engine: at ten times what the server bears, with a pause after as many
# refusals it answered 90 % of that, without 73 %.
MANY, PAUSE_SECONDS = 16, 0.005
FLUSH_SECONDS = 0.3  # for what was answered to leave: the library closes connections without waiting for it
RESERVED = "grpc-"  # trailers of gRPC's own, which the library refuses to send

log = logging.getLogger(__name__)


class NativeTransport:
    """A server of `pygrpc-native`, from `start` to `stop`, with one of grpcio behind it."""

    def __init__(self, door: Dispatcher) -> None:
        """Serve the methods of `door`."""
        self.door = door
        self._methods = [(path, method) for path, method in door.methods.items() if isinstance(method, Unary)]
        self._calls: dict[int, _NativeCall] = {}
        self._fallback = GrpcioTransport(door, polled=False)  # for streams, which have a thread each

    def listen(self, address: str, tls: ServerTls | None = None) -> int:
        """Listen on HOST:PORT or unix:PATH; return the port.

        Raises:
            BadInput: It cannot be had.
        """
        assert tls is None, "the native transport has no TLS"
        try:
            self._folder = tempfile.TemporaryDirectory(prefix="resnet-", ignore_cleanup_errors=True)
            socket = f"{self._folder.name}/grpc"
            if len(os.fsencode(socket)) > LONGEST:
                self._folder.cleanup()
                raise OSError(f"its path would have more than the {LONGEST} bytes that a socket's may have")
            self._fallback.listen(f"unix:{socket}")
        except (OSError, BadInput) as error:
            raise BadInput(
                f"--transport native needs a Unix socket in a temporary folder, which cannot be had ({error}); "
                "set TMPDIR to a short path that can be written"
            ) from None
        limits = self.door.limits
        try:
            self._front = pygrpc_native.NativeGrpcFront(
                address,
                [(path, False) for path, _ in self._methods],
                io_threads=IO_THREADS,
                call_details=True,
                keepalive_time_ms=int(limits.keepalive_seconds * 1000),
                keepalive_timeout_ms=int(limits.keepalive_timeout_seconds * 1000),
                max_concurrent_streams=limits.max_streams,
                max_metadata_size=limits.max_metadata_bytes,
            )
            self._front.set_fallback(socket)
        except (OSError, ValueError):
            self._folder.cleanup()
            raise cannot_listen(address) from None
        return int(self._front.bound_port)

    def start(self) -> None:
        """Take calls in."""
        self._fallback.start()
        self._front.start()
        threading.Thread(target=self._receive, name="receive", daemon=True).start()

    def stop(self, grace_seconds: float) -> None:
        """Close; calls to the server behind have so long, all others fail that are not answered."""
        end = time.monotonic() + min(grace_seconds, FLUSH_SECONDS)
        self._fallback.stop(grace_seconds)
        time.sleep(max(0.0, end - time.monotonic()))
        self._front.close()
        self._folder.cleanup()

    def _receive(self) -> None:
        """Take calls in until the end; after many refusals, those that follow wait a little, and come together."""
        most, behind = BATCH, False
        while (events := self._front.recv_batch_details(most)) is not None:
            if behind:
                events = self._catch_up(events)
            refused = 0
            for kind, number, which, message, _, details in events:
                if kind == pygrpc_native.EVENT_CALL:
                    path, method = self._methods[which]
                    payload = message or b""
                    call = self._calls[number] = _NativeCall(self, number, path, payload, details)
                    self.door.answer(call, method)
                    refused += call.refused
                    most = max(1, min(BATCH, BATCH_BYTES // (1 + len(payload))))
                elif gone := self._calls.pop(number, None):
                    gone.cancelled = True
                    gone.forget()
            behind = refused > max(MANY, len(events) // 2)
            if behind:
                time.sleep(PAUSE_SECONDS)  # and leave the cores to those that were let in

    def _catch_up(self, events: list[Any]) -> list[Any]:
        """Return all that waits, the latest first, and without those who have left meanwhile.

        More than a batch waits where more comes than can be looked at. In the order in which they came all would be
        looked at late, and those with a deadline be too late, one after the other, while the engine has nothing to do.
        """
        while len(events) < MOST and (more := self._front.recv_batch_details(BATCH, 0)):
            events += more
        gone = {number for kind, number, *_ in events if kind != pygrpc_native.EVENT_CALL}
        events.reverse()
        return [event for event in events if event[0] != pygrpc_native.EVENT_CALL or event[1] not in gone]

    def respond(self, number: int, response: bytes, trailers: Trailers) -> None:
        """Send the response to a call; it goes nowhere if the caller is gone."""
        self._calls.pop(number, None)
        self._front.respond(number, response, None, trailers)

    def fail(self, number: int, error: ServingError) -> None:
        """Send an error in place of a response."""
        self._calls.pop(number, None)
        trailers = [(key, value) for key, value in to_trailers(error) if not key.startswith(RESERVED)]
        self._front.fail(number, error.status.code, str(error), trailers)


class _NativeCall(Call):
    """A call under way."""

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

    def _refuse(self, error: ServingError) -> None:
        self._transport.fail(self._number, error)
