"""A connection of HTTP/1.1 with the limits that uvicorn leaves to a proxy: time to send, size of headers, number.

uvicorn reads whatever comes, however slowly and however long; its option for headers counts for its slower parser only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Protocol, cast

import msgspec
from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from serving.config import Limits
from serving.errors import InvalidRequest, Malformed, ServingError, TooLarge
from serving.http import problems

if TYPE_CHECKING:
    from uvicorn._types import ASGI3Application

    from serving.http.endpoint import RawResponse
    from serving.transports.call import Call

BYTES_PER_SECOND = 32 * 2**10  # of a client that is not too slow, once `handshake_seconds` are over
FIELD_BYTES = 32  # of a header beside its name and value, as HTTP/2 counts them
CONNECTION = "resnet.connection"  # the key of the ASGI scope
QUICK_BYTES = 2**16  # of a body of JSON or images, which is read in about a millisecond
QUICK_TENSOR_BYTES = 2**18  # of one of pixels, which is only copied; a stranger sends so much before the token counts
TENSOR = b"inference-header-content-length"
UNUSUAL = {b"content-encoding", b"transfer-encoding", b"expect", b"origin"}


class QuickEndpoint(Protocol):
    """Answers requests that are there in full."""

    def answer(self, scope: Scope, body: bytes, finish: Callable[[RawResponse], None], /) -> Call:
        """Answer a request, now or later, and return its call."""
        ...


Find = Callable[[Scope], QuickEndpoint | None]
"""Returns what answers a request, None if its path needs more than a call."""


class HttpConnection(HttpToolsProtocol):
    """A connection.

    Attributes:
        call: The call that is under way; marked as cancelled when the connection ends.
    """

    def __init__(self, limits: Limits, find: Find, *args: Any, **kwargs: Any) -> None:
        """Keep `limits`, and have calls answered by what `find` returns; the other arguments are uvicorn's."""
        super().__init__(*args, **kwargs)
        self.call: Call | None = None
        self._limits, self._find = limits, find
        self._quick: tuple[RequestResponseCycle, QuickEndpoint] | None = None  # a request whose body is to come
        self._opened = self._used = self.loop.time()
        self._waits_since: float | None = self._opened  # for the rest of a request
        self._stalled_since: float | None = None  # because the client reads no response
        self._received = self._fields = 0  # bytes of a request, and of its headers as far as they are parsed
        self._in_head = True

    @property
    def is_idle(self) -> bool:
        """Whether no call is under way: nothing is lost when it ends."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def used(self) -> float:
        """When the last request began, on the loop's clock."""
        return self._used

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin, unless there are too many: then the one that has been idle for longest ends, or else this one."""
        if len(self.connections) >= self._limits.max_connections:
            idle = [other for other in self.connections if isinstance(other, HttpConnection) and other.is_idle]
            if not idle:
                transport.abort()
                self.transport = transport
                return
            min(idle, key=lambda other: other.used).abort()
        super().connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Mark the call under way as cancelled."""
        if self.call is not None:
            self.call.cancelled = True
            self.call.leave()
            self.call = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read a part of a request."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        self._received += len(data)
        # The parser holds a header until it ends.
        if self._in_head and self._received > self._limits.max_metadata_bytes and not self.transport.is_closing():
            self._refuse_head()

    def on_message_begin(self) -> None:
        """Begin a request."""
        super().on_message_begin()
        cast(dict[str, object], self.scope)[CONNECTION] = self
        self._used = self._waits_since = self.loop.time()
        self._received = self._fields = 0
        self._in_head = True

    def on_url(self, url: bytes) -> None:
        """Read a part of the target."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Read a header."""
        self._count(len(name) + len(value) + FIELD_BYTES)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Have the request answered."""
        self._in_head = False
        super().on_headers_complete()
        limit = self._limits.max_connection_age
        if limit and self.loop.time() - self._opened > limit:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        """Read a part of the body."""
        super().on_body(body)
        if self._quick:
            self.flow.resume_reading()  # otherwise a task would do that

    def on_message_complete(self) -> None:
        """Note that all of the request is there."""
        self._waits_since = None
        super().on_message_complete()
        if self._quick and not self._quick[0].more_body:
            self._answer(*self._quick)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        """Have a request answered: by a task, unless it is a short call."""
        endpoint = self._find(cast(Scope, cycle.scope)) if self._is_short(cycle) else None
        if endpoint is None:
            super()._start_asgi_task(cycle, app)
        elif cycle.more_body:
            self._quick = cycle, endpoint
        else:  # it came while the one before was not answered
            self._answer(cycle, endpoint)

    def _is_short(self, cycle: RequestResponseCycle) -> bool:
        """Return whether a request has a body of known and small size, and nothing unusual about it."""
        scope, size, limit = cycle.scope, -1, QUICK_BYTES
        for name, value in scope["headers"]:
            if name in UNUSUAL:
                return False
            if name == b"content-length":
                size = int(value) if len(value) < 10 else -1
            elif name == TENSOR:
                limit = QUICK_TENSOR_BYTES
        return scope["method"] == "POST" and 0 <= size <= min(limit, self._limits.max_message_bytes)

    def _answer(self, cycle: RequestResponseCycle, endpoint: QuickEndpoint) -> None:
        """Have a request answered whose body is there."""
        self._quick = None
        call = endpoint.answer(cast(Scope, cycle.scope), bytes(cycle.body), partial(self._finish, cycle))
        if not cycle.response_complete:
            self.call = call

    def _finish(self, cycle: RequestResponseCycle, response: RawResponse) -> None:
        """Send a response, as uvicorn does for a task."""
        self.call = None
        if self.transport.is_closing():
            return
        lines = [STATUS_LINE[response.status]]
        for name, value in response.headers:
            lines += (name, b": ", value, b"\r\n")
        lines.append(b"\r\n" if cycle.keep_alive else b"connection: close\r\n\r\n")
        self.transport.write(b"".join((*lines, response.body)))
        cycle.response_started = cycle.response_complete = True
        if not cycle.keep_alive:
            self.transport.close()
        self.on_response_complete()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002  # uvicorn's word for it
        """Refuse what is no HTTP, or has too large headers."""
        if self._fields > self._limits.max_metadata_bytes:
            self._refuse_head()
        else:
            self._refuse(Malformed("the request cannot be parsed: it is no HTTP"))

    def expire(self, now: float) -> None:
        """End the connection if its client is too slow: in sending a request, or in reading a response."""
        seconds = self._limits.handshake_seconds
        if self.flow is not None and self.flow.write_paused:
            self._stalled_since = self._stalled_since or now
            if now - self._stalled_since > seconds:
                self.abort()
        else:
            self._stalled_since = None
        since = self._waits_since
        if since is None or self.flow.read_paused or now - since <= seconds + self._received / BYTES_PER_SECOND:
            return
        if self._received and not (self.cycle and self.cycle.response_started and not self.cycle.response_complete):
            self._refuse(InvalidRequest("the request was not sent in time"), HTTPStatus.REQUEST_TIMEOUT)
        else:
            self.abort()

    def abort(self) -> None:
        """End the connection at once."""
        self.transport.abort()
        self.connections.discard(self)

    def _count(self, size: int) -> None:
        """Count bytes of the headers; too many end the parsing."""
        self._fields += size
        if self._fields > self._limits.max_metadata_bytes:
            raise ValueError("too many headers")

    def _refuse_head(self) -> None:
        error = TooLarge(f"the headers have more than the {self._limits.max_metadata_bytes:,} bytes allowed")
        self._refuse(error, HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)

    def _refuse(self, error: ServingError, status: int = 0) -> None:
        """Answer with an error, and end the connection."""
        problem = problems.to_problem(error) | {"status": status or error.status.http}
        body = msgspec.json.encode(problem)
        head = f"HTTP/1.1 {problem['status']} {HTTPStatus(problem['status']).phrase}\r\ncontent-length: {len(body)}\r\n"
        head += f"content-type: {problems.MEDIA_TYPE}\r\nconnection: close\r\n\r\n"
        self.transport.write(head.encode("ascii") + body)
        self.transport.close()


def make_factory(limits: Limits, find: Find, config: Any, state: Any) -> Callable[[], asyncio.Protocol]:
    """Return what makes a protocol for each connection."""
    return partial(HttpConnection, limits, find, config=config, server_state=state, app_state={})
