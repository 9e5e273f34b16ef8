"""A call, whatever transport it came by: what a protocol answers, and how failures are logged and reported."""

from __future__ import annotations

import itertools
import logging
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from serving.errors import (
    REQUEST_ID,
    Cancelled,
    DeadlineExceeded,
    InternalError,
    Malformed,
    Overloaded,
    ServingError,
    Trailers,
)
from serving.logs import LineBudget, RateLimitedLog, log_fields

MAX_ID = 128  # characters
MAX_SEPARATE = 64
PROCESS, COUNTER = secrets.token_hex(4), itertools.count(1)  # of new ids; a random id costs a system call

Metadata = Sequence[tuple[str, str | bytes]]

log = logging.getLogger(__name__)

OVERLOADS = RateLimitedLog(log, "overloaded: refused %d more requests, the last because %s", seconds=10)
FAILURES = RateLimitedLog(log, "%d more requests failed, the last because %s", seconds=10)
# The lines of failures that are the caller's, and the server's.
BUDGETS = {logging.INFO: LineBudget(), logging.ERROR: LineBudget()}


class Call(ABC):
    """A request that is answered exactly once, from any thread.

    Attributes:
        method: Path, /service/method.
        payload: The request, serialized.
        metadata: The request's.
        deadline: When the caller stops waiting, in seconds of `time.monotonic`; infinity without a deadline.
        started: When the call came in, on the clock of `time.perf_counter_ns`.
        cancelled: Whether the caller is gone.
        span: Of the call's trace; None without one.
        trace_id: Id of the trace, for the log.
        ended: Called once with the result: None or the error.
        active: The set of active calls that this one counts in until it is answered.
        refused: Whether it was answered with an error.
        message_id: The id that the caller gave it in the message, where the protocol has such a field.
        is_split: Whether its key decided which version answers.
    """

    span: Any = None
    trace_id = ""
    ended: Callable[[ServingError | None], None] | None = None
    active: set[Call] | None = None
    refused = False
    message_id = ""
    is_split = False
    _id = ""

    def __init__(self, method: str, payload: bytes, metadata: Metadata, remaining: float | None) -> None:
        """Start the clock; `remaining` is the time to the deadline in seconds, None without one."""
        self.method, self.payload, self.metadata = method, payload, metadata
        self.deadline = float("inf") if remaining is None else time.monotonic() + remaining
        self.started = time.perf_counter_ns()
        self.cancelled = False
        self._turn = [True]  # taken by the first answer

    def respond(self, response: bytes, trailers: Trailers = ()) -> None:
        """Send the response, unless the call was answered before or the caller is gone.

        Args:
            response: Serialized.
            trailers: Trailing metadata.
        """
        if self._take_turn():
            try:
                self._send(response, trailers)
            except Exception as error:
                self._send_error(report(self, error))  # else the caller would wait for ever
            if self.ended:
                self.ended(None)

    def fail(self, error: ServingError) -> None:
        """Send an error, unless the call was answered before."""
        if self._take_turn():
            self.refused = True
            self._send_error(error)
            if self.ended:
                self.ended(error)

    def is_active(self) -> bool:
        """Return whether the caller still waits."""
        return not self.cancelled

    def check(self) -> None:
        """Raise an error if nobody waits for the answer, so that nothing more is done for it.

        Raises:
            Cancelled: The caller is gone.
            DeadlineExceeded: The deadline has passed.
        """
        if not self.is_active():
            raise Cancelled("the caller went away")
        if time.monotonic() > self.deadline:
            raise DeadlineExceeded("the deadline passed before the images were decoded")

    @property
    def name(self) -> str:
        """Service/Method: the path without the package, for people."""
        return self.method.rpartition(".")[2]

    def find_id(self) -> str:
        """Return the id that the caller gave the request, cut to printable ASCII, or else one of the server's own."""
        if not self._id:
            plain = "".join(sign for sign in self._find_given(REQUEST_ID) if "!" <= sign <= "~")
            self._id = plain[:MAX_ID] or f"{PROCESS}-{next(COUNTER):x}"
        return self._id

    def find_key(self, header: str) -> str:
        """Return what decides which version answers while two share the requests: a header, or else the request id."""
        self.is_split = True
        return self._find_given(header) or self._find_own_key()

    def _find_own_key(self) -> str:
        return self.find_id()

    def _find_given(self, header: str) -> str:
        """Return the value of a header; of the request id also what the message has."""
        given = next((str(value) for key, value in self.metadata if key == header), "")
        return given or (self.message_id if header == REQUEST_ID else "")

    def leave(self) -> None:
        """Count as active no longer."""
        if self.active is not None:
            self.active.discard(self)

    def _take_turn(self) -> bool:
        self.leave()
        try:
            return self._turn.pop()
        except IndexError:
            return False

    @property
    @abstractmethod
    def peer(self) -> str:
        """Address of the caller."""

    @abstractmethod
    def _send(self, response: bytes, trailers: Trailers) -> None:
        """Send the response."""

    @abstractmethod
    def _send_error(self, error: ServingError) -> None:
        """Send the error."""


