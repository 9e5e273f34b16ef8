"""What every call has in common, whichever protocol it speaks: how long it may take, and how a failure is told.

What is computed for a request is `Work`: a generator that checks the request, yields the `Job` for the batcher, takes
its answer and returns the response. So the same lines serve whoever waits for the answer on a thread of his own, and
whoever is told of it on another.
"""

from __future__ import annotations

import functools
import logging
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from typing import Any, NamedTuple, TypeVar

import grpc

from serving.batcher import DEFAULT_PRIORITY, Answer, Outcome, Queue
from serving.engine import Images
from serving.errors import REQUEST_ID, InternalError, Overloaded, ServingError, Trailers, to_trailers
from serving.logs import Tally, log_fields

Handler = TypeVar("Handler", bound=Callable[..., Any])
Response = TypeVar("Response")

LONGEST_ID = 128

log = logging.getLogger(__name__)

OVERLOADS = Tally(log, "overloaded: refused %d more requests, the last because %s", seconds=10)


class Job(NamedTuple):
    """What is to be computed for a request; the attributes are those of `Queue.submit`."""

    batcher: Queue
    images: Images
    deadline: float = float("inf")
    priority: int = DEFAULT_PRIORITY


Work = Generator[Job, Answer, Response]


def finish(work: Work[Response], outcome: Outcome) -> Response:
    """Give work its answer, or the error that took its place, and return the response.

    Raises:
        ServingError: The error.
    """
    try:
        if isinstance(outcome, Answer):
            work.send(outcome)
        else:
            work.throw(outcome)
    except StopIteration as end:
        response: Response = end.value
        return response
    raise AssertionError("a request is computed once")


class UnaryCall(ABC):
    """A call with one request and one response, which no thread waits for; a transport says how it is answered."""

    def __init__(
        self, begin: Callable[[Any, Any], Work[Any]], method: str, context: Any, serialize: Callable[[Any], bytes]
    ) -> None:
        """Take a call on.

        Args:
            begin: Returns the work for a request and the context.
            method: Service/Method, for the log.
            context: Of the call: a `grpc.ServicerContext`, or what has the same methods as far as they are used here.
            serialize: Makes bytes of the response.
        """
        self._to_work, self._method, self._context, self._serialize = begin, method, context, serialize
        self._started = time.perf_counter_ns()

    def begin(self, request: Any) -> None:
        """Leave what is to be computed with the batcher; whatever goes wrong is the caller's answer."""
        try:
            self._work = self._to_work(request, self._context)
            job = next(self._work)
        except Exception as error:
            self.refuse(error)
            return
        try:
            job.batcher.post(job.images, self._finish, job.deadline, self._context.is_active, job.priority)
        except ServingError as error:
            self._finish(error)

    def refuse(self, error: Exception) -> None:
        """Answer with an error, and log it."""
        refusal = report(error, self._method, self._context, self._started)
        self.abort(refusal.code, str(refusal), to_trailers(refusal))

    @abstractmethod
    def reply(self, response: bytes) -> None:
        """Send the response; it goes nowhere if the client is gone."""

    @abstractmethod
    def abort(self, code: grpc.StatusCode, details: str, trailers: Trailers = ()) -> None:
        """Send a status in place of a response."""

    def _finish(self, outcome: Outcome) -> None:
        try:
            response = self._serialize(finish(self._work, outcome))
        except Exception as error:
            self.refuse(error)
        else:
            log_answered(self._method, self._context, self._started)
            self.reply(response)


def answer(work: Work[Response], context: grpc.ServicerContext) -> Response:
    """Do all of some work, and wait for it."""
    job = next(work)
    outcome: Outcome
    try:
        outcome = job.batcher.submit(job.images, job.deadline, context.is_active, job.priority)
    except ServingError as error:
        outcome = error
    return finish(work, outcome)


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
            log_answered(name_method(servicer, handler), context, started)
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
    if isinstance(refusal, Overloaded):
        # A line for each would be one more load; the metrics count them.
        OVERLOADS.add(str(refusal))
        level = logging.DEBUG
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


def log_answered(method: str, context: grpc.ServicerContext, started: int) -> None:
    """Log that a request was answered, where that is of interest; the arguments are those of `report`."""
    if log.isEnabledFor(logging.DEBUG):  # before anything is looked up
        _log(logging.DEBUG, "answered", method, "OK", find_request_id(context), started)


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
    if not log.isEnabledFor(level):
        return
    milliseconds = round((time.perf_counter_ns() - started) / 1e6, 3)
    log_fields(log, level, message, request_id=request_id, method=method, code=code, milliseconds=milliseconds, **known)
