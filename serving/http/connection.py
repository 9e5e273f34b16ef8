"""A connection of HTTP/1.1 with the limits that uvicorn leaves to a proxy: time to send, size of headers, number.

uvicorn reads whatever comes, however slowly and however long; its option for headers counts for its slower parser only.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Protocol, cast

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
HEAD_SIZE = "inference-header-content-length"  # Triton's header of a body of JSON and tensors
TENSOR = HEAD_SIZE.encode()
UPGRADE = re.compile(rb"(?i)(\r\n)upgrade:")
UNUSUAL = {b"content-encoding", b"transfer-encoding", b"expect", b"origin"}


class QuickCall(Protocol):
    """A short call, whose caller is known to be allowed; its body is to come."""

    @property
    def call(self) -> Call:
        """The call."""
        ...

    def answer(self, body: bytes, /) -> None:
        """Answer it, now or later."""
        ...


Begin = Callable[[Scope, Callable[["RawResponse"], None]], "QuickCall | None"]
"""Begins a short call, given what sends the response; None if it is refused, which is the response."""
Find = Callable[[Scope], Begin | None]
"""Returns what begins the call of a request, None if its path needs more than a call."""


class HttpConnection(HttpToolsProtocol):
    """A connection. It takes a request when the one before is answered: after one that comes earlier, it ends.

    Attributes:
        call: The call that is under way; marked as cancelled when the connection ends.
    """

    def __init__(self, limits: Limits, find: Find, *args: Any, **kwargs: Any) -> None:
        """Keep `limits`, and have calls begun by what `find` returns; the other arguments are uvicorn's."""
        super().__init__(*args, **kwargs)
        self.call: Call | None = None
        self._limits, self._find = limits, find
        self._quick: QuickCall | None = None  # whose body is to come
        self._opened = self._used = self.loop.time()
        self._waits_since: float | None = self._opened  # for the rest of a request
        self._unsent, self._unsent_since = 0, 0.0  # bytes that the client does not read, and since when
        self._received = self._fields = 0  # bytes of a request, and of its headers as far as they are parsed
        # Whether a head has begun, or is to begin, and whether a request came too early.
        self._in_head, self._expects_head, self._is_early = False, True, False

    @property
    def is_idle(self) -> bool:
        """Whether little is lost when it ends: no request is there in full, and no response is under way."""
        is_open = self.cycle is not None and not self.cycle.response_complete
        return self._waits_since is not None or not (is_open or self.transport.get_write_buffer_size())

    @property
    def is_flushed(self) -> bool:
        """Whether all of its responses have left."""
        return not self.transport.get_write_buffer_size()

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
        self._quick = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read a part of a request."""
        if self.transport.is_closing() or self._is_early:
            return
        if self._expects_head:
            data = _hide_upgrade(data)
        super().data_received(data)
        self._received += len(data)
        # The parser holds a header until it ends.
        if self._in_head and self._received > self._limits.max_metadata_bytes and not self.transport.is_closing():
            self._refuse_head()

    def on_message_begin(self) -> None:
        """Begin a request; one that does not wait for the answer to the one before ends the connection after that."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._is_early = True
            self.cycle.keep_alive = False
            raise ValueError("the answer before is not sent")
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
        if self.parser.should_upgrade():  # its body would be taken for the next request
            raise ValueError("an upgrade")
        self._in_head = self._expects_head = False
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
        self._waits_since, self._expects_head = None, True
        super().on_message_complete()
        if self._quick:
            quick, self._quick = self._quick, None
            self.call = quick.call
            quick.answer(bytes(self.cycle.body))

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        """Have a request answered: by a task, unless it is a short call."""
        begin = self._find(cast(Scope, cycle.scope)) if self._is_short(cycle) else None
        if begin is None:
            super()._start_asgi_task(cycle, app)
        else:
            self._quick = begin(cast(Scope, cycle.scope), partial(self._finish, cycle))

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

    def _finish(self, cycle: RequestResponseCycle, response: RawResponse) -> None:
        """Send a response, as uvicorn does for a task."""
        self.call = None
        if self.transport.is_closing():
            return
        if problems.CLOSE in response.headers:
            cycle.keep_alive = False
        elif not cycle.keep_alive:
            response.headers.append(problems.CLOSE)
        self._write(response.status, response.headers, response.body)
        cycle.response_started = cycle.response_complete = True
        if not cycle.keep_alive:
            self.transport.close()
        self.on_response_complete()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002  # uvicorn's word for it
        """Refuse what is no request, or has too large headers; what came too early is not read."""
        if self._is_early:
            return
        if self._fields > self._limits.max_metadata_bytes:
            self._refuse_head()
        else:
            self._refuse(Malformed("the request cannot be parsed: it is not HTTP/1.1 as this server reads it"))

    def expire(self, now: float) -> None:
        """End the connection if its client is too slow: in sending a request, or in reading a response."""
        seconds, unsent = self._limits.handshake_seconds, self.transport.get_write_buffer_size()
        if not unsent or not self._unsent:
            self._unsent, self._unsent_since = unsent, now
        elif now - self._unsent_since > seconds + self._unsent / BYTES_PER_SECOND:
            self.abort()
            return
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
        response = problems.respond(error, closes=True, status=status)
        self._write(response.status_code, response.raw_headers, bytes(response.body))
        self.transport.close()

    def _write(self, status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> None:
        lines = [STATUS_LINE[status]]
        for name, value in headers:
            lines += (name, b": ", value, b"\r\n")
        self.transport.write(b"".join((*lines, b"\r\n", body)))


def _hide_upgrade(data: bytes) -> bytes:
    """Return a part of a head without the wish to speak another protocol, which a server need not fulfil.

    The parser would take the body for that protocol's. Java's client asks for HTTP/2 so.
    """
    end = data.find(b"\r\n\r\n")
    head = data if end < 0 else data[:end]
    return data if UPGRADE.search(head) is None else UPGRADE.sub(rb"\1x-upgrade:", head) + data[len(head) :]


def make_factory(limits: Limits, find: Find, config: Any, state: Any) -> Callable[[], asyncio.Protocol]:
    """Return what makes a protocol for each connection."""
    return partial(HttpConnection, limits, find, config=config, server_state=state, app_state={})
