"""gRPC by the proxies of Ray Serve: each hands its calls to replicas, as messages, and sends what they return.

A proxy tells a replica the name of a method without its service; so each message comes with the path of its method,
which `ProxiedMessage` has from the proxy. The deadline of a call stays there: when it has passed, the proxy cancels.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import chain
from typing import Any, NamedTuple, cast

import grpc

from serving.errors import ServingError, Trailers, to_trailers
from serving.transports.call import Call, Streaming, Unary, report
from serving.transports.dispatcher import Dispatcher

CODES = {code.value[0]: code for code in grpc.StatusCode}


class ProxiedMessage(NamedTuple):
    """A message of a call: the path of the method, and the bytes."""

    path: str
    payload: bytes


class ProxiedResponse(NamedTuple):
    """The bytes of a response, which Ray takes for a message of protobuf."""

    payload: bytes

    def SerializeToString(self) -> bytes:
        """Return the bytes."""
        return self.payload


class RayTransport:
    """Has the calls of proxies answered; it belongs to the event loop that it is made on.

    Ray passes its `RayServegRPCContext` by the name `grpc_context`: it takes status and trailing metadata to the proxy.
    """

    def __init__(self, dispatcher: Dispatcher) -> None:
        """Pass calls to `dispatcher`."""
        self._dispatcher, self._loop = dispatcher, asyncio.get_running_loop()

    async def answer(self, message: ProxiedMessage, grpc_context: Any) -> ProxiedResponse:
        """Return the response of a unary call; it is empty if `grpc_context` has an error."""
        call = _UnaryCall(message, grpc_context)
        self._dispatcher.dispatch(call, cast(Unary, self._dispatcher.methods[message.path]))
        try:
            answer, trailers = await call.answered
        except asyncio.CancelledError:
            call.cancelled = True
            call.leave()
            raise
        if isinstance(answer, ServingError):
            _set_error(grpc_context, answer)
            return ProxiedResponse(b"")
        grpc_context.set_trailing_metadata([*trailers])
        return ProxiedResponse(answer)

    def stream(self, messages: Any, grpc_context: Any) -> Iterator[ProxiedResponse]:
        """Yield the responses of a streaming call, on a thread of its own.

        Args:
            messages: The requests, an asynchronous iterator of `ProxiedMessage`.
            grpc_context: The context.

        Raises:
            RuntimeError: The call failed; `grpc_context` has the error.
        """
        requests = self._pull(messages)
        if (first := next(requests, None)) is None:
            return
        call = _StreamingCall(first.path, messages, grpc_context)
        payloads = (request.payload for request in chain([first], requests))
        try:
            method = cast(Streaming, self._dispatcher.methods[first.path])
            yield from map(ProxiedResponse, self._dispatcher.stream(call, method, payloads))
        except Exception as error:
            refusal = error if isinstance(error, ServingError) and error.request_id else report(call, error)
            _set_error(grpc_context, refusal)
            raise RuntimeError(str(refusal)) from None

    def _pull(self, messages: Any) -> Iterator[ProxiedMessage]:
        """Yield the messages of a stream, which the event loop receives."""

        async def receive() -> ProxiedMessage | None:
            return cast(ProxiedMessage | None, await anext(messages, None))

        while message := asyncio.run_coroutine_threadsafe(receive(), self._loop).result():
            yield message


def _set_error(context: Any, error: ServingError) -> None:
    context.set_code(CODES[error.status.code])
    context.set_details(str(error))
    context.set_trailing_metadata([*to_trailers(error)])


class _RayCall(Call):
    def __init__(self, path: str, payload: bytes, context: Any) -> None:
        super().__init__(path, payload, context.invocation_metadata(), None)
        self._peer = str(context.peer())

    @property
    def peer(self) -> str:
        """Address of the caller."""
        return self._peer


class _UnaryCall(_RayCall):
    """A call whose coroutine waits for the answer."""

    def __init__(self, message: ProxiedMessage, context: Any) -> None:
        super().__init__(*message, context)
        self._loop = asyncio.get_running_loop()
        self.answered: asyncio.Future[tuple[bytes | ServingError, Trailers]] = self._loop.create_future()

    def _send(self, response: bytes, trailers: Trailers) -> None:
        self._loop.call_soon_threadsafe(self._end, response, trailers)

    def _send_error(self, error: ServingError) -> None:
        self._loop.call_soon_threadsafe(self._end, error, ())

    def _end(self, answer: bytes | ServingError, trailers: Trailers) -> None:
        if not self.answered.done():  # cancelled
            self.answered.set_result((answer, trailers))


class _StreamingCall(_RayCall):
    """A call whose responses are yielded."""

    def __init__(self, path: str, messages: Any, context: Any) -> None:
        super().__init__(path, b"", context)
        self._messages = messages

    def is_active(self) -> bool:
        """Return whether the caller still waits."""
        return not self._messages.is_cancelled()

    def _send(self, response: bytes, trailers: Trailers) -> None:
        raise NotImplementedError

    def _send_error(self, error: ServingError) -> None:
        raise NotImplementedError
