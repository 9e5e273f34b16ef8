"""How a call is answered, whatever protocol it speaks and whatever it came by, and how a failure is told."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from google.protobuf.message import DecodeError, Message

from serving.errors import Cancelled, InternalError, Malformed, Overloaded, ServingError, Trailers
from serving.logs import Tally, log_fields
from serving.models.model import Model
from serving.models.registry import ModelRegistry
from serving.runtimes.base import Images
from serving.scheduling.queue import DEFAULT_PRIORITY, BatchResult, Outcome
from serving.transports.call import Call, Unary

RequestT = TypeVar("RequestT")

TIMING = "server-timing"  # https://www.w3.org/TR/server-timing/
QUICK_BYTES = 2**20  # to check and round so many bytes of float32 takes about a millisecond

log = logging.getLogger(__name__)

OVERLOADS = Tally(log, "overloaded: refused %d more requests, the last because %s", seconds=10)


@dataclass(slots=True)
class Query:
    """What a request asks a model to compute.

    Attributes:
        images: uint8 [n, height, width, 3].
        respond: Makes the response, serialized, of the answer and the time that unpacking took, in nanoseconds.
        timeout: How long its caller waits at most, in seconds, whatever the deadline of the call; 0 is for ever.
        priority: One of `serving.scheduling.queue.PRIORITIES`.
    """

    images: Images
    respond: Callable[[BatchResult, int], bytes]
    timeout: float = 0.0
    priority: int = DEFAULT_PRIORITY


class RequestReader(Protocol[RequestT]):
    """Reads the requests of a method that computes: bytes, images and answers, as its protocol has them."""

    def parse(self, payload: bytes, /) -> RequestT:
        """Return the request that these bytes are; raises `DecodeError` if they are none."""
        ...

    def unpacks(self, request: RequestT, /) -> bool:
        """Say whether it holds encoded images, which take long to unpack."""
        ...

    def find(self, request: RequestT, /) -> Model:
        """Return the model that it names."""
        ...

    def read(self, request: RequestT, model: Model, /) -> Query:
        """Return what it asks the model."""
        ...


class InferenceHandler(Generic[RequestT]):
    """Answers the calls of a method that computes: by the batcher of the model that each names."""

    def __init__(self, reader: RequestReader[RequestT], models: ModelRegistry, workers: ThreadPoolExecutor) -> None:
        """Read requests for `models` by `reader`; what takes long to read is left to `workers`."""
        self._reader, self._models, self._workers = reader, models, workers

    def answer(self, call: Call) -> None:
        """Begin a call on a thread that has to be quick."""
        try:
            # What an overloaded server refuses, it should not have read.
            if (model := self._models.only) and (refusal := model.batcher.refusal(call.deadline)):
                _turn_away(call, model, refusal)
            elif len(call.payload) > QUICK_BYTES:
                self._workers.submit(self.begin, call)
            elif self._reader.unpacks(request := parse_message(self._reader.parse, call.payload)):
                self._workers.submit(self.begin, call, request)
            else:
                self.begin(call, request)
        except Exception as error:
            refuse(call, error)

    def begin(self, call: Call, request: RequestT | None = None) -> None:
        """Leave what a call asks for with the batcher; whatever goes wrong is its answer.

        Args:
            call: To be answered.
            request: What its payload is, if that is known already.
        """
        try:
            if request is None:
                request = parse_message(self._reader.parse, call.payload)
            model = self._reader.find(request)
        except Exception as error:
            refuse(call, error)
            return
        record = model.statistics.begin(call.span)
        try:
            query = self._reader.read(request, model)
            record.decoded()
            deadline = min(call.deadline, time.monotonic() + query.timeout) if query.timeout else call.deadline

            def done(outcome: Outcome) -> None:
                try:
                    if not isinstance(outcome, BatchResult):
                        raise outcome
                    response = query.respond(outcome, record.decode_ns)
                    record.end(outcome)
                except Exception as error:
                    record.fail(error)
                    refuse(call, error)
                else:
                    log_answered(call)
                    call.respond(response, to_timing(outcome))

            model.batcher.enqueue(query.images, done, deadline, call.is_wanted, query.priority)
        except Exception as error:
            record.fail(error)
            refuse(call, error)


def to_timing(answer: BatchResult) -> Trailers:
    """Return where the time of an answer went, in milliseconds, as the header of HTTP that tells it.

    One item, because each that differs from call to call costs a few microseconds.
    """
    queue, compute = answer.queue_ns / 1e6, answer.compute_ns / 1e6
    return ((TIMING, f"queue;dur={queue:.3f}, compute;dur={compute:.3f}, batch;desc={answer.batch_size}"),)


def reply(
    function: Callable[[Any], Message],
    request_type: type[Message],
    workers: ThreadPoolExecutor | None = None,
    limited: bool = True,
) -> Unary:
    """Return a method that maps one message to another.

    Args:
        function: Does it; raises a `ServingError`.
        request_type: What it takes.
        workers: Where it does so; None is on the thread that all calls come through, for what takes microseconds.
        limited: As in `Unary`.
    """

    def answer(call: Call) -> None:
        try:
            response = function(parse_message(request_type.FromString, call.payload)).SerializeToString()
        except Exception as error:
            refuse(call, error)
        else:
            log_answered(call)
            call.respond(response)

    def hand_over(call: Call) -> None:
        assert workers is not None
        workers.submit(answer, call)

    return Unary(hand_over if workers else answer, limited)


def _turn_away(call: Call, model: Model, refusal: ServingError) -> None:
    """Refuse a call that nothing was done for, at the least expense: it has no id, as the log has no line for it."""
    if log.isEnabledFor(logging.DEBUG) or model.statistics.observer:
        own = copy.copy(refusal)
        model.statistics.begin(call.span).fail(own)
        refuse(call, own)
    else:
        model.statistics.count_refused(refusal)
        OVERLOADS.add(str(refusal))
        call.fail(refusal)


def refuse(call: Call, error: Exception) -> None:
    """Answer a call with an error, and log it; what is no `ServingError` is a bug, whose traceback is for the log."""
    call.fail(report(call, error))


def report(call: Call, error: Exception) -> ServingError:
    """Log why a request failed, and return what its caller may be told, with an id to quote."""
    if isinstance(error, ServingError):
        refusal, bug = error, None
    else:
        refusal, bug = InternalError("the server failed on this request; its log has the details"), error
    refusal.request_id = call.find_id()
    level = logging.ERROR if isinstance(refusal, InternalError) else logging.INFO
    if isinstance(refusal, Overloaded | Malformed | Cancelled):
        level = logging.DEBUG  # a line for each would be one more load
    if isinstance(refusal, Overloaded):
        OVERLOADS.add(str(refusal))
    if log.isEnabledFor(level):
        known = {"error": bug, "model": refusal.model, "version": refusal.version or None}
        _log(level, str(refusal), call, refusal.status.name, refusal.request_id, **known)
    return refusal


def log_answered(call: Call) -> None:
    """Log that a request was answered, where that is of interest."""
    if log.isEnabledFor(logging.DEBUG):  # before anything is looked up
        _log(logging.DEBUG, "answered", call, "OK", call.find_id())


def parse_message(parse: Callable[[bytes], RequestT], payload: bytes) -> RequestT:
    """Return the message that a payload is.

    Raises:
        Malformed: It is none.
    """
    try:
        return parse(payload)
    except DecodeError:
        raise Malformed("the request cannot be parsed: it is no message of this method's type") from None


def _log(level: int, message: str, call: Call, code: str, request_id: str, **known: Any) -> None:
    milliseconds = round((time.perf_counter_ns() - call.started) / 1e6, 3)
    fields = {"request_id": request_id, "method": call.name, "code": code, "milliseconds": milliseconds, **known}
    if call.trace_id:
        fields["trace_id"] = call.trace_id
    log_fields(log, level, message, **fields)
