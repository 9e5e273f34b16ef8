"""One call of `resnet.v1.Classifier.ClassifyStream`: requests in, answers out as they are ready.

A thread reads, so that several requests of a stream can be in one batch; the thread of the call answers. Neither
computes: a client that sends or reads slowly keeps nobody waiting but itself.
"""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue

import grpc

from protos import classifier_pb2 as pb
from serving.batcher import Outcome
from serving.calls import Work, find_deadline, finish, report
from serving.errors import InvalidRequest, ServingError, Unavailable, to_failure

METHOD = "Classifier/ClassifyStream"
READ_AHEAD = 64  # requests that are read and not answered; the .proto tells clients


class Stream:
    """A stream while it is open."""

    def __init__(
        self, begin: Callable[[pb.ClassifyRequest, float], Work[pb.ClassifyResponse]], context: grpc.ServicerContext
    ) -> None:
        """Read nothing yet.

        Args:
            begin: Begins the work of one request, which has a deadline, in seconds of `time.monotonic`.
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
            work = self._begin(request, self._deadline)
            job = next(work)
        except Exception as error:
            self._put(partial(self._refuse, identity, error, started))
            return

        def done(outcome: Outcome) -> None:
            self._put(partial(self._respond, identity, work, outcome, started))

        self._computing.add(identity)
        try:
            job.batcher.post(job.images, done, job.deadline, self._context.is_active, job.priority)
        except ServingError as error:
            done(error)

    def _respond(
        self, identity: int, work: Work[pb.ClassifyResponse], outcome: Outcome, started: int
    ) -> pb.ClassifyStreamResponse:
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