class Unary(NamedTuple):
    """A method with one request and one response.

    Attributes:
        answer: Answers a call, now or later. It runs on the receiving thread, so it must be quick and raise nothing.
        limited: Whether its calls count against the limit of active calls; health checks do not.
    """

    answer: Callable[[Call], None]
    limited: bool = True


class Streaming(NamedTuple):
    """A method with a stream of requests and a stream of responses.

    Attributes:
        answer: Maps serialized requests to serialized responses. It has a thread of its own while it lasts, and ends
            the call with the error that it raises.
        separate: Whether its calls have a limit of their own, `MAX_SEPARATE` at a time: those that may last as long as
            the server.
    """

    answer: Callable[[Call, Iterator[bytes]], Iterator[bytes]]
    separate: bool = False


Methods = dict[str, Unary | Streaming]
"""The methods of a server, by path."""


def refuse(call: Call, error: Exception) -> None:
    """Answer a call with an error, and log it. What is no `ServingError` is a bug: its traceback goes to the log."""
    call.fail(report(call, error))
    # The frames of a traceback hold the request, its model and often the error itself: a circle, which would keep the
    # memory of a model that is no longer served until garbage is collected, as seldom as `serving.process` allows.
    error.__traceback__ = error.__context__ = error.__cause__ = None


def report(call: Call, error: Exception) -> ServingError:
    """Log why a request failed, and return the error for its caller, with a request id to quote."""
    if isinstance(error, ServingError):
        refusal, bug = error, None
    else:
        refusal, bug = InternalError("the server failed on this request; its log has the details"), error
    refusal.request_id = call.find_id()
    level = logging.ERROR if isinstance(refusal, InternalError) else logging.INFO
    if isinstance(refusal, Overloaded | Malformed | Cancelled):
        level = logging.DEBUG  # a line for each would add to the load
    if isinstance(refusal, Overloaded):
        OVERLOADS.add(str(refusal))
    if log.isEnabledFor(level):
        # Whoever debugs wants them all.
        if level in BUDGETS and not log.isEnabledFor(logging.DEBUG) and not BUDGETS[level].take():
            FAILURES.add(str(refusal))
            return refusal
        fields = {"error": bug, "model": refusal.model, "version": refusal.version or None}
        _log(level, str(refusal), call, refusal.status.name, refusal.request_id, **fields)
    return refusal


def log_answered(call: Call) -> None:
    """Log at debug level that a call was answered."""
    if log.isEnabledFor(logging.DEBUG):  # before the id is looked up
        _log(logging.DEBUG, "answered", call, "OK", call.find_id())


def _log(level: int, message: str, call: Call, code: str, request_id: str, **fields: Any) -> None:
    milliseconds = round((time.perf_counter_ns() - call.started) / 1e6, 3)
    fields = {"request_id": request_id, "method": call.name, "code": code, "milliseconds": milliseconds, **fields}
    if call.trace_id:
        fields["trace_id"] = call.trace_id
    log_fields(log, level, message, **fields)
