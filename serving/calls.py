"""What every call has in common, whichever protocol it speaks: how long it may take, and how a failure is told."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

import grpc

from serving.errors import InternalError, ServingError, to_trailers

Handler = TypeVar("Handler", bound=Callable[..., Any])

log = logging.getLogger(__name__)


def tells_failures(handler: Handler) -> Handler:
    """Decorate the method of a servicer: what it raises becomes the status of the call."""

    @functools.wraps(handler)
    def call(servicer: Any, request: Any, context: grpc.ServicerContext) -> Any:
        try:
            return handler(servicer, request, context)
        except Exception as error:
            refusal = to_serving_error(error)
        context.set_trailing_metadata(to_trailers(refusal))
        return context.abort(refusal.code, str(refusal))

    return call  # type: ignore[return-value]


def to_serving_error(error: Exception) -> ServingError:
    """Return an error that may be told to a caller; one that is a bug goes into the log."""
    if isinstance(error, ServingError):
        return error
    log.error("a request failed", exc_info=error)
    return InternalError("the server failed on this request; its log has the details")


def find_deadline(context: grpc.ServicerContext) -> float:
    """Return when the caller stops waiting, in seconds of `time.monotonic`; infinity if never."""
    remaining = context.time_remaining()
    return float("inf") if remaining is None else time.monotonic() + remaining
