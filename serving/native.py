"""gRPC outside the interpreter's lock: `pygrpc-native` speaks HTTP/2, in Rust, and hands calls over in batches.

grpcio spends some 0.3 ms of a core on a call, most of it under the lock, so that one process takes in 3,000 to 5,000 a
second. Here a thread takes what has come, parses it and leaves it with the batcher; whoever computed a batch answers.
Unary calls that compute are served like that. All others (streams, health, reflection, metadata) pass through to
grpcio's server on a Unix socket behind it, in a folder that is nobody else's.

What it lacks: TLS, traces, and a limit on the size of a message before it is read: it is for callers that are trusted.
"""

from __future__ import annotations

import logging
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import grpc
from google.protobuf.message import DecodeError

from resnet import BadInput
from serving.calls import UnaryCall, Work
from serving.cores import count_cores
from serving.errors import Trailers
from serving.guard import NO_MESSAGE, serialize
from serving.limits import Limits
from serving.security import TokenInterceptor

try:
    import pygrpc_native
except ImportError:  # there are no wheels for every platform
    pygrpc_native = None  # type: ignore[assignment]

SUPPORTED = pygrpc_native is not None
IO_THREADS = 2  # of the library; with 8 on 16 cores calls took longer, for each of them wakes the interpreter
# Calls that are taken over at a time, and about how many bytes: while they are copied, no other thread can go on.
BATCH, BATCH_BYTES = 64, 2**19
QUICK_BYTES = 2**20  # larger requests are taken in on other threads; see `serving.events`
RESERVED = "grpc-"  # trailers of gRPC's own, which the library refuses to send

log = logging.getLogger(__name__)


class Method(NamedTuple):
    """A unary method.

    Attributes:
        begin: Returns the work for a request and what has the methods of a context.
        unpacks: Says of a request whether it holds encoded images.
        parse: Makes a request of bytes; raises `DecodeError` if they are none.
    """

    begin: Callable[[Any, Any], Work[Any]]
    unpacks: Callable[[Any], bool]
    parse: Callable[[bytes], Any]


