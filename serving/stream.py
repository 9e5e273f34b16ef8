"""One call of `resnet.v1.Classifier.ClassifyStream`: requests in, answers out as they are ready.

A thread reads, so that several requests of a stream can be in one batch; the thread of the call answers. Neither
computes: a client that sends or reads slowly keeps nobody waiting but itself.
"""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue

import grpc

from protos import classifier_pb2 as pb
from serving.batcher import Answer, Batcher, Outcome
from serving.calls import find_deadline, report
from serving.engine import Images
from serving.errors import InvalidRequest, ServingError, Unavailable, to_failure

METHOD = "Classifier/ClassifyStream"
READ_AHEAD = 64  # requests that are read and not answered; the .proto tells clients

Work = Generator[tuple[Batcher, Images, int], Answer, pb.ClassifyResponse]
"""One request: yields what is to be computed and its priority, takes the answer, and returns the response."""


def finish(work: Work, outcome: Outcome) -> pb.ClassifyResponse:
    """Give the work its answer, or the error that took its place, and return the response.

    Raises:
        ServingError: The error.
    """
    try:
        if isinstance(outcome, Answer):
            work.send(outcome)
        else:
            work.throw(outcome)
    except StopIteration as end:
        response: pb.ClassifyResponse = end.value
        return response
    raise AssertionError("a request is computed once")


class Stream:
    """A stream while it is open."""

    def __init__(self, begin: Callable[[pb.ClassifyRequest], Work], context: grpc.ServicerContext) -> None:
        """Read nothing yet.

        Args:
            begin: Begins the work of one request.
            context: The call.
        """
        self._begin, self._context = begin, context
        self._deadline = find_deadline(context)
        self._room = threading.Semaphore(READ_AHEAD)
        # What makes the next answer; None says that no further request is read, or awaited.
        self._ready: SimpleQueue[Callable[[], pb.ClassifyStreamResponse] | None] = SimpleQueue()
        self._computing: set[int] = set()
        self._read = 0  # counted by the reader only
        self._closing = self._left = False

    def answer(self, requests: Iterator[pb.ClassifyStreamRequest]) -> Iterator[pb.ClassifyStreamResponse]:
        """Yield the answers, until the client has half-closed and has them all, or the server shuts down."""
        follow = partial(contextvars.copy_context().run, self._follow, requests)  # traces follow the context
        threading.Thread(target=follow, name="stream", daemon=True).start()
        answered, ending = 0, False
        try:
            while not (ending and answered == self._read):
                respond = self._ready.get()
                if respond is None:
                    ending = True
                else:
                    yield respond()
                    answered += 1
                    self._room.release()
        finally:
            self._left = True
            self._sweep()
        if self._closing:
            self._context.abort(Unavailable.code, "the server is shutting down")

    def close(self) -> None:
        """Answer what was read, then end the call as UNAVAILABLE."""
        self._closing = True
        self._ready.put(None)

    def _follow(self, requests: Iterator[pb.ClassifyStreamRequest]) -> None:
        """Read the requests, as far ahead as is allowed."""
        try:
            while self._room.acquire() and (item := next(requests, None)) is not None:
                self._read += 1
                self._submit(item.id, item.request)
        except grpc.RpcError:
            pass  # the client cancelled, or is gone
        finally:
            self._ready.put(None)

    def _submit(self, identity: int, request: pb.ClassifyRequest) -> None:
        started = time.perf_counter_ns()
        try:
            if identity in self._computing:
                raise InvalidRequest(f"id {identity} is that of a request without an answer; choose another")
            work = self._begin(request)
            batcher, images, priority = next(work)
        except Exception as error:
            self._put(partial(self._refuse, identity, error, started))
            return

        def done(outcome: Outcome) -> None:
            self._put(partial(self._respond, identity, work, outcome, started))

        self._computing.add(identity)
        try:
            batcher.post(images, done, self._deadline, self._context.is_active, priority)
        except ServingError as error:
            done(error)

    def _respond(self, identity: int, work: Work, outcome: Outcome, started: int) -> pb.ClassifyStreamResponse:
        self._computing.discard(identity)
        try:
            return pb.ClassifyStreamResponse(id=identity, response=finish(work, outcome))
        except Exception as error:
            return self._refuse(identity, error, started)

    def _refuse(self, identity: int, error: Exception, started: int) -> pb.ClassifyStreamResponse:
        refusal = report(error, METHOD, self._context, started)
        return pb.ClassifyStreamResponse(id=identity, failure=to_failure(refusal))

    def _put(self, respond: Callable[[], pb.ClassifyStreamResponse]) -> None:
        self._ready.put(respond)
        if self._left:
            self._sweep()

    def _sweep(self) -> None:
        """End the work that nobody waits for any longer, so that the statistics count it, and the reader ends too."""
        self._room.release()
        with suppress(Empty):
            while True:
                if respond := self._ready.get_nowait():
                    respond()
