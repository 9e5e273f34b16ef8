"""From a request to its response: a REST method is a gRPC method in another encoding, and shares all that is behind it.

A request with the right token and of an allowed size is read, encoded as the message of its gRPC method, and passed to
the dispatcher as a `Call`, like one that came over gRPC. What takes longer than a millisecond is done by workers: one
thread receives all requests.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, NamedTuple, TypeVar, cast
from urllib.parse import parse_qs

import msgspec
from starlette.types import Receive, Scope, Send

from serving.config import Limits
from serving.errors import REQUEST_ID, Cancelled, InvalidRequest, Overloaded, ServingError, TooLarge, Trailers
from serving.http import problems
from serving.http.connection import CONNECTION
from serving.http.content import unpack
from serving.protocols.inputs import to_number
from serving.threads import WorkerPool
from serving.transports.call import Call, Metadata, Unary, report
from serving.transports.dispatcher import RETRY_MS, Dispatcher

T = TypeVar("T")

TIMEOUT = "x-envoy-expected-rq-timeout-ms"  # how long a proxy of Envoy's make, as Istio's, waits for the response
SAFE_HEADERS = [(name.encode(), value.encode()) for name, value in problems.SAFE.items()]
JSON, BINARY = "application/json", "application/octet-stream"
FILE = {"type": "string", "format": "binary"}  # the schema of bytes


@dataclass(slots=True)
class RestRequest:
    """A request, without its transport.

    Attributes:
        parameters: The parameters in its path.
        query: The parameters after it, as bytes.
        headers: By name in lower case; of several of one name the last.
        body: As it was sent, or unpacked if it was compressed.
        parsed: What `RequestEncoder` keeps of it for `ResponseDecoder`.
    """

    parameters: Mapping[str, Any]
    query: bytes
    headers: Mapping[str, str]
    body: bytes = b""
    parsed: Any = None

    def read_query(self, *names: str) -> Mapping[str, str]:
        """Return the parameters after the path.

        Raises:
            InvalidRequest: One is unknown, or is given twice.
        """
        try:
            given = parse_qs(self.query.decode("ascii"), keep_blank_values=True, max_num_fields=16, errors="strict")
        except ValueError:
            raise InvalidRequest("the parameters after the ? cannot be read") from None
        for name, values in given.items():
            if name not in names:
                known = ", ".join(names) or "none"
                raise InvalidRequest(f"there is no parameter {name!r}; this path takes: {known}")
            if len(values) > 1:
                raise InvalidRequest(f"the parameter {name} is given {len(values)} times")
        return {name: values[0] for name, values in given.items()}


class RestResponse(NamedTuple):
    """A response: its body, and what stands before it."""

    body: bytes
    content_type: str = JSON
    status: int = HTTPStatus.OK
    headers: tuple[tuple[str, str], ...] = ()


Schema = type[msgspec.Struct] | Mapping[str, Any]
"""What JSON is like."""
RequestEncoder = Callable[[RestRequest], bytes]
"""Returns the message of the gRPC method; raises a `ServingError`."""
ResponseDecoder = Callable[[RestRequest, bytes], RestResponse]
"""Returns the response, given the serialized message that answers."""


@dataclass(frozen=True, kw_only=True)
class RestMethod:
    """A method of HTTP that stands for a method of gRPC.

    Attributes:
        verb: GET or POST.
        paths: With parameters in braces.
        method: Path of the gRPC method.
        encode: Makes its request.
        decode: Makes the response.
        tag: The protocol, for the description.
        summary: What it does, for people.
        request: Media types of the request's body, each with its type or schema.
        response: Type or schema of the response.
        query: Names of the parameters after the path, each with its schema.
        example: How curl calls it.
    """

    verb: str
    paths: tuple[str, ...]
    method: str
    encode: RequestEncoder
    decode: ResponseDecoder
    tag: str
    summary: str
    request: Mapping[str, Schema] = field(default_factory=dict)
    response: Schema = field(default_factory=dict)
    query: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    example: str = ""


Deliver = Callable[[bytes | ServingError, Trailers], None]
"""Takes the answer to a call, on the event loop."""


def _ignore(*_: object) -> None:
    """Stand for what delivers an answer where there is nothing to deliver."""


class HttpCall(Call):
    """A call by HTTP."""

    def __init__(self, method: str, scope: Scope, deliver: Deliver) -> None:
        """Begin a call of a gRPC method, whose answer goes to `deliver`."""
        headers: Metadata = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        super().__init__(method, b"", headers, None)
        self._client, self._deliver = scope.get("client"), deliver
        self._loop = asyncio.get_running_loop()

    def set_timeout(self, milliseconds: str | None) -> None:
        """Set the deadline, from the header that a proxy adds.

        Raises:
            InvalidRequest: It is no number.
        """
        if milliseconds is None:
            return
        if (number := to_number(milliseconds)) is None:
            raise InvalidRequest(f"the header {TIMEOUT} is a number of milliseconds, not {milliseconds!r}")
        self.deadline = time.monotonic() + number / 1000

    @property
    def peer(self) -> str:
        """Address of the caller."""
        return "{}:{}".format(*self._client) if self._client else "unknown"

    def _send(self, response: bytes, trailers: Trailers) -> None:
        self._hand_over(response, trailers)

    def _send_error(self, error: ServingError) -> None:
        self._hand_over(error, ())

    def _hand_over(self, answer: bytes | ServingError, trailers: Trailers) -> None:
        deliver, self._deliver = self._deliver, _ignore  # it holds what holds the call
        with suppress(RuntimeError):  # the server has ended
            self._loop.call_soon_threadsafe(deliver, answer, trailers)


class Exchange:
    """What all endpoints share: the dispatcher, the limits, and the workers."""

    def __init__(self, dispatcher: Dispatcher, workers: WorkerPool) -> None:
        """Pass calls to `dispatcher`, and leave slow work to `workers`."""
        self.dispatcher, self.limits, self._workers = dispatcher, dispatcher.limits, workers
        self._reading = 0

    @asynccontextmanager
    async def reading(self, call: HttpCall) -> AsyncIterator[None]:
        """Read the body of a request, whose caller must be allowed.

        Raises:
            ServingError: The call is refused, or too many bodies are being read.
        """
        self.check(call)
        # As many bodies as there may be calls: a body is held before its call counts as active.
        if self._reading >= self.limits.max_calls:
            raise Overloaded("too many requests over HTTP are being read", RETRY_MS)
        self._reading += 1
        try:
            yield
        finally:
            self._reading -= 1

    def check(self, call: HttpCall) -> None:
        """Raise the error of a call that is refused whatever it asks: its token is missing or wrong."""
        if refusal := self.dispatcher.check(call):
            refusal.request_id = call.find_id()  # without a line in the log, which strangers could cause at will
            raise refusal

    async def work(self, function: Callable[..., T], *args: Any) -> T:
        """Return what a function returns that takes longer than a millisecond, or raise its error."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()

        def run() -> None:
            try:
                result = function(*args)
            except Exception as error:
                loop.call_soon_threadsafe(_fail, done, error)
            else:
                loop.call_soon_threadsafe(_succeed, done, result)

        self._workers.submit(run)
        return await done


