"""Unary calls that hold no thread: gRPC's own thread takes the request in, and whoever computed its batch answers.

grpcio's server gives every call a thread of a pool, which waits for the message, and then for the batch. The changes of
threads cost several times what the call does. `Events` is what a method names in place of that pool: it hears when the
message is there, and leaves what is to be computed with the batcher. The asyncio server lies between the two.

grpcio has the place for it, `experimental_thread_pool`, but no public way to answer from elsewhere: this module, and no
other, uses what grpcio keeps to itself. Where a release of grpcio lacks any of it, calls have a thread each, as usual.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import grpc
from grpc import _server
from grpc._cython import cygrpc  # type: ignore[attr-defined]

from serving.calls import UnaryCall, Work, answer, name_method, tells_failures
from serving.cores import count_cores
from serving.errors import Trailers
from serving.guard import MALFORMED, NO_MESSAGE

NEEDED = ("_Context", "_RECEIVE_MESSAGE_TOKEN", "_receive_message", "_serialized_request", "_status")
SUPPORTED = all(hasattr(_server, name) for name in NEEDED)
QUICK_BYTES = 2**20  # to check and round so many bytes of float32 takes about a millisecond

Begin = Callable[[Any, Any, grpc.ServicerContext], Work[Any]]


def computed(unpacks: Callable[[Any], bool]) -> Callable[[Begin], Callable[[Any, Any, grpc.ServicerContext], Any]]:
    """Decorate the method of a servicer that returns `Work`, to be the method that gRPC calls.

    Args:
        unpacks: Says of a request whether it holds encoded images: to unpack them takes too long for gRPC's own thread.
    """

    def decorate(begin: Begin) -> Callable[[Any, Any, grpc.ServicerContext], Any]:
        @tells_failures
        @functools.wraps(begin)
        def call(servicer: Any, request: Any, context: grpc.ServicerContext) -> Any:
            return answer(begin(servicer, request, context), context)

        call.__dict__.update(begin=begin, unpacks=unpacks)
        if SUPPORTED:
            call.__dict__.update(experimental_thread_pool=EVENTS)
        return call

    return decorate


class Events(ThreadPoolExecutor):
    """Takes the place of the threads that would answer calls; its own take in what is large or encoded."""

    def submit(self, _run: Any, _respond: Any, event: Any, state: Any, method: Any, *rest: Any) -> _UnaryCall:  # type: ignore[override]
        """Begin a call.

        Args:
            _run: Would run the next in the call's context.
            _respond: Would wait for the request, and answer it.
            event: The call, as it came.
            state: What gRPC knows of it; locked.
            method: Made by `computed`.
            rest: What would wait for the request; what parses it; what serializes the response.

        Returns:
            What gRPC treats as a future, to count the calls under way.
        """
        _, parse, serialize = rest
        call = _UnaryCall(event, state, method, serialize)
        take = _server._receive_message(state, event.call, parse)

        def receive(received: Any) -> Any:
            result = take(received)
            request, state.request = state.request, None
            message = _server._serialized_request(received)
            quick = message is None or len(message) <= QUICK_BYTES
            call.take(request, quick, super(Events, self).submit)
            return result

        event.call.start_server_batch((cygrpc.ReceiveMessageOperation(0),), receive)
        state.due.add(_server._RECEIVE_MESSAGE_TOKEN)
        return call


EVENTS = Events(count_cores(), thread_name_prefix="intake")


class _UnaryCall(UnaryCall):
    """A call under way."""

    def __init__(self, event: Any, state: Any, method: Any, serialize: Callable[[Any], bytes]) -> None:
        servicer = method.__wrapped__.__self__  # within the guard
        context = _server._Context(event, state, None)
        super().__init__(partial(method.begin, servicer), name_method(servicer, method), context, serialize)
        self._event, self._state, self._unpacks = event, state, method.unpacks

    def add_done_callback(self, done: Callable[[object], object]) -> None:
        """Have `done` called when the call is over; gRPC does it once, before the request can be there."""
        self._done = done

    def take(self, request: Any, quick: bool, hand_over: Callable[..., object]) -> None:
        """Begin, on this thread or by `hand_over` on another; raise nothing, which would end gRPC's own thread.

        Args:
            request: None if its client went away, or sent none.
            quick: Whether it is small enough for this thread.
            hand_over: Has a function called on another thread.
        """
        try:
            if request is None:
                self.abort(grpc.StatusCode.UNIMPLEMENTED, "a call of this method has exactly one request")
            elif request is MALFORMED:
                self.abort(grpc.StatusCode.INVALID_ARGUMENT, NO_MESSAGE)
            elif quick and not self._unpacks(request):
                self.begin(request)
            else:
                hand_over(self.begin, request)
        except Exception as error:
            self.refuse(error)

    def reply(self, response: bytes) -> None:
        """Send the response."""
        self._send(response)

    def abort(self, code: grpc.StatusCode, details: str, trailers: Trailers = ()) -> None:
        """Send a status."""
        self._context.set_trailing_metadata(trailers)
        self._context.set_code(code)
        self._context.set_details(details)
        self._send(None)

    def _send(self, response: bytes | None) -> None:
        """Send the response, if there is one, and the status; both go nowhere if the client is gone."""
        try:
            _server._status(self._event, self._state, response)
        finally:
            self._done(self)
