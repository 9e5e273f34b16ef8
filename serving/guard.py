"""What is refused before a servicer sees it: bytes that are no message, and methods that nobody may call.

gRPC answers bytes that cannot be parsed with INTERNAL, which says that the server is broken, and fills the log with a
traceback for each. Here they are what they are: INVALID_ARGUMENT, and no matter for the log.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message

MALFORMED = object()  # in the place of a message that could not be parsed
NO_MESSAGE = "the request cannot be parsed: it is no message of this method's type"


class Guard:
    """Takes services in the place of a server, and hands each method on to it with a guard before it."""

    def __init__(
        self,
        server: grpc.Server,
        closed: Collection[str],
        reason: str,
        parsers: Mapping[str, Callable[[bytes], object]] = {},
    ) -> None:
        """Guard `server`.

        Args:
            server: Where the services go, before it is started.
            closed: Paths of methods that nobody may call.
            reason: What is said to those who do, with PERMISSION_DENIED.
            parsers: What takes the place of the generated parsers, by path.
        """
        self._server, self._closed, self._reason, self._parsers = server, closed, reason, parsers

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """Add the methods of a service; generated code calls this."""
        guarded = {
            name: refuse(grpc.StatusCode.PERMISSION_DENIED, self._reason)
            if f"/{service}/{name}" in self._closed
            else _check_messages(handler, self._parsers.get(f"/{service}/{name}", handler.request_deserializer))
            for name, handler in handlers.items()
        }
        self._server.add_registered_method_handlers(service, guarded)

    def add_generic_rpc_handlers(self, handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        """Leave these out: generated code adds its methods both ways, and these have no guard."""


def refuse(code: grpc.StatusCode, reason: str, tell: Callable[[str], object] | None = None) -> Any:
    """Return what handles a method, of any kind, by a status; it takes no message first.

    Args:
        code: The status.
        reason: What is said with it.
        tell: Called with the address of whoever is refused.
    """

    def abort(_: object, context: grpc.ServicerContext) -> Any:
        if tell:
            tell(context.peer())
        context.abort(code, reason)

    return grpc.stream_stream_rpc_method_handler(abort)


def _check_messages(handler: Any, parser: Callable[[bytes], object]) -> Any:
    """Return a handler that meets messages only, and may answer with the bytes of one."""
    check = _check_stream if handler.request_streaming else _check
    kinds = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
    parse = functools.partial(_parse, parser)
    methods = {kind: getattr(handler, kind) for kind in kinds if getattr(handler, kind)}
    checked = {kind: check(method) for kind, method in methods.items()}
    return handler._replace(request_deserializer=parse, response_serializer=serialize, **checked)


def serialize(response: Message | bytes) -> bytes:
    """Return the bytes of a response, which may be bytes already."""
    return response if isinstance(response, bytes) else response.SerializeToString()


def _parse(deserialize: Callable[[bytes], object], data: bytes) -> object:
    try:
        return deserialize(data)
    except DecodeError:
        return MALFORMED


def _check(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)  # gRPC finds attributes on some, and `serving.events` too
    def call(request: object, context: grpc.ServicerContext, *more: object) -> Any:
        if request is MALFORMED:
            _abort(context)
        return method(request, context, *more)

    return call


def _check_stream(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(requests: Iterator[object], context: grpc.ServicerContext, *more: object) -> Any:
        def messages() -> Iterator[object]:
            for request in requests:
                if request is MALFORMED:
                    _abort(context)
                yield request

        return method(messages(), context, *more)

    return call


def _abort(context: grpc.ServicerContext) -> None:
    context.abort(grpc.StatusCode.INVALID_ARGUMENT, NO_MESSAGE)
