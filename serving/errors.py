"""Why a request was not answered, on both sides of the wire: the one table of errors and gRPC status codes.

| error              | status              | what to do                                          |
|--------------------|---------------------|-----------------------------------------------------|
| InvalidRequest     | INVALID_ARGUMENT    | mend the request                                    |
| NotFound           | NOT_FOUND           | ask for a model and version that the server has     |
| Overloaded         | RESOURCE_EXHAUSTED  | try again after `retry_ms`, or send fewer images    |
| Unavailable        | UNAVAILABLE         | try again, perhaps elsewhere: no server, or it ends |
| DeadlineExceeded   | DEADLINE_EXCEEDED   | allow more time                                     |
| Cancelled          | CANCELLED           | nothing: the caller went away                       |
| Unauthenticated    | UNAUTHENTICATED     | give the server's token                             |
| FailedPrecondition | FAILED_PRECONDITION | name a signature that the model has                 |
| Unsupported        | UNIMPLEMENTED       | do without it: the protocol has it, the server not  |
| InternalError      | INTERNAL            | look into the server's log                          |
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import grpc

MAX_MESSAGE = 500  # characters; of up to twelve bytes on the wire, and clients take 8 KB


class ServingError(Exception):
    """A request that was not answered; the message says why in one sentence."""

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN

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
PUSHBACK = "grpc-retry-pushback-ms"  # a name of gRPC's own: its retry policies wait that long
IMAGE = "resnet-image-index"


def to_trailers(error: ServingError) -> tuple[tuple[str, str], ...]:
    """Return what a status and its message do not say of an error, as trailing metadata."""
    match error:
        case Overloaded():
            return ((PUSHBACK, str(error.retry_ms)),)
        case InvalidRequest(image=int(index)):
            return ((IMAGE, str(index)),)
        case _:
            return ()


def from_rpc(error: grpc.RpcError) -> ServingError:
    """Return what a failed call raised on the server, or what kept it from getting there."""
    kind = ERRORS.get(error.code(), ServingError)
    message = error.details() or f"the call failed with {error.code().name}"
    trailers: dict[str, Any] = dict(cast(Any, error.trailing_metadata()) or ())  # pairs; the types say otherwise
    if kind is Overloaded:
        return Overloaded(message, retry_ms=int(trailers.get(PUSHBACK, 0)))
    if kind is InvalidRequest:
        return InvalidRequest(message, image=int(trailers[IMAGE]) if IMAGE in trailers else None)
    return kind(message)
