"""From a request to its response, for every method that computes: parse, find the model, decode, enqueue, respond."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from google.protobuf.message import DecodeError

from serving.errors import Malformed, ServingError, Trailers
from serving.models.model import Model
from serving.models.registry import ModelRegistry
from serving.runtimes.base import Images
from serving.scheduling.queue import DEFAULT_PRIORITY, BatchResult, Outcome
from serving.threads import WorkerPool
from serving.transports.call import OVERLOADS, Call, log, log_answered, refuse

RequestT = TypeVar("RequestT")

TIMING = "server-timing"  # https://www.w3.org/TR/server-timing/
QUICK_BYTES = 2**20  # checking and rounding so many bytes of float32 takes about a millisecond


@dataclass(slots=True)
class ParsedRequest:
    """What a request asks of a model.

    Attributes:
        images: uint8 [n, height, width, channels].
        respond: Returns the serialized response, given the result and the time to decode the images in nanoseconds.
        timeout: Seconds that the caller waits, apart from the deadline of the call; 0 is no limit.
        priority: One of `serving.scheduling.queue.PRIORITIES`.
    """

    images: Images
    respond: Callable[[BatchResult, int], bytes]
    timeout: float = 0.0
    priority: int = DEFAULT_PRIORITY


class RequestReader(Protocol[RequestT]):
    """Reads the requests of a method that computes."""

    def parse(self, payload: bytes, /) -> RequestT:
        """Return the request; raises `DecodeError` if the bytes are not one."""
        ...

    def is_slow(self, request: RequestT, /) -> bool:
        """Return whether reading it may take milliseconds: its images are encoded, and not small."""
        ...

    def find(self, request: RequestT, call: Call, /) -> Model:
        """Return the model that the request of a call names."""
        ...

    def read(self, request: RequestT, model: Model, check: Callable[[], None], /) -> ParsedRequest:
        """Return what the request asks of the model; `check`, called between images, raises if nobody waits for it."""
        ...


class InferenceHandler(Generic[RequestT]):
    """Answers the calls of a method that computes, with the batcher of the model that each call names."""

    def __init__(self, reader: RequestReader[RequestT], models: ModelRegistry, workers: WorkerPool) -> None:
        """Answer from `models`; `reader` reads requests, and slow ones are read by `workers`."""
        self._reader, self._models, self._workers = reader, models, workers

    def answer(self, call: Call) -> None:
        """Take a call from the receiving thread."""
        try:
            # A request that an overloaded server refuses is not worth parsing.
            if (model := self._models.only) and (refusal := model.batcher.refusal(call.deadline)):
                _refuse_unread(call, model, refusal)
            elif len(call.payload) > QUICK_BYTES:
                self._workers.submit(self.begin, call, None, True)
            elif self._reader.is_slow(request := parse_message(self._reader.parse, call.payload)):
                self._workers.submit(self.begin, call, request, True)
            else:
                self.begin(call, request)
        except Exception as error:
            refuse(call, error)

    def begin(self, call: Call, request: RequestT | None = None, waited: bool = False) -> None:
        """Enqueue the images of a call; any error becomes its answer.

        Args:
            call: The call to answer.
            request: Its parsed payload; None parses it here.
            waited: Whether it waited for this thread: its caller may be gone, or it may be too late for an answer.
        """
        try:
            if request is None:
                request = parse_message(self._reader.parse, call.payload)
            model = self._reader.find(request, call)
        except Exception as error:
            refuse(call, error)
            return
        tracked = model.statistics.begin(call.span, call.find_id, call.is_split)
        try:
            if waited:
                call.check()
                model.batcher.check(call.deadline)
            parsed = self._reader.read(request, model, call.check)
            tracked.decoded(parsed.images)
            deadline = min(call.deadline, time.monotonic() + parsed.timeout) if parsed.timeout else call.deadline

            def finish(outcome: Outcome) -> None:
                try:
                    if not isinstance(outcome, BatchResult):
                        raise outcome
                    response = parsed.respond(outcome, tracked.decode_ns)
                    tracked.end(outcome)
                except Exception as error:
                    tracked.fail(error)
                    refuse(call, error)
                else:
                    log_answered(call)
                    call.respond(response, to_timing(outcome, tracked.decode_ns))

            model.batcher.enqueue(parsed.images, finish, deadline, call.is_active, parsed.priority)
        except Exception as error:
            tracked.fail(error)
            refuse(call, error)


def to_timing(result: BatchResult, decode_ns: int) -> Trailers:
    """Return the times of a request in milliseconds, as the HTTP header Server-Timing.

    All in one item: each item that differs from call to call costs a few microseconds.
    """
    decode, queue, compute = decode_ns / 1e6, result.queue_ns / 1e6, result.compute_ns / 1e6
    times = f"decode;dur={decode:.3f}, queue;dur={queue:.3f}, compute;dur={compute:.3f}"
    return ((TIMING, f"{times}, batch;desc={result.batch_size}"),)


def parse_message(parse: Callable[[bytes], RequestT], payload: bytes) -> RequestT:
    """Return the message in a payload.

    Raises:
        Malformed: The payload is not a message of this type.
    """
    try:
        return parse(payload)
    except DecodeError:
        raise Malformed("the request cannot be parsed: it is no message of this method's type") from None


def _refuse_unread(call: Call, model: Model, refusal: ServingError) -> None:
    """Refuse a call at the least expense: without a line in the log, and so without a request id."""
    if log.isEnabledFor(logging.DEBUG) or model.statistics.observers:
        own = copy.copy(refusal)
        model.statistics.begin(call.span, call.find_id).fail(own)
        refuse(call, own)
    else:
        model.statistics.count_refused(refusal)
        OVERLOADS.add(str(refusal))
        call.fail(refusal)
