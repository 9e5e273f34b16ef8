"""The transport of Ray Serve, with a proxy that is a fake, and no Ray: that is in `tests/serving/test_ray_app.py`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from serving.config import Limits
from serving.errors import InvalidRequest, Overloaded, Trailers
from serving.transports.auth import Tokens
from serving.transports.call import Call, Streaming, Unary, refuse
from serving.transports.dispatcher import Dispatcher
from serving.transports.ray import ProxiedMessage, RayTransport

ECHO, STREAM = "/toy.v1.Toy/Echo", "/toy.v1.Toy/Stream"
TRAILERS: Trailers = (("server-timing", "queue;dur=1"),)


@dataclass
class ProxyContext:
    """What Ray passes with a call: metadata, and a place for status and trailers."""

    metadata: Sequence[tuple[str, str]] = ()
    status: grpc.StatusCode | None = None
    details: str = ""
    trailers: dict[str, str] = field(default_factory=dict)

    def invocation_metadata(self) -> Sequence[tuple[str, str]]:
        """Return what the caller sent."""
        return self.metadata

    def peer(self) -> str:
        """Return the caller's address."""
        return "ipv4:192.0.2.1:4000"

    def set_code(self, code: grpc.StatusCode) -> None:
        """Set the status."""
        self.status = code

    def set_details(self, details: str) -> None:
        """Set the message."""
        self.details = details

    def set_trailing_metadata(self, trailers: list[tuple[str, str]]) -> None:
        """Set the trailers, as a list: Ray adds one of its own."""
        assert isinstance(trailers, list)
        self.trailers = dict(trailers)


class ProxyStream:
    """The messages of a stream; after them it ends, or the caller goes away."""

    def __init__(self, *payloads: bytes, path: str = STREAM) -> None:
        self._messages = iter([ProxiedMessage(path, payload) for payload in payloads])
        self.cancelled = False

    def __aiter__(self) -> AsyncIterator[ProxiedMessage]:
        return self

    async def __anext__(self) -> ProxiedMessage:
        for message in self._messages:
            return message
        raise StopAsyncIteration

    def is_cancelled(self) -> bool:
        """Return whether the caller is gone."""
        return self.cancelled


def echo(call: Call) -> None:
    """Answer with the request and the peer; refuse what is bad."""
    if call.payload == b"bad":
        refuse(call, InvalidRequest("image 1 is bad", image=1))
    else:
        call.respond(call.payload + call.peer.encode(), TRAILERS)


def repeat(call: Call, requests: Iterator[bytes]) -> Iterator[bytes]:
    """Yield each request, and whether the caller still waits; fail after a bad one."""
    for request in requests:
        yield request + str(call.is_active()).encode()
        if request == b"bad":
            raise Overloaded("too much", 7)


def make(answer: Any = echo, token: str | None = None, **limits: int) -> Dispatcher:
    """Return a dispatcher of the two methods."""
    methods = {ECHO: Unary(answer), STREAM: Streaming(repeat)}
    return Dispatcher(methods, Limits(**limits), Tokens("127.0.0.1", token, None))


async def ask(dispatcher: Dispatcher, payload: bytes, context: ProxyContext) -> bytes:
    """Have a unary call answered."""
    message = ProxiedMessage(ECHO, payload)
    return (await RayTransport(dispatcher).answer(message, context)).SerializeToString()


def follow(dispatcher: Dispatcher, messages: ProxyStream, context: ProxyContext, fails: bool = False) -> list[bytes]:
    """Have a stream answered as Ray does: the loop receives, and another thread answers."""
    responses: list[bytes] = []

    async def run() -> None:
        transport = RayTransport(dispatcher)

        def answer() -> None:
            responses.extend(one.SerializeToString() for one in transport.stream(messages, context))

        await asyncio.to_thread(answer)

    with suppress(RuntimeError) if fails else nullcontext():
        asyncio.run(run())
    return responses


def test_a_call_is_answered_with_its_trailers() -> None:
    """Whoever computes it, on whichever thread."""
    context = ProxyContext()

    async def later() -> bytes:
        loop = asyncio.get_running_loop()
        return await ask(make(lambda call: loop.run_in_executor(None, echo, call)), b"1", context)

    assert asyncio.run(later()) == b"1ipv4:192.0.2.1:4000"
    assert context == ProxyContext(trailers=dict(TRAILERS))


@pytest.mark.parametrize(
    ("payload", "metadata", "status", "details", "trailers"),
    [
        (b"bad", (("x-request-id", "mine"),), "INVALID_ARGUMENT", "image 1 is bad", {"resnet-image-index": "1"}),
        (b"123456", (("x-request-id", "1"),), "RESOURCE_EXHAUSTED", "6 bytes, more than", {"retry-after-ms": "-1"}),
        (b"1", (), "UNAUTHENTICATED", "requires a token", {}),
    ],
)  # fmt: skip
def test_an_error_has_its_status_and_all_its_trailers(
    payload: bytes, metadata: Sequence[tuple[str, str]], status: str, details: str, trailers: dict[str, str]
) -> None:
    """The response is empty: an exception would lose the trailers."""
    given = metadata and (*metadata, ("authorization", "Bearer sesame"))
    context = ProxyContext(given)
    assert asyncio.run(ask(make(token="sesame", max_message_bytes=5), payload, context)) == b""
    assert context.status is grpc.StatusCode[status]
    assert details in context.details
    assert trailers.items() <= context.trailers.items()
    if payload == b"bad":
        assert context.trailers["x-request-id"] == "mine"


def test_a_call_that_is_cancelled_is_dropped() -> None:
    """It counts no longer, and a late answer harms nothing."""
    calls: list[Call] = []
    dispatcher = make(calls.append)

    async def cancel() -> None:
        task = asyncio.ensure_future(ask(dispatcher, b"1", ProxyContext()))
        await asyncio.sleep(0)
        assert dispatcher.active == set(calls)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not calls[0].is_active()
        calls[0].respond(b"late")
        await asyncio.sleep(0)

    asyncio.run(cancel())
    assert len(calls) == 1
    assert not dispatcher.active


def test_a_stream_is_answered_message_by_message() -> None:
    """Also one without messages; the responses say whether the caller is still there."""
    gone = ProxyStream(b"3")
    gone.cancelled = True
    assert follow(make(), ProxyStream(b"1", b"2"), ProxyContext()) == [b"1True", b"2True"]
    assert follow(make(), ProxyStream(), ProxyContext()) == []
    assert follow(make(), gone, ProxyContext()) == [b"3False"]


def test_a_stream_that_fails_ends_with_the_status() -> None:
    """After the responses before it."""
    context = ProxyContext()
    assert follow(make(), ProxyStream(b"1", b"bad", b"2"), context, fails=True) == [b"1True", b"badTrue"]
    assert (context.status, context.details) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "too much")
    assert context.trailers["retry-after-ms"] == "7"
    context = ProxyContext()
    assert follow(make(token="sesame"), ProxyStream(b"1"), context, fails=True) == []
    assert context.status is grpc.StatusCode.UNAUTHENTICATED
