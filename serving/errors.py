"""Why a request was not answered, on both sides of the wire, and the one table of what each error is called there.

| error              | what to do                                          | `Client` by itself |
|--------------------|-----------------------------------------------------|--------------------|
| InvalidRequest     | mend the request                                    | raises             |
| Malformed          | send a message of the method's type                 | raises             |
| NotFound           | ask for a model and version that the server has     | raises             |
| Overloaded         | try again after `retry_ms`, or send fewer images    | retries            |
| TooLarge           | send fewer or smaller images                        | retries            |
| Unavailable        | try again, perhaps elsewhere: no server, or it ends | retries            |
| DeadlineExceeded   | allow more time                                     | raises             |
| Cancelled          | nothing: the caller went away                       | raises             |
| Unauthenticated    | give the server's token                             | raises             |
| PermissionDenied   | ask an administrator                                | raises             |
| FailedPrecondition | name a signature that the model has                 | raises             |
| Unsupported        | do without it: the protocol has it, the server not  | raises             |
| InternalError      | look into the server's log                          | raises             |

A call carries what its status does not say in trailing metadata, an item of a stream in `Failure`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from protos import classifier_pb2 as pb

MAX_MESSAGE = 500  # characters; of up to twelve bytes on the wire, and clients take 8 KB


class Status(NamedTuple):
    """What an error is called on the wire: the code of its gRPC status, the name of that, and the status of HTTP."""

    code: int
    name: str
    http: int


class ServingError(Exception):
    """A request that was not answered; the message says why in one sentence.

    Attributes:
        request_id: What the server's log calls the request.
        model: Name of the model that it was for, where the server came as far as to find it.
        version: The model's version; 0 as long as there is no model.
    """

    request_id: str = ""
    model: str = ""
    version: int = 0

    def __str__(self) -> str:
        """Return the message, cut where it quotes so much of a request that no client would take it as a header."""
        message = super().__str__()
        return message if len(message) <= MAX_MESSAGE else f"{message[:MAX_MESSAGE]}..."

    @property
    def status(self) -> Status:
        """What it is called on the wire."""
        return STATUSES[type(self)]


class InvalidRequest(ServingError):
    """The request cannot be answered as it is.

    Attributes:
        image: Index of the image that is at fault, if it is one.
    """

    def __init__(self, message: str, image: int | None = None) -> None:
        super().__init__(message)
        self.image = image


class Malformed(InvalidRequest):
    """The request is no message of its method's type, which is no matter for the log."""


class NotFound(ServingError):
    """The server has no such model or version."""


class Overloaded(ServingError):
    """The queue is full.

    Attributes:
        retry_ms: When to try again, in milliseconds.
    """

    def __init__(self, message: str, retry_ms: int = 0) -> None:
        super().__init__(message)
        self.retry_ms = retry_ms


class TooLarge(ServingError):
    """The request has more bytes than the server takes; for gRPC that is the status of a full queue."""


class Unavailable(ServingError):
    """No server answers, or it is shutting down."""


class DeadlineExceeded(ServingError):
    """The deadline passed before there was an answer."""


class Cancelled(ServingError):
    """The caller went away."""


class Unauthenticated(ServingError):
    """The server wants a token, and the caller gave none, or another."""


class PermissionDenied(ServingError):
    """The caller may not ask for this."""


class FailedPrecondition(ServingError):
    """The request asks for what this model does not have, as TensorFlow Serving tells it."""


class Unsupported(ServingError):
    """The protocol has this, the server does not."""


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
ERRORS = {status.code: error for error, status in STATUSES.items()}  # of two with one code, the last
PUSHBACK = "grpc-retry-pushback-ms"  # a name of gRPC's own: its retry policies wait that long
RETRY = "retry-after-ms"  # the same for our client: not every transport may send names of gRPC's own
IMAGE = "resnet-image-index"
REQUEST_ID = "x-request-id"  # as proxies call it; a caller may choose it


Trailers = tuple[tuple[str, str], ...]


def to_trailers(error: ServingError) -> Trailers:
    """Return what a status and its message do not say of an error, as trailing metadata."""
    trailers = {REQUEST_ID: error.request_id} if error.request_id else {}
    match error:
        case Overloaded():
            trailers[PUSHBACK] = trailers[RETRY] = str(error.retry_ms)
        case InvalidRequest(image=int(index)):
            trailers[IMAGE] = str(index)
    return tuple(trailers.items())


def from_status(code: int, message: str, trailers: Mapping[str, Any]) -> ServingError:
    """Return what a failed call raised on the server, or what kept it from getting there.

    Args:
        code: Of its gRPC status.
        message: Of the status.
        trailers: Trailing metadata.
    """
    image = int(trailers[IMAGE]) if IMAGE in trailers else None
    raised = _restore(code, message, int(trailers.get(RETRY) or trailers.get(PUSHBACK) or 0), image)
    raised.request_id = trailers.get(REQUEST_ID, "")
    return raised


def to_failure(error: ServingError) -> pb.Failure:
    """Return an error as an item of a stream carries it."""
    failure = pb.Failure(code=error.status.code, message=str(error), request_id=error.request_id)
    match error:
        case Overloaded():
            failure.retry_pushback_ms = error.retry_ms
        case InvalidRequest(image=int(index)):
            failure.image = index
    return failure


def from_failure(failure: pb.Failure) -> ServingError:
    """Return what one request of a stream raised on the server."""
    image = failure.image if failure.HasField("image") else None
    raised = _restore(failure.code, failure.message, failure.retry_pushback_ms, image)
    raised.request_id = failure.request_id
    return raised


def _restore(code: int, message: str, retry_ms: int, image: int | None) -> ServingError:
    kind = ERRORS.get(code, ServingError)
    if kind is Overloaded:
        return Overloaded(message, retry_ms)
    if kind is InvalidRequest:
        return InvalidRequest(message, image)
    return kind(message)
