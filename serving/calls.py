"""What every call has in common, whichever protocol it speaks: how long it may take, and how a failure is told."""

from __future__ import annotations

import functools
import logging
import secrets
import time
from collections.abc import Callable
from typing import Any, TypeVar

import grpc

from serving.errors import REQUEST_ID, InternalError, ServingError, to_trailers
from serving.logs import log_fields

Handler = TypeVar("Handler", bound=Callable[..., Any])

LONGEST_ID = 128

log = logging.getLogger(__name__)


def tells_failures(handler: Handler) -> Handler:
    """Decorate the method of a servicer: what it raises becomes the status of the call, and a line of the log."""

    @functools.wraps(handler)
    def call(servicer: Any, request: Any, context: grpc.ServicerContext) -> Any:
        started = time.perf_counter_ns()
        try:
            response = handler(servicer, request, context)
        except Exception as error:
            refusal = report(error, name_method(servicer, handler), context, started)
        else:
            if log.isEnabledFor(logging.DEBUG):
                _log(logging.DEBUG, "answered", name_method(servicer, handler), "OK", find_request_id(context), started)
            return response
        context.set_trailing_metadata(to_trailers(refusal))
        return context.abort(refusal.code, str(refusal))

    return call  # type: ignore[return-value]


def report(error: Exception, method: str, context: grpc.ServicerContext, started: int) -> ServingError:
    """Log why a request failed, and return what its caller may be told, with an id to quote.

    Args:
        error: What was raised. If it is no `ServingError` it is a bug, and its traceback is for the log only.
        method: Service/Method.
        context: Of the call.
        started: When the request began, on the clock of `time.perf_counter_ns`.
    """
    if isinstance(error, ServingError):
        refusal, bug = error, None
    else:
        refusal, bug = InternalError("the server failed on this request; its log has the details"), error
    refusal.request_id = find_request_id(context)
    level = logging.ERROR if isinstance(refusal, InternalError) else logging.INFO
    _log(
        level,
        str(refusal),
        method,
        refusal.code.name,
        refusal.request_id,
        started,
        error=bug,
        model=refusal.model,
        version=refusal.version or None,
    )
    return refusal


def name_method(servicer: object, handler: Callable[..., Any]) -> str:
    """Return Service/Method; gRPC's generator named the servicer's base after the service."""
    return f"{type(servicer).__bases__[0].__name__.removesuffix('Servicer')}/{handler.__name__}"


def find_request_id(context: grpc.ServicerContext) -> str:
    """Return the id that the caller gave the request, as far as it is plain and short, or else a new one."""
    given = next((value for key, value in context.invocation_metadata() or () if key == REQUEST_ID), "")
    plain = "".join(sign for sign in str(given) if "!" <= sign <= "~")
    return plain[:LONGEST_ID] or secrets.token_hex(8)


def find_deadline(context: grpc.ServicerContext) -> float:
    """Return when the caller stops waiting, in seconds of `time.monotonic`; infinity if never."""
    remaining = context.time_remaining()
    return float("inf") if remaining is None else time.monotonic() + remaining


def _log(level: int, message: str, method: str, code: str, request_id: str, started: int, **known: Any) -> None:
    milliseconds = round((time.perf_counter_ns() - started) / 1e6, 3)
    log_fields(log, level, message, request_id=request_id, method=method, code=code, milliseconds=milliseconds, **known)
