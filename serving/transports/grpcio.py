"""gRPC by grpcio: TLS, streams, and everything that the native transport cannot serve.

grpcio's server gives every call a thread of a pool, which waits for the request and then for the batch. The thread
switches cost several times as much as the call: with an engine that does nothing, two cores answered 2,600 calls a
second that way, and 4,400 without. So here a unary call has no thread of its own: gRPC's polling thread receives the
request, and the thread that computed the batch answers. grpcio allows the first by `experimental_thread_pool`, but
has no public way to answer from another thread: `_PollingPool` uses private parts of grpcio. With a release later than
the tested ones, without these parts, or if one call at the start fails, every call has a thread, as usual.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import grpc

from resnet import BadInput
from serving.config import Limits
from serving.errors import ServingError, Trailers, Unsupported, to_trailers
from serving.transports import unix
from serving.transports.address import cannot_listen
from serving.transports.auth import Tokens
from serving.transports.call import MAX_SEPARATE, Call, Streaming, Unary, report
from serving.transports.connections import disconnect
from serving.transports.dispatcher import Dispatcher
from serving.transports.tls import ServerTls

try:
    from grpc import _server
    from grpc._cython import cygrpc  # type: ignore[attr-defined]
except ImportError:  # a release without these modules
    _server = cygrpc = None  # type: ignore[assignment]

NEEDED = ("_Context", "_RECEIVE_MESSAGE_TOKEN", "_receive_message", "_status")
TESTED = 1, 85  # the latest release that was tested
PROBE_THREADS = 8  # for health checks, which count against no limit
TEST_SECONDS = 5.0  # for the one call at the start
POLL_SECONDS = 0.005  # between looks at whether all responses are sent
STOP_SECONDS = 5.0  # for gRPC to release what no connection needs any more
CODES = {code.value[0]: code for code in grpc.StatusCode}

log = logging.getLogger(__name__)


class GrpcioTransport:
    """A server of grpcio, from `start` to `stop`."""

    def __init__(self, dispatcher: Dispatcher, polled: bool | None = None) -> None:
        """Serve the methods of `dispatcher`.

        Args:
            dispatcher: Passes calls on to their methods.
            polled: Serve unary calls without a thread each; None does so where it works.
        """
        self.dispatcher = dispatcher
        limits = dispatcher.limits
        self._server = grpc.server(
            _CallPool(limits.max_calls + MAX_SEPARATE + PROBE_THREADS, thread_name_prefix="call"),
            options=[("grpc.so_reuseport", 0), ("grpc.max_send_message_length", -1), *limits.to_options()],
        )
        self._address = ""
        services: dict[str, dict[str, Any]] = {}
        polled = works() if polled is None else polled
        for path, method in dispatcher.methods.items():
            _, service, name = path.split("/")
            services.setdefault(service, {})[name] = _handle(dispatcher, path, method, polled)
        for service, handlers in services.items():
            self._server.add_registered_method_handlers(service, handlers)

    def listen(self, address: str, tls: ServerTls | None = None) -> int:
        """Listen on HOST:PORT or unix:PATH, and return the port.

        Raises:
            BadInput: The address cannot be bound, or a file of `tls` cannot be read or used.
        """
        try:
            port = (
                self._server.add_secure_port(address, tls.to_credentials())
                if tls
                else self._server.add_insecure_port(address)
            )
        except RuntimeError:
            raise cannot_listen(address) from None
        self._address = address if address.startswith(unix.PREFIX) else f":{port}"
        return port

    def start(self) -> None:
        """Receive calls."""
        self._server.start()

    def stop(self, grace_seconds: float) -> None:
        """Close; active calls have `grace_seconds` to finish.

        The connections end first: gRPC by itself cancels the calls that it has received and not yet handed over, and
        clients repeat what was UNAVAILABLE, but not what was cancelled.
        """
        end = time.monotonic() + grace_seconds
        state = getattr(self._server, "_state", None)
        while getattr(state, "rpc_states", True) and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
        if self._address:
            disconnect(self._address, max(0.0, end - time.monotonic()))
        with suppress(RuntimeError):  # no thread can be started to wait for the calls
            # The event is set when every call has ended, which one whose thread is stuck never does.
            self._server.stop(0).wait(STOP_SECONDS)


@functools.cache
def works() -> bool:
    """Return whether this grpcio can serve calls without a thread each: a tested release that answers one call."""
    version = tuple(map(int, grpc.__version__.split(".")[:2]))
    if version > TESTED or not all(hasattr(_server, name) for name in NEEDED):
        log.warning("each call takes a thread, which is slower: polling is not tested with grpcio %s", grpc.__version__)
        return False
    path = "/resnet.Self/Test"
    dispatcher = Dispatcher(
        {path: Unary(lambda call: call.respond(call.payload))}, Limits(), Tokens("localhost", None, None)
    )
    transport = GrpcioTransport(dispatcher, polled=True)
    try:
        port = transport.listen("127.0.0.1:0")
        transport.start()
        with grpc.insecure_channel(f"127.0.0.1:{port}", [("grpc.enable_http_proxy", 0)]) as channel:
            method: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(path)
            return method(b"works", timeout=TEST_SECONDS) == b"works"
    except (BadInput, grpc.RpcError) as error:
        log.warning("each call takes a thread, which is slower: polling fails with this grpcio (%s)", error)
        return False
    finally:
        transport.stop(0)


def _handle(dispatcher: Dispatcher, path: str, method: Unary | Streaming, polled: bool) -> Any:
    """Return the handler of a method, as grpcio takes it."""
    if isinstance(method, Streaming):
        return grpc.stream_stream_rpc_method_handler(functools.partial(_stream, dispatcher, path, method))
    return grpc.unary_unary_rpc_method_handler(_Behavior(dispatcher, path, method, polled))


class _ContextCall(Call):
    """A call with a context of grpcio. Itself it is a streaming call, whose responses are yielded."""

    def __init__(self, path: str, payload: bytes, context: Any) -> None:
        super().__init__(path, payload, context.invocation_metadata() or (), context.time_remaining())
        self.context = context

    def is_active(self) -> bool:
        """Return whether the caller still waits."""
        return bool(self.context.is_active())

    @property
    def peer(self) -> str:
        """Address of the caller."""
        return str(self.context.peer())

    def _send(self, response: bytes, trailers: Trailers) -> None:
        raise NotImplementedError

    def _send_error(self, error: ServingError) -> None:
        raise NotImplementedError


def _stream(
    dispatcher: Dispatcher, path: str, method: Streaming, requests: Iterator[bytes], context: grpc.ServicerContext
) -> Iterator[bytes]:
    """Answer a streaming call, on a thread of its own."""
    call = _ContextCall(path, b"", context)
    try:
        yield from dispatcher.stream(call, method, _until_gone(requests))
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
    """The handler that grpcio runs for each unary call, on a thread or, if polled, in a `_PollingPool`."""

    def __init__(self, dispatcher: Dispatcher, path: str, method: Unary, polled: bool) -> None:
        self.dispatcher, self.path, self.method = dispatcher, path, method
        if polled:
            self.experimental_thread_pool = _PollingPool()

    def __call__(self, payload: bytes, context: grpc.ServicerContext) -> bytes | None:
        """Answer a call, and wait for its response."""
        call = _ThreadCall(self.path, payload, context)
        self.dispatcher.dispatch(call, self.method)
        return call.wait()


class _ThreadCall(_ContextCall):
    """A call whose thread waits for the answer."""

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

    def _send_error(self, error: ServingError) -> None:
        self._answer = error
        self._answered.set()


class _CallPool(ThreadPoolExecutor):
    """Threads for calls, which start when they are needed."""

    def submit(self, run: Any, respond: Any, event: Any, state: Any, *rest: Any) -> Any:  # type: ignore[override]
        """Answer a call on a thread; without a thread, refuse it. This runs on gRPC's polling thread.

        Args:
            run: Runs the other arguments in the context of the call.
            respond: Answers the call.
            event: The incoming call.
            state: grpcio's state of it; locked.
            rest: Further arguments of `respond`.
        """
        try:
            return super().submit(run, respond, event, state, *rest)
        except RuntimeError:  # raised here, it would end gRPC's polling thread and every call
            log.exception("a call is refused: no thread can be started for it")
            with suppress(Exception):
                code, reason = cygrpc.StatusCode.resource_exhausted, b"the server cannot start a thread for this call"
                _server._abort(state, event.call, code, reason)
            return Future()  # which counts active calls, if there were a limit


class _PollingPool(_CallPool):
    """Receives calls on gRPC's polling thread, instead of a pool with a thread for each call."""

    def __init__(self) -> None:
        super().__init__(PROBE_THREADS, thread_name_prefix="call")

    def submit(self, run: Any, respond: Any, event: Any, state: Any, behavior: Any, *rest: Any) -> Any:  # type: ignore[override]
        """Receive a call; on a thread, if that fails.

        Args:
            run: Runs the next argument in the context of the call; unused.
            respond: Waits for the request and answers it; unused.
            event: The incoming call.
            state: grpcio's state of it; locked.
            behavior: Answers it.
            rest: The functions that wait for the request, parse it and serialize the response; unused.

        Returns:
            A future, as far as grpcio needs one to count active calls.
        """
        try:
            call = _PolledCall(behavior.path, event, state)
            deserialize = _server._receive_message(state, event.call, None)

            def receive(received: Any) -> Any:
                result = deserialize(received)
                try:
                    call.dispatch(state.request, behavior)
                except Exception as error:  # raised here, it would end gRPC's polling thread and every call
                    call.fail(report(call, error))
                state.request = None
                return result

            event.call.start_server_batch((cygrpc.ReceiveMessageOperation(0),), receive)
            state.due.add(_server._RECEIVE_MESSAGE_TOKEN)
        except Exception:
            log.exception("a call could not be polled, and takes a thread")
            return super().submit(run, respond, event, state, behavior, *rest)
        return call


