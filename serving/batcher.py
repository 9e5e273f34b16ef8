"""Continuous batching: each time the engine is free, whatever waits becomes the next batch.

There is no timer. Whoever finds the engine free leads: it takes the batch, runs it and hands the lead to the first of
the requests that came meanwhile. A request whose caller waits (`submit`) leads on the caller's thread: a lone one
changes no thread, and under load the running batch is the timer that fills the next one. A request that no thread waits
for (`post`) is led by one thread of the batcher's own, which is not there before the first of them.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from serving.engine import Images, Probabilities
from serving.errors import Cancelled, DeadlineExceeded, InternalError, Overloaded, ServingError, Unavailable

PRIORITIES, DEFAULT_PRIORITY = (1, 2, 3), 2  # 1 comes first

log = logging.getLogger(__name__)


class Answer(NamedTuple):
    """What became of one request's images.

    Attributes:
        probabilities: float32 [images, classes].
        queue_ns: Time from arrival to the start of the batch, in nanoseconds.
        compute_ns: Time to compute the batch, in nanoseconds.
        batch_size: Images in the batch, those of other requests included.
    """

    probabilities: Probabilities
    queue_ns: int
    compute_ns: int
    batch_size: int


Outcome = Answer | ServingError


class _Job:
    """One waiting request: `done` takes what becomes of it; `lead` has somebody lead, once it is the first in line."""

    __slots__ = ("alive", "arrived", "deadline", "done", "images", "lead")

    def __init__(
        self,
        images: Images,
        deadline: float,
        alive: Callable[[], bool],
        done: Callable[[Outcome], None],
        lead: Callable[[], object],
    ) -> None:
        self.images, self.deadline, self.alive, self.done, self.lead = images, deadline, alive, done, lead
        self.arrived = time.perf_counter_ns()

    def refusal(self) -> ServingError | None:
        """Say why there is no use in computing this job, if so."""
        if not self.alive():
            return Cancelled("the caller went away")
        if time.monotonic() > self.deadline:
            return DeadlineExceeded("the deadline passed while the request was waiting")
        return None


class Batcher:
    """Runs the requests of many threads through one engine, in batches: by priority, and then in order of arrival."""

    def __init__(self, run: Callable[[Images], Probabilities], max_batch: int = 32, max_queue: int = 1024) -> None:
        """Start empty.

        Args:
            run: Maps uint8 [n, height, width, 3] to float32 [n, classes]; called by one thread at a time.
            max_batch: Images up to which requests share a call of `run`; one that has more is computed alone.
            max_queue: Images that may wait; a request that would go beyond is refused at once.
        """
        self._run, self._max_batch, self._max_queue = run, max_batch, max_queue
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._queue: list[tuple[int, int, _Job]] = []  # a heap: by priority, then as they came
        self._numbers = itertools.count()
        self.queued = 0
        """Images that wait now."""
        self._led = False  # whether some thread leads
        self._closed = False
        self._ns_per_image = 0.0
        self._own = ThreadPoolExecutor(1, thread_name_prefix="lead")  # its thread ends with the batcher

    def submit(
        self,
        images: Images,
        deadline: float = float("inf"),
        alive: Callable[[], bool] = lambda: True,
        priority: int = DEFAULT_PRIORITY,
    ) -> Answer:
        """Compute the images of one request, and wait for it.

        Args:
            images: uint8 [n, height, width, 3], at least one.
            deadline: Time on `time.monotonic`'s clock, in seconds, after which the answer is of no use.
            alive: Says whether the caller still waits; asked once, just before the computation.
            priority: One of `PRIORITIES`: as long as others wait, a lower number goes before a higher one.

        Raises:
            Overloaded: The queue is full.
            Unavailable: The batcher was closed.
            DeadlineExceeded: The deadline passed while the request waited; nothing was computed.
            Cancelled: `alive` said no; nothing was computed.
            InternalError: The engine failed on the batch.
        """
        outcome: Outcome | None = None
        turn = threading.Lock()
        turn.acquire()

        def done(result: Outcome) -> None:
            nonlocal outcome
            outcome = result
            turn.release()

        self._enqueue(_Job(images, deadline, alive, done, lead=turn.release), priority)
        turn.acquire()
        while outcome is None:  # it is to lead; more than once, if others of a higher priority fill the batch
            self._lead()
            turn.acquire()
        if isinstance(outcome, Answer):
            return outcome
        raise outcome

    def post(
        self,
        images: Images,
        done: Callable[[Outcome], None],
        deadline: float = float("inf"),
        alive: Callable[[], bool] = lambda: True,
        priority: int = DEFAULT_PRIORITY,
    ) -> None:
        """Have the images of one request computed, and do not wait for it.

        Args:
            images: uint8 [n, height, width, 3], at least one.
            done: Takes the answer, or the error that `submit` would raise; called once, on another thread, which the
                next batch may need: it must be quick, and raise nothing.
            deadline: As in `submit`.
            alive: As in `submit`.
            priority: As in `submit`.

        Raises:
            Overloaded: The queue is full.
            Unavailable: The batcher was closed.
        """
        self._enqueue(_Job(images, deadline, alive, done, lead=self._lead_apart), priority)

    def close(self) -> None:
        """Refuse further requests; those that wait are still computed."""
        with self._lock:
            self._closed = True

    def drain(self, seconds: float) -> bool:
        """Wait until nothing is computed and nothing waits; return whether it came to that within `seconds`."""
        with self._lock:
            return self._idle.wait_for(lambda: not self._led, seconds)

    def _enqueue(self, job: _Job, priority: int) -> None:
        with self._lock:
            if self._closed:
                raise Unavailable("the server is shutting down")
            if self.queued + len(job.images) > self._max_queue:
                wait_ms = 1 + int(self.queued * self._ns_per_image / 1e6)
                raise Overloaded(
                    f"{self.queued} images are waiting, {len(job.images)} more would exceed the "
                    f"{self._max_queue} allowed",
                    retry_ms=wait_ms,
                )
            heapq.heappush(self._queue, (priority, next(self._numbers), job))
            self.queued += len(job.images)
            leads, self._led = not self._led, True
        if leads:
            job.lead()

    def _lead_apart(self) -> None:
        self._own.submit(self._lead)

    def _lead(self) -> None:
        """Compute one batch, then pass the lead on."""
        batch, refused = self._take()
        started = time.perf_counter_ns()
        try:
            probabilities = self._compute(batch)
        except Exception:
            log.exception("the engine failed on a batch of %d requests", len(batch))
            probabilities = None
        finished = time.perf_counter_ns()
        # The next batch starts before this one's answers are built: the engine is what there is least of.
        with self._lock:
            if batch:
                self._ns_per_image = (finished - started) / sum(len(job.images) for job in batch)
            first = self._queue[0][-1] if self._queue else None
            if first is None:
                self._led = False
                self._idle.notify_all()
        if first is not None:
            first.lead()
        for job, error in refused:
            job.done(error)
        size = sum(len(job.images) for job in batch)
        start = 0
        for job in batch:
            stop = start + len(job.images)
            if probabilities is None:
                job.done(InternalError("the engine failed; the server's log has the details"))
            else:
                job.done(Answer(probabilities[start:stop], started - job.arrived, finished - started, size))
            start = stop

    def _take(self) -> tuple[list[_Job], list[tuple[_Job, ServingError]]]:
        """Take whole requests from the queue, up to `max_batch` images, leaving out those nobody waits for."""
        batch: list[_Job] = []
        refused: list[tuple[_Job, ServingError]] = []
        size = 0
        with self._lock:
            while self._queue and (not batch or size + len(self._queue[0][-1].images) <= self._max_batch):
                _, _, job = heapq.heappop(self._queue)
                self.queued -= len(job.images)
                error = job.refusal()
                if error is not None:
                    refused.append((job, error))
                else:
                    batch.append(job)
                    size += len(job.images)
        return batch, refused

    def _compute(self, batch: list[_Job]) -> Probabilities | None:
        if not batch:
            return None
        images = batch[0].images if len(batch) == 1 else np.concatenate([job.images for job in batch])
        probabilities = self._run(images)
        if len(probabilities) != len(images):
            raise RuntimeError(f"the engine returned {len(probabilities)} rows for {len(images)} images")
        return probabilities
