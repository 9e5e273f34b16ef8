"""gRPC by grpcio: TLS, streams, and whatever the native transport cannot serve.

grpcio's server gives every call a thread of a pool, which waits for the message, and then for the batch. The changes of
threads cost several times what the call does: with an engine that costs nothing two cores took in 2,600 calls a second
so, and 4,400 without. So here a call has no thread: gRPC's own takes the request in, and whoever computed its batch
answers. grpcio has the place for it, `experimental_thread_pool`, but no public way to answer from elsewhere: `_Polled`
uses what grpcio keeps to itself. With a release of grpcio that is later than those that were tested, that lacks any of
it, or that answers one call at the start otherwise, calls have a thread each, as usual.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import grpc

from resnet import BadInput
from serving.config import Limits
from serving.errors import ServingError, Trailers, Unsupported, to_trailers
from serving.protocols.calls import report
from serving.transports.auth import Tokens
from serving.transports.call import APART, Call, Streaming, Unary
from serving.transports.dispatcher import Dispatcher
from serving.transports.tls import ServerTls

try:
    from grpc import _server
    from grpc._cython import cygrpc  # type: ignore[attr-defined]
except ImportError:  # of a release that has neither
    _server = cygrpc = None  # type: ignore[assignment]

NEEDED = ("_Context", "_RECEIVE_MESSAGE_TOKEN", "_receive_message", "_status")
TESTED = 1, 85  # the latest release that was seen to have it
SPARE_THREADS = 8  # beyond those of calls that count against a limit, for those that say how the server is
PATIENCE_SECONDS = 5.0  # for the one call at the start
CODES = {code.value[0]: code for code in grpc.StatusCode}

log = logging.getLogger(__name__)


class GrpcioTransport:
    """A server of grpcio, from `start` to `stop`."""

    def __init__(self, door: Dispatcher, polled: bool | None = None) -> None:
        """Serve the methods of `door`.

        Args:
            door: What calls pass.
            polled: Whether to do without a thread for each call; None is where that works.
        """
        self.door = door
        limits = door.limits
        self._server = grpc.server(
            ThreadPoolExecutor(limits.max_calls + APART + SPARE_THREADS, thread_name_prefix="call"),
            options=[("grpc.so_reuseport", 0), ("grpc.max_send_message_length", -1), *limits.to_options()],
        )
        services: dict[str, dict[str, Any]] = {}
        polled = works() if polled is None else polled
        for path, method in door.methods.items():
            _, service, name = path.split("/")
            services.setdefault(service, {})[name] = _handle(door, path, method, polled)
        for service, handlers in services.items():
            self._server.add_registered_method_handlers(service, handlers)

    def listen(self, address: str, tls: ServerTls | None = None) -> int:
        """Listen on HOST:PORT or unix:PATH; return the port.

        Raises:
            BadInput: It cannot be had, or a file of `tls` cannot be read or used.
        """
        try:
            return (
                self._server.add_secure_port(address, tls.to_credentials())
                if tls
                else self._server.add_insecure_port(address)
            )
        except RuntimeError:
            raise cannot_listen(address) from None

    def start(self) -> None:
        """Take calls in."""
        self._server.start()

    def stop(self, grace_seconds: float) -> None:
        """Close; calls that are under way have so long."""
        self._server.stop(grace_seconds).wait()


def cannot_listen(address: str) -> BadInput:
    """Return what to say when an address cannot be had."""
    return BadInput(
        f"{address} cannot be listened on: is the port in use, or the host none of this machine? "
        "Choose others with --port and --host"
    )


@functools.cache
def works() -> bool:
    """Say whether calls can be answered without a thread each: there is what is needed, and one call comes back."""
    version = tuple(map(int, grpc.__version__.split(".")[:2]))
    if version > TESTED or not all(hasattr(_server, name) for name in NEEDED):
        log.warning("calls have a thread each, which is slower: grpcio %s was not tried otherwise", grpc.__version__)
        return False
    path = "/resnet.Self/Test"
    door = Dispatcher({path: Unary(lambda call: call.respond(call.payload))}, Limits(), Tokens("localhost", None, None))
    transport = GrpcioTransport(door, polled=True)
    try:
        port = transport.listen("127.0.0.1:0")
        transport.start()
        with grpc.insecure_channel(f"127.0.0.1:{port}", [("grpc.enable_http_proxy", 0)]) as channel:
            method: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(path)
            return method(b"works", timeout=PATIENCE_SECONDS) == b"works"
    except (BadInput, grpc.RpcError) as error:
        log.warning("calls have a thread each, which is slower: otherwise this grpcio fails (%s)", error)
        return False
    finally:
        transport.stop(0)


def _handle(door: Dispatcher, path: str, method: Unary | Streaming, polled: bool) -> Any:
    """Return what grpcio takes as a method."""
    if isinstance(method, Streaming):
        return grpc.stream_stream_rpc_method_handler(functools.partial(_converse, door, path, method))
    return grpc.unary_unary_rpc_method_handler(_Behavior(door, path, method, polled))


class _ContextCall(Call):
    """A call that knows of its caller by a context of grpcio's; as it is a stream, whose answers are what it yields."""

    def __init__(self, path: str, payload: bytes, context: Any) -> None:
        super().__init__(path, payload, context.invocation_metadata() or (), context.time_remaining())
        self.context = context

    def is_wanted(self) -> bool:
        """Say whether the caller still waits."""
        return bool(self.context.is_active())

    @property
    def peer(self) -> str:
        """Address of the caller."""
        return str(self.context.peer())

    def _send(self, response: bytes, trailers: Trailers) -> None:
        raise NotImplementedError

    def _refuse(self, error: ServingError) -> None:
        raise NotImplementedError