class CallEndpoint:
    """Answers the requests of one method: as an ASGI application, or at once if a request is there in full."""

    def __init__(self, rest: RestMethod, exchange: Exchange) -> None:
        """Answer the requests of `rest`."""
        self._rest, self._exchange = rest, exchange
        self._method = cast(Unary, exchange.dispatcher.methods[rest.method])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        answered: asyncio.Future[tuple[bytes | ServingError, Trailers]] = asyncio.get_running_loop().create_future()

        def deliver(answer: bytes | ServingError, trailers: Trailers) -> None:
            if not answered.done():
                answered.set_result((answer, trailers))

        call = HttpCall(self._rest.method, scope, deliver)
        connection = scope.get(CONNECTION)
        if connection is not None:
            connection.call = call
        request = _make_request(call, scope)
        is_read = False
        answer: bytes | ServingError
        trailers: Trailers = ()
        try:
            call.set_timeout(request.headers.get(TIMEOUT))
            async with self._exchange.reading(call):
                request.body = await _read_body(receive, request.headers, self._exchange.limits)
                is_read = True
                call.payload = await self._exchange.work(self._encode, request)
            self._exchange.dispatcher.dispatch(call, self._method)
            answer, trailers = await answered
        except Exception as error:
            answer = end(call, error)
        if not isinstance(answer, Cancelled):
            # What was not read of a body would come next on this connection.
            await self.respond(call, request, answer, trailers, closes=not is_read).send(send)
        if connection is not None:
            connection.call = None

    def _encode(self, request: RestRequest) -> bytes:
        """Return the message of a request. It runs on a worker: few bodies are unpacked at a time."""
        if coding := request.headers.get("content-encoding"):
            request.body = unpack(request.body, coding, self._exchange.limits.max_message_bytes)
        message = self._rest.encode(request)
        request.body = b""  # which would be kept until the answer
        return message

    def begin(self, scope: Scope, finish: Callable[[RawResponse], None]) -> ShortCall | None:
        """Begin a call with a short body: without a task, which would cost as much as all of this.

        Args:
            scope: As in ASGI.
            finish: Sends the response; called on the event loop.

        Returns:
            The call; None if it is refused.
        """
        short = ShortCall(self, self._rest.method, scope, finish)
        try:
            short.call.set_timeout(short.request.headers.get(TIMEOUT))
            self._exchange.check(short.call)
        except Exception as error:
            # What was not read of a body would come next on this connection.
            finish(self.respond(short.call, short.request, end(short.call, error), (), closes=True))
            return None
        return short

    def dispatch(self, call: HttpCall, request: RestRequest) -> None:
        """Have a call answered whose body is short."""
        call.payload = self._rest.encode(request)
        request.body = b""
        self._exchange.dispatcher.dispatch(call, self._method)

    def respond(
        self,
        call: HttpCall,
        request: RestRequest,
        answer: bytes | ServingError,
        trailers: Trailers,
        closes: bool = False,
    ) -> RawResponse:
        """Return the response to a request."""
        if not isinstance(answer, ServingError):
            try:
                return _to_raw(self._rest.decode(request, answer), call.find_id(), trailers)
            except Exception as error:
                answer = end(call, error)
        problem = problems.respond(answer, call.find_id(), closes)
        return RawResponse(problem.status_code, problem.raw_headers, bytes(problem.body))