class _PolledCall(_ContextCall):
    """A call without a thread."""

    def __init__(self, path: str, event: Any, state: Any) -> None:
        super().__init__(path, b"", _server._Context(event, state, None))
        self._event, self._state = event, state
        self._done: Any = None

    def add_done_callback(self, done: Any) -> None:
        """Set the callback for the end of the call; grpcio does so once, before the request can arrive."""
        self._done = done

    def dispatch(self, payload: bytes | None, behavior: _Behavior) -> None:
        """Have the call answered; `payload` is None if the client is gone, or sent no request."""
        if payload is None:
            self.fail(Unsupported("a call of this method has exactly one request"))
        else:
            self.payload = payload
            behavior.dispatcher.dispatch(self, behavior.method)

    def _send(self, response: bytes, trailers: Trailers) -> None:
        self.context.set_trailing_metadata(trailers)
        self._end(response)

    def _send_error(self, error: ServingError) -> None:
        self.context.set_trailing_metadata(to_trailers(error))
        self.context.set_code(CODES[error.status.code])
        self.context.set_details(str(error))
        self._end(None)

    def _end(self, response: bytes | None) -> None:
        """Send the response, if there is one, and the status, unless the client is gone."""
        try:
            _server._status(self._event, self._state, response)
        finally:
            self._done(self)
