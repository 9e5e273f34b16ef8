"""Errors of requests, for server and client, with the one table of their status codes.

| error              | what to do                                           | `Client` by itself |
|--------------------|------------------------------------------------------|--------------------|
| InvalidRequest     | correct the request                                  | splits, raises     |
| Malformed          | send a message of the method's type                  | raises             |
| NotFound           | name a model and version that the server has         | raises             |
| Overloaded         | retry after `retry_ms`, or send fewer images         | retries            |
| TooLarge           | send fewer or smaller images                         | splits, raises     |
| Unavailable        | retry, perhaps elsewhere: no server, or a shutdown   | retries            |
| DeadlineExceeded   | allow more time                                      | raises             |
| Cancelled          | nothing: the caller cancelled the call               | raises             |
| Unauthenticated    | send the server's token                              | raises             |
| PermissionDenied   | ask an administrator                                 | raises             |
| FailedPrecondition | name a signature that the model has                  | raises             |
| Unsupported        | nothing: this server lacks that part of the protocol | raises             |
| InternalError      | read the server's log                                | raises             |

Details beyond the status travel in a call's trailing metadata, and in the `Failure` of a stream's response.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from protos import classifier_pb2 as pb

MAX_MESSAGE = 500  # characters, of up to twelve bytes on the wire; clients accept 8 KB of headers


class Status(NamedTuple):
    """Status of an error: gRPC code, its name, and the HTTP status."""

    code: int
    name: str
    http: int


class ServingError(Exception):
    """A failed request; the message says why in one sentence.

    Attributes:
        request_id: Id of the request in the server's log.
        model: Name of the model; empty if the request failed before the server looked it up.
        version: Version of the model; 0 without a model.
    """

    request_id: str = ""
    model: str = ""
    version: int = 0

    def __str__(self) -> str:
        """Return the message, cut to `MAX_MESSAGE`: it may quote the request, and clients limit the size of headers."""
        message = super().__str__()
        return message if len(message) <= MAX_MESSAGE else f"{message[:MAX_MESSAGE]}..."

    @property
    def status(self) -> Status:
        """Status codes of the error."""
        return STATUSES[type(self)]


class InvalidRequest(ServingError):
    """The request is invalid.

    Attributes:
        image: Index of an invalid image; None if the fault is in no single image.
    """

    def __init__(self, message: str, image: int | None = None) -> None:
        super().__init__(message)
        self.image = image


class Malformed(InvalidRequest):
    """The request is not a message of its method's type; the server logs it at debug level only."""


class NotFound(ServingError):
    """The server has no such model or version."""


class Overloaded(ServingError):
    """The queue is full.

    Attributes:
        retry_ms: Milliseconds to wait before a retry; 0 if the server gave none.
    """

    def __init__(self, message: str, retry_ms: int = 0) -> None:
        super().__init__(message)
        self.retry_ms = retry_ms


class TooLarge(ServingError):
    """The request is larger than the server ever accepts; gRPC uses the status of a full queue for it."""


class Unavailable(ServingError):
    """No server answers, or the server is shutting down."""


class DeadlineExceeded(ServingError):
    """The deadline passed before the answer."""


class Cancelled(ServingError):
    """The caller cancelled the call or disconnected."""


class Unauthenticated(ServingError):
    """The caller sent no token, or a wrong one."""


class PermissionDenied(ServingError):
    """The caller is not allowed to make this call."""


class FailedPrecondition(ServingError):
    """The model lacks what the request names, such as a signature; TensorFlow Serving uses this status."""


class Unsupported(ServingError):
    """The protocol has this method or feature, this server does not."""


class InternalError(ServingError):
    """The server failed; its log has the details."""


STATUSES: dict[type[ServingError], Status] = {
    ServingError: Status(2, "UNKNOWN", 500),
    Malformed: Status(3, "INVALID_ARGUMENT", 400),
    InvalidRequest: Status(3, "INVALID_ARGUMENT", 400),
    NotFound: Status(5, "NOT_FOUND", 404),
    TooLarge: Status(8, "RESOURCE_EXHAUSTED", 413),
    Overloaded: Status(8, "RESOURCE_EXHAUSTED", 429),
    Unavailable: Status(14, "UNAVAILABLE", 503),
    DeadlineExceeded: Status(4, "DEADLINE_EXCEEDED", 504),
    Cancelled: Status(1, "CANCELLED", 499),
    Unauthenticated: Status(16, "UNAUTHENTICATED", 401),
    PermissionDenied: Status(7, "PERMISSION_DENIED", 403),
    FailedPrecondition: Status(9, "FAILED_PRECONDITION", 400),
    Unsupported: Status(12, "UNIMPLEMENTED", 501),
    InternalError: Status(13, "INTERNAL", 500),
}
ERRORS = {status.code: error for error, status in STATUSES.items()}  # of two errors with one code, the last
PUSHBACK = "grpc-retry-pushback-ms"  # gRPC's own key: its retry policies wait that long
RETRY = "retry-after-ms"  # the same for our client: not every transport may send gRPC's keys
NEVER = "-1"  # the value of both for a request that no retry helps
OVERSIZED = "larger than max"  # what gRPC itself says of a message that is too large
IMAGE = "resnet-image-index"
REQUEST_ID = "x-request-id"  # the name that proxies use; a caller may choose the id

Trailers = tuple[tuple[str, str], ...]


def to_trailers(error: ServingError) -> Trailers:
    """Return the details of an error beyond its status, as trailing metadata."""
    trailers = {REQUEST_ID: error.request_id} if error.request_id else {}
    match error:
        case Overloaded():
            trailers[PUSHBACK] = trailers[RETRY] = str(error.retry_ms)
        case TooLarge():
            trailers[PUSHBACK] = trailers[RETRY] = NEVER
        case InvalidRequest(image=int(index)):
            trailers[IMAGE] = str(index)
    return tuple(trailers.items())


def from_status(code: int, message: str, trailers: Mapping[str, Any]) -> ServingError:
    """Return a failed call as the error that the server raised, or as the connection error.

    Args:
        code: gRPC status code.
        message: Message of the status.
        trailers: Trailing metadata.
    """
    image = int(trailers[IMAGE]) if IMAGE in trailers else None
    retry = trailers.get(RETRY) or trailers.get(PUSHBACK) or "0"
    error = _make_error(code, message, int(retry), image)
    error.request_id = trailers.get(REQUEST_ID, "")
    return error


def to_failure(error: ServingError) -> pb.Failure:
    """Return an error as the failure of one request of a stream."""
    failure = pb.Failure(code=error.status.code, message=str(error), request_id=error.request_id)
    match error:
        case Overloaded():
            failure.retry_pushback_ms = error.retry_ms
        case TooLarge():
            failure.retry_pushback_ms = int(NEVER)
        case InvalidRequest(image=int(index)):
            failure.image = index
    return failure


def from_failure(failure: pb.Failure) -> ServingError:
    """Return the failure of one request of a stream as the error that the server raised."""
    image = failure.image if failure.HasField("image") else None
    error = _make_error(failure.code, failure.message, failure.retry_pushback_ms, image)
    error.request_id = failure.request_id
    return error


def _make_error(code: int, message: str, retry_ms: int, image: int | None) -> ServingError:
    error_type = ERRORS.get(code, ServingError)
    if error_type is Overloaded:
        if retry_ms < 0 or OVERSIZED in message:
            return TooLarge(message)
        return Overloaded(message, retry_ms)
    if error_type is InvalidRequest:
        return InvalidRequest(message, image)
    return error_type(message)