class ShortCall:
    """A call with a short body, which is to come.

    Attributes:
        call: The call.
        request: What it asks.
    """

    def __init__(
        self, endpoint: CallEndpoint, method: str, scope: Scope, finish: Callable[[RawResponse], None]
    ) -> None:
        self.call = HttpCall(method, scope, self._deliver)
        self.request = _make_request(self.call, scope)
        self._endpoint, self._finish = endpoint, finish

    def answer(self, body: bytes) -> None:
        """Answer it, now or later."""
        self.request.body = body
        try:
            self._endpoint.dispatch(self.call, self.request)
        except Exception as error:
            self._deliver(end(self.call, error), ())

    def _deliver(self, answer: bytes | ServingError, trailers: Trailers) -> None:
        self._finish(self._endpoint.respond(self.call, self.request, answer, trailers))


class RawResponse(NamedTuple):
    """A response as ASGI has it."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes

    async def send(self, send: Send) -> None:
        """Send it."""
        await send({"type": "http.response.start", "status": self.status, "headers": self.headers})
        await send({"type": "http.response.body", "body": self.body})


def _make_request(call: HttpCall, scope: Scope) -> RestRequest:
    headers = cast(Mapping[str, str], dict(call.metadata))
    return RestRequest(scope.get("path_params", {}), scope["query_string"], headers)


def end(call: HttpCall, error: Exception) -> ServingError:
    """End a call that failed, and return the error for the caller."""
    call.leave()
    refusal = error if isinstance(error, ServingError) and error.request_id else report(call, error)
    for each in (error, refusal):
        # As in `serving.transports.call.refuse`: the frames hold the body, and the error.
        each.__traceback__ = each.__context__ = each.__cause__ = None
    return refusal


def _to_raw(response: RestResponse, request_id: str, trailers: Trailers) -> RawResponse:
    headers = [
        (b"content-type", response.content_type.encode("latin-1")),
        (b"content-length", b"%d" % len(response.body)),
        (REQUEST_ID.encode(), request_id.encode("latin-1")),
        *SAFE_HEADERS,
        *((name.encode("latin-1"), value.encode("latin-1")) for name, value in (*trailers, *response.headers)),
    ]
    return RawResponse(response.status, headers, response.body)


async def _read_body(receive: Receive, headers: Mapping[str, str], limits: Limits) -> bytes:
    """Return the body of a request."""
    limit = limits.max_message_bytes
    length = to_number(headers.get("content-length", "0"))
    if length is None or length > limit:
        raise TooLarge(f"the request has more than the {limit:,} bytes allowed")
    message = await receive()
    if not message.get("more_body") and message["type"] == "http.request":
        return cast(bytes, message.get("body", b""))  # as nearly always
    parts = bytearray()
    while True:
        if message["type"] != "http.request":
            raise Cancelled("the caller went away")
        parts += message.get("body", b"")
        if len(parts) > limit:
            raise TooLarge(f"the request has more than the {limit:,} bytes allowed")
        if not message.get("more_body"):
            return bytes(parts)
        message = await receive()


def _succeed(done: asyncio.Future[Any], result: object) -> None:
    if not done.done():
        done.set_result(result)


def _fail(done: asyncio.Future[Any], error: Exception) -> None:
    if not done.done():
        done.set_exception(error)


def to_json(value: object, status: int = HTTPStatus.OK) -> RestResponse:
    """Return a response of JSON."""
    return RestResponse(msgspec.json.encode(value), status=status)


@dataclass(frozen=True, kw_only=True)
class Resource:
    """Something to read that is no method of gRPC.

    Attributes:
        path: With parameters in braces.
        read: Returns it; raises a `ServingError`. It runs on a worker.
        summary: What it is, for people.
        response: Type or schema of the response.
        query: Names of the parameters after the path, each with its schema.
        content_type: Of the response.
    """

    path: str
    read: Callable[[RestRequest], RestResponse]
    summary: str
    response: Schema = field(default_factory=dict)
    query: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    content_type: str = JSON


class ResourceEndpoint:
    """An ASGI application that answers with a resource; a token is required as for calls."""

    def __init__(self, resource: Resource, exchange: Exchange) -> None:
        """Answer with `resource`."""
        self._resource, self._exchange = resource, exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        call = HttpCall(f"/resnet.http{self._resource.path}", scope, _ignore)
        try:
            self._exchange.check(call)
            response = await self._exchange.work(self._resource.read, _make_request(call, scope))
        except Exception as error:
            await problems.respond(end(call, error), call.find_id())(scope, receive, send)
        else:
            await _to_raw(response, call.find_id(), ()).send(send)