class NativeFront:
    """Takes calls in from when it is made until `close`.

    Attributes:
        port: Where it listens.
    """

    def __init__(
        self,
        host: str,
        port: int,
        methods: Mapping[str, Method],
        limits: Limits,
        tokens: TokenInterceptor | None,
        fallback: grpc.Server,
    ) -> None:
        """Listen.

        Args:
            host: Name or address of an interface.
            port: 0 takes a free one.
            methods: By path, as /service/method.
            limits: What to take on.
            tokens: Says who may call; None lets everybody.
            fallback: Serves all other methods; not yet started.

        Raises:
            BadInput: The library is not installed, or the port cannot be had.
        """
        if not SUPPORTED:
            raise BadInput("--transport native needs a package that is not there: pip install pygrpc-native")
        self._limits, self._tokens = limits, tokens
        self._methods = list(methods.items())
        self._open: dict[int, _NativeCall] = {}
        self._others = ThreadPoolExecutor(count_cores(), thread_name_prefix="intake")
        try:
            self._folder = tempfile.TemporaryDirectory(prefix="resnet-")
            socket = f"{self._folder.name}/grpc"
            fallback.add_insecure_port(f"unix:{socket}")
        except (OSError, RuntimeError) as error:
            raise BadInput(
                f"--transport native needs a Unix socket in a temporary folder, which cannot be had ({error}); "
                "set TMPDIR to a short path that can be written"
            ) from None
        try:
            self.front = pygrpc_native.NativeGrpcFront(
                f"{host}:{port}",
                [(path, False) for path in methods],
                io_threads=IO_THREADS,
                call_details=True,
                keepalive_time_ms=int(limits.keepalive_seconds * 1000),
                keepalive_timeout_ms=int(limits.keepalive_timeout_seconds * 1000),
                max_concurrent_streams=limits.max_streams,
                max_metadata_size=limits.max_metadata_bytes,
            )
            self.front.set_fallback(socket)
            self.front.start()
        except (OSError, ValueError) as error:
            raise BadInput(f"{host}:{port} cannot be listened on ({error}); choose another with --port") from None
        self.port = self.front.bound_port
        threading.Thread(target=self._receive, name="receive", daemon=True).start()

    def drain(self, seconds: float) -> None:
        """Wait until every call is answered, at most so long."""
        end = time.monotonic() + seconds
        while self._open and time.monotonic() < end:
            time.sleep(0.01)

    def close(self) -> None:
        """Close all connections; calls that are not answered fail."""
        self.front.close()
        self._others.shutdown(wait=False)
        self._folder.cleanup()

    def done(self, number: int) -> None:
        """Forget a call."""
        self._open.pop(number, None)

    def _receive(self) -> None:
        """Take calls in until the end."""
        most = BATCH
        while (events := self.front.recv_batch_details(most)) is not None:
            for kind, number, which, message, _, details in events:
                if kind == pygrpc_native.EVENT_CALL:
                    path, method = self._methods[which]
                    payload = message or b""
                    call = _NativeCall(self, number, path, method, details)
                    try:
                        self._take(call, payload)
                    except Exception as error:
                        self._refuse(call, error)
                    most = max(1, min(BATCH, BATCH_BYTES // (1 + len(payload))))
                elif gone := self._open.pop(number, None):
                    gone.context.active = False

    def _refuse(self, call: _NativeCall, error: Exception) -> None:
        """Answer with an error; raise nothing, which would end the only thread that takes calls in."""
        try:
            call.refuse(error)
        except Exception:
            log.exception("a call was lost")

    def _take(self, call: _NativeCall, payload: bytes) -> None:
        context = call.context
        refusal = self._tokens.judge(call.path, context.invocation_metadata(), context.peer()) if self._tokens else None
        if refusal:
            call.abort(*refusal)
        elif len(self._open) >= self._limits.max_calls:
            call.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"the server has {self._limits.max_calls} calls under way")
        elif len(payload) > self._limits.max_message_bytes:
            allowed = self._limits.max_message_bytes
            text = f"the request has {len(payload):,} bytes, more than the {allowed:,} allowed"
            call.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        elif len(payload) > QUICK_BYTES:
            self._open[call.number] = call
            self._others.submit(call.take, payload)
        else:
            self._open[call.number] = call
            call.take(payload, self._others)


class _Context:
    """What the servicers ask of a call."""

    __slots__ = ("_deadline", "_metadata", "_peer", "active")

    def __init__(self, details: Any) -> None:
        self._metadata, self._peer, remaining = details
        self._deadline = None if remaining is None else time.monotonic() + remaining
        self.active = True

    def time_remaining(self) -> float | None:
        """Return how long the caller still waits, in seconds; None is for ever."""
        return None if self._deadline is None else self._deadline - time.monotonic()

    def is_active(self) -> bool:
        """Say whether the caller still waits."""
        return self.active

    def invocation_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """Return what came with the request."""
        metadata: tuple[tuple[str, str | bytes], ...] = self._metadata
        return metadata

    def peer(self) -> str:
        """Return where the caller is."""
        return str(self._peer)


class _NativeCall(UnaryCall):
    """A call under way.

    Attributes:
        number: What the library calls it.
        path: Of its method.
        context: What is known of its caller.
    """

    def __init__(self, front: NativeFront, number: int, path: str, method: Method, details: Any) -> None:
        self.context = _Context(details)
        super().__init__(method.begin, path.rpartition(".")[2], self.context, serialize)
        self._front, self.number, self.path, self._unary = front, number, path, method

    def take(self, payload: bytes, others: ThreadPoolExecutor | None = None) -> None:
        """Parse the request and begin, on this thread or, to unpack encoded images, on one of `others`."""
        try:
            request = self._unary.parse(payload)
            if others and self._unary.unpacks(request):
                others.submit(self.begin, request)
            else:
                self.begin(request)
        except DecodeError:
            self.abort(grpc.StatusCode.INVALID_ARGUMENT, NO_MESSAGE)
        except Exception as error:
            self.refuse(error)

    def reply(self, response: bytes) -> None:
        """Send the response."""
        self._front.done(self.number)
        self._front.front.respond(self.number, response)

    def abort(self, code: grpc.StatusCode, details: str, trailers: Trailers = ()) -> None:
        """Send a status."""
        self._front.done(self.number)
        sent = [(key, value) for key, value in trailers if not key.startswith(RESERVED)]
        self._front.front.fail(self.number, code.value[0], details, sent)
