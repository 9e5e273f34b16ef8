"""Why a request was not answered, on both sides of the wire: the one table of errors and gRPC status codes.

| error              | status              | what to do                                          | `Client` by itself |
|--------------------|---------------------|-----------------------------------------------------|--------------------|
| InvalidRequest     | INVALID_ARGUMENT    | mend the request                                    | raises             |
| NotFound           | NOT_FOUND           | ask for a model and version that the server has     | raises             |
| Overloaded         | RESOURCE_EXHAUSTED  | try again after `retry_ms`, or send fewer images    | retries            |
| Unavailable        | UNAVAILABLE         | try again, perhaps elsewhere: no server, or it ends | retries            |
| DeadlineExceeded   | DEADLINE_EXCEEDED   | allow more time                                     | raises             |
| Cancelled          | CANCELLED           | nothing: the caller went away                       | raises             |
| Unauthenticated    | UNAUTHENTICATED     | give the server's token                             | raises             |
| FailedPrecondition | FAILED_PRECONDITION | name a signature that the model has                 | raises             |
| Unsupported        | UNIMPLEMENTED       | do without it: the protocol has it, the server not  | raises             |
| InternalError      | INTERNAL            | look into the server's log                          | raises             |

A call carries what its status does not say in trailing metadata, an item of a stream in `Failure`.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import grpc

from protos import classifier_pb2 as pb

MAX_MESSAGE = 500  # characters; of up to twelve bytes on the wire, and clients take 8 KB


class ServingError(Exception):
    """A request that was not answered; the message says why in one sentence.

    Attributes:
        request_id: What the server's log calls the request.
        model: Name of the model that it was for, where the server came as far as to find it.
        version: The model's version; 0 as long as there is no model.
    """

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN
    request_id: str = ""
    model: str = ""
    version: int = 0

    def __str__(self) -> str:
        """Return the message, cut where it quotes so much of a request that no client would take it as a header."""
        message = super().__str__()
        return message if len(message) <= MAX_MESSAGE else f"{message[:MAX_MESSAGE]}..."


class InvalidRequest(ServingError):
    """The request cannot be answered as it is.

    Attributes:
        image: Index of the image that is at fault, if it is one.
    """

    code = grpc.StatusCode.INVALID_ARGUMENT

    def __init__(self, message: str, image: int | None = None) -> None:
        super().__init__(message)
        self.image = image


class NotFound(ServingError):
    """The server has no such model or version."""

    code = grpc.StatusCode.NOT_FOUND


class Overloaded(ServingError):
    """The queue is full.

    Attributes:
        retry_ms: When to try again, in milliseconds.
    """

    code = grpc.StatusCode.RESOURCE_EXHAUSTED

    def __init__(self, message: str, retry_ms: int = 0) -> None:
        super().__init__(message)
        self.retry_ms = retry_ms


class Unavailable(ServingError):
    """No server answers, or it is shutting down."""

    code = grpc.StatusCode.UNAVAILABLE


class DeadlineExceeded(ServingError):
    """The deadline passed before there was an answer."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class Cancelled(ServingError):
    """The caller went away."""

    code = grpc.StatusCode.CANCELLED


class Unauthenticated(ServingError):
    """The server wants a token, and the caller gave none, or another."""

    code = grpc.StatusCode.UNAUTHENTICATED


class FailedPrecondition(ServingError):
    """The request asks for what this model does not have, as TensorFlow Serving tells it."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class Unsupported(ServingError):
    """The protocol has this, the server does not."""

    code = grpc.StatusCode.UNIMPLEMENTED


class InternalError(ServingError):
    """The server failed; its log has the details."""

    code = grpc.StatusCode.INTERNAL


ERRORS: dict[grpc.StatusCode, type[ServingError]] = {error.code: error for error in ServingError.__subclasses__()}
CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}
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


def from_rpc(error: grpc.RpcError) -> ServingError:
    """Return what a failed call raised on the server, or what kept it from getting there."""
    trailers: dict[str, Any] = dict(cast(Any, error.trailing_metadata()) or ())  # pairs; the types say otherwise
    image = int(trailers[IMAGE]) if IMAGE in trailers else None
    raised = _restore(error.code(), error.details(), int(trailers.get(RETRY) or trailers.get(PUSHBACK) or 0), image)
    raised.request_id = trailers.get(REQUEST_ID, "")
    return raised


def to_failure(error: ServingError) -> pb.Failure:
    """Return an error as an item of a stream carries it."""
    failure = pb.Failure(code=error.code.value[0], message=str(error), request_id=error.request_id)
    match error:
        case Overloaded():
            failure.retry_pushback_ms = error.retry_ms
        case InvalidRequest(image=int(index)):
            failure.image = index
    return failure


def from_failure(failure: pb.Failure) -> ServingError:
    """Return what one request of a stream raised on the server."""
    code = CODES.get(failure.code, grpc.StatusCode.UNKNOWN)
    image = failure.image if failure.HasField("image") else None
    raised = _restore(code, failure.message, failure.retry_pushback_ms, image)
    raised.request_id = failure.request_id
    return raised


def _restore(code: grpc.StatusCode, message: str | None, retry_ms: int, image: int | None) -> ServingError:
    kind = ERRORS.get(code, ServingError)
    message = message or f"the call failed with {code.name}"
    if kind is Overloaded:
        return Overloaded(message, retry_ms)
    if kind is InvalidRequest:
        return InvalidRequest(message, image)
    return kind(message)