def _converse(
    door: Dispatcher, path: str, method: Streaming, requests: Iterator[bytes], context: grpc.ServicerContext
) -> Iterator[bytes]:
    """Answer a stream, on a thread of its own."""
    call = _ContextCall(path, b"", context)
    try:
        yield from door.converse(call, method, _until_gone(requests))
    except Exception as error:
        refusal = error if isinstance(error, ServingError) and error.request_id else report(call, error)
        _abort(context, refusal)


def _until_gone(requests: Iterator[bytes]) -> Iterator[bytes]:
    with suppress(grpc.RpcError):  # the client cancelled, or is gone
        yield from requests


def _abort(context: grpc.ServicerContext, error: ServingError) -> None:
    context.set_trailing_metadata(to_trailers(error))
    context.abort(CODES[error.status.code], str(error))


class _Behavior:
    """What grpcio calls on a thread for each call; with `experimental_thread_pool`, what it asks in place of one."""

    def __init__(self, door: Dispatcher, path: str, method: Unary, polled: bool) -> None:
        self.door, self.path, self.method = door, path, method
        if polled:
            self.experimental_thread_pool = _Polled()

    def __call__(self, payload: bytes, context: grpc.ServicerContext) -> bytes | None:
        """Answer a call, and wait for it."""
        call = _ThreadCall(self.path, payload, context)
        self.door.answer(call, self.method)
        return call.wait()


class _ThreadCall(_ContextCall):
    """A call for whose answer a thread waits."""

    def __init__(self, path: str, payload: bytes, context: Any) -> None:
        super().__init__(path, payload, context)
        self._answered = threading.Event()
        self._answer: tuple[bytes, Trailers] | ServingError = b"", ()

    def wait(self) -> bytes | None:
        """Return the response, or end the call with the error."""
        self._answered.wait()
        if isinstance(self._answer, ServingError):
            _abort(self.context, self._answer)
            return None
        response, trailers = self._answer
        self.context.set_trailing_metadata(trailers)
        return response

    def _send(self, response: bytes, trailers: Trailers) -> None:
        self._answer = response, trailers
        self._answered.set()

    def _refuse(self, error: ServingError) -> None:
        self._answer = error
        self._answered.set()


class _Polled(ThreadPoolExecutor):
    """Takes the place of the threads that would answer calls."""

    def __init__(self) -> None:
        super().__init__(SPARE_THREADS, thread_name_prefix="call")

    def submit(self, run: Any, respond: Any, event: Any, state: Any, behavior: Any, *rest: Any) -> Any:  # type: ignore[override]
        """Take a call in; on a thread, where that fails.

        Args:
            run: Would run the next in the call's context.
            respond: Would wait for the request, and answer it.
            event: The call, as it came.
            state: What gRPC knows of it; locked.
            behavior: What answers it.
            rest: What would wait for the request; what parses it; what serializes the response.

        Returns:
            What gRPC treats as a future, to count the calls under way.
        """
        try:
            call = _PolledCall(behavior.path, event, state)
            take = _server._receive_message(state, event.call, None)

            def receive(received: Any) -> Any:
                result = take(received)
                try:
                    call.take(state.request, behavior)
                except Exception as error:  # it would end gRPC's own thread, and with it every call
                    call.fail(report(call, error))
                state.request = None
                return result

            event.call.start_server_batch((cygrpc.ReceiveMessageOperation(0),), receive)
            state.due.add(_server._RECEIVE_MESSAGE_TOKEN)
        except Exception:
            log.exception("a call has a thread of its own")
            return super().submit(run, respond, event, state, behavior, *rest)
        return call


class _PolledCall(_ContextCall):
    """A call that no thread waits for."""

    def __init__(self, path: str, event: Any, state: Any) -> None:
        super().__init__(path, b"", _server._Context(event, state, None))
        self._event, self._state = event, state
        self._over: Any = None

    def add_done_callback(self, over: Any) -> None:
        """Have `over` called when the call is over; gRPC does it once, before the request can be there."""
        self._over = over

    def take(self, payload: bytes | None, behavior: _Behavior) -> None:
        """Have the call answered; its payload is None if its client went away, or sent none."""
        if payload is None:
            self.fail(Unsupported("a call of this method has exactly one request"))
        else:
            self.payload = payload
            behavior.door.answer(self, behavior.method)

    def _send(self, response: bytes, trailers: Trailers) -> None:
        self.context.set_trailing_metadata(trailers)
        self._end(response)

    def _refuse(self, error: ServingError) -> None:
        self.context.set_trailing_metadata(to_trailers(error))
        self.context.set_code(CODES[error.status.code])
        self.context.set_details(str(error))
        self._end(None)

    def _end(self, response: bytes | None) -> None:
        """Send the response, if there is one, and the status; both go nowhere if the client is gone."""
        try:
            _server._status(self._event, self._state, response)
        finally:
            self._over(self)
