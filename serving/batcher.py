"""Continuous batching: each time the engine is free, whatever waits becomes the next batch.

There is no timer, unless one is asked for. A thread leads as long as there is work: it takes a batch, computes it, and
takes the next. It answers a batch by itself when nothing waits, so that a lone request changes threads once; else
another thread answers while the engine goes on, because the engine is what there is least of.

What is let in is decided by what it costs. The queue is bounded in images and in milliseconds of work, and a request
that could not be answered in time is refused at once.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from serving.batching import Batching
from serving.cost import CostCurve
from serving.engine import Images, Probabilities
from serving.errors import Cancelled, DeadlineExceeded, InternalError, Overloaded, ServingError, Unavailable
from serving.goal import Goal

PRIORITIES, DEFAULT_PRIORITY = (1, 2, 3), 2  # 1 comes first

# What is expected to take all the time that is left is late half of the time, and was computed for nothing.
HURRY = 1.2

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
    """One waiting request: `done` takes what becomes of it."""

    __slots__ = ("alive", "arrived", "deadline", "done", "images")

    def __init__(
        self, images: Images, deadline: float, alive: Callable[[], bool], done: Callable[[Outcome], None]
    ) -> None:
        self.images, self.deadline, self.alive, self.done = images, deadline, alive, done
        self.arrived = time.perf_counter_ns()

    def refusal(self) -> ServingError | None:
        """Say why there is no use in computing this job, if so."""
        if not self.alive():
            return Cancelled("the caller went away")
        if time.monotonic() > self.deadline:
            return DeadlineExceeded("the deadline passed while the request was waiting")
        return None


class Queue(ABC):
    """Takes requests that are to be computed, in this process or by another.

    Attributes:
        queued: Images that wait now.
        curve: What batches cost, as far as it is known here.
    """

    queued: int
    curve: CostCurve

    def submit(
        self,
        images: Images,
        deadline: float = float("inf"),
        alive: Callable[[], bool] = lambda: True,
        priority: int = DEFAULT_PRIORITY,
    ) -> Answer:
        """Have the images of one request computed, and wait for it.

        Args:
            images: uint8 [n, height, width, 3], at least one.
            deadline: Time on `time.monotonic`'s clock, in seconds, after which the answer is of no use.
            alive: Says whether the caller still waits; asked once, just before the computation.
            priority: One of `PRIORITIES`: as long as others wait, a lower number goes before a higher one.

        Raises:
            Overloaded: The queue is full, or too long for the deadline or the latency that is the goal.
            Unavailable: The batcher was closed.
            DeadlineExceeded: The deadline is too near for the computation alone, or passed while the request waited;
                nothing was computed.
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

        self.post(images, done, deadline, alive, priority)
        turn.acquire()
        if isinstance(outcome, Answer):
            return outcome
        assert outcome is not None
        raise outcome

    @abstractmethod
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
            Overloaded: As in `submit`.
            Unavailable: The batcher was closed.
            DeadlineExceeded: The deadline is too near for the computation alone.
        """

    @abstractmethod
    def close(self) -> None:
        """Refuse further requests; those that wait are still computed."""

    @abstractmethod
    def drain(self, seconds: float) -> bool:
        """Wait until nothing is computed and nothing waits; return whether it came to that within `seconds`."""


class Batcher(Queue):
    """Runs the requests of many callers through one engine, in batches: by priority, and then in order of arrival."""

    def __init__(
        self,
        run: Callable[[Images], Probabilities],
        batching: Batching = Batching(),
        curve: CostCurve | None = None,
        lanes: int = 1,
        spare: int = 0,
    ) -> None:
        """Start empty.

        Args:
            run: Maps uint8 [n, height, width, 3] to float32 [n, classes].
            batching: How to work. A request with more images than a batch is computed alone.
            curve: What a batch costs, as far as it is known; every batch adds to it.
            lanes: Calls of `run` that may be under way at a time, each on a thread of its own.
            spare: Further calls, which begin only while a full batch waits: calls that share cores with the others, so
                that two small batches would take longer than one.
        """
        self._run, self._lanes, self._spare, self._max_queue = run, lanes, spare, batching.max_queue
        self._max_queue_ns, self._linger_ns = batching.max_queue_ms * 1e6, batching.linger_ms * 1e6
        self.curve = curve or CostCurve()
        self._max_batch = self.curve.best(batching.max_batch)
        self._goal = Goal(batching.target_p99_ms, self.curve) if batching.target_p99_ms else None
        self._lock = threading.Lock()
        self._idle, self._came = threading.Condition(self._lock), threading.Condition(self._lock)
        self._queue: list[tuple[int, int, _Job]] = []  # a heap: by priority, then as they came
        self._numbers = itertools.count()
        self.queued = 0
        self._leads = 0
        self._running = 0  # batches
        self._answering = 0  # batches
        self._free_ns = 0  # when the batches under way will be done, on the clock of arrivals
        self._closed = False
        # Threads of these end with the batcher.
        self._leaders = ThreadPoolExecutor(lanes + spare, thread_name_prefix="lead")
        self._answerer = ThreadPoolExecutor(1, thread_name_prefix="answer")

    def post(
        self,
        images: Images,
        done: Callable[[Outcome], None],
        deadline: float = float("inf"),
        alive: Callable[[], bool] = lambda: True,
        priority: int = DEFAULT_PRIORITY,
    ) -> None:
        """Have the images of one request computed, and do not wait for it; see `Queue.post`."""
        job = _Job(images, deadline, alive, done)
        with self._lock:
            self._admit(job)
            heapq.heappush(self._queue, (priority, next(self._numbers), job))
            self.queued += len(images)
            leads = self._leads < self._lanes + (self._spare if self.queued >= self._max_batch else 0)
            self._leads += leads
            if self._linger_ns:
                self._came.notify_all()
        if leads:
            self._leaders.submit(self._lead)

    def close(self) -> None:
        """Refuse further requests; those that wait are still computed."""
        with self._lock:
            self._closed = True
            self._came.notify_all()  # nobody is to be waited for

    def drain(self, seconds: float) -> bool:
        """Wait until nothing is computed and nothing waits; return whether it came to that within `seconds`."""
        with self._lock:
            return self._idle.wait_for(lambda: not self._leads and not self._answering, seconds)

    def _admit(self, job: _Job) -> None:
        """Raise what keeps a request out, if anything does."""
        if self._closed:
            raise Unavailable("the server is shutting down")
        images = len(job.images)
        fits = self.queued + images <= self._max_queue
        if fits and not self._leads:
            return  # an idle engine turns nothing down: what a batch really takes, only a batch can tell
        wait_ns = self._wait_ns(job.arrived)
        retry_ms = 1 + int(wait_ns / 1e6)
        if not fits:
            raise Overloaded(
                f"{self.queued} images are waiting, {images} more would exceed the {self._max_queue} allowed", retry_ms
            )
        if wait_ns > self._max_queue_ns:
            allowed = f"{self._max_queue_ns / 1e6:g} ms"
            raise Overloaded(f"{wait_ns / 1e6:.0f} ms of work are waiting, more than the {allowed} allowed", retry_ms)
        own_ns = self.curve.ns(images)
        takes_ns = wait_ns + own_ns
        if self._goal and takes_ns > self._goal.allowed_ns:
            raise Overloaded(f"the answer would take {takes_ns / 1e6:.0f} ms, too long for the server's goal", retry_ms)
        if job.deadline == float("inf"):
            return
        left_ns = (job.deadline - time.monotonic()) * 1e9
        if own_ns > left_ns:
            raise DeadlineExceeded(f"to compute takes {own_ns / 1e6:.0f} ms, {max(0, left_ns) / 1e6:.0f} ms are left")
        if HURRY * takes_ns > left_ns:
            raise Overloaded(
                f"the answer would take {takes_ns / 1e6:.0f} ms, {left_ns / 1e6:.0f} ms are left", retry_ms
            )

    def _wait_ns(self, now: int) -> float:
        """Return how long what is there already will keep the engine."""
        full, rest = divmod(self.queued, self._max_batch)
        waiting = full * self.curve.ns(self._max_batch) + (self.curve.ns(rest) if rest else 0)
        return (waiting + max(0, self._free_ns - now)) / self._lanes

    def _lead(self) -> None:
        """Compute batches as long as there are requests."""
        while True:
            batch, refused = self._take()
            if not batch and not refused:
                return
            started = time.perf_counter_ns()
            probabilities = self._compute(batch)
            took = time.perf_counter_ns() - started
            with self._lock:
                if batch and probabilities is not None:
                    crowd = max(1.0, self._running / self._lanes)  # so many share the cores
                    self.curve.learn(len(probabilities), took / crowd)
                self._running -= bool(batch)
                others = bool(self._queue or self._answering)  # also keeps the order of answers
                self._answering += 1
            answer = (batch, refused, probabilities, started, took)
            if others:
                self._answerer.submit(self._answer, *answer)
            else:
                self._answer(*answer)

    def _take(self) -> tuple[list[_Job], list[tuple[_Job, ServingError]]]:
        """Take whole requests from the queue, up to a batch, leaving out those nobody waits for; give up the lead if
        there are none.
        """
        batch: list[_Job] = []
        refused: list[tuple[_Job, ServingError]] = []
        size = 0
        with self._lock:
            if self._running >= self._lanes and self.queued < self._max_batch:
                self._leads -= 1  # another leads, and will take what there is
                self._idle.notify_all()
                return [], []
            limit = min(self._max_batch, self._goal.batch) if self._goal else self._max_batch
            if self._linger_ns:
                self._linger(limit)
            while self._queue and (not batch or size + len(self._queue[0][-1].images) <= limit):
                _, _, job = heapq.heappop(self._queue)
                self.queued -= len(job.images)
                error = job.refusal()
                if error is not None:
                    refused.append((job, error))
                else:
                    batch.append(job)
                    size += len(job.images)
            if batch:
                now = time.perf_counter_ns()
                # As if batches that share the cores were computed one after the other.
                begins = max(now, self._free_ns) if self._running else now
                self._free_ns = begins + int(self.curve.ns(size))
                self._running += 1
            elif not refused:
                self._leads -= 1
                self._idle.notify_all()
        return batch, refused

    def _linger(self, limit: int) -> None:
        """Wait for a full batch, as long as the first of those that wait may be kept waiting; the lock is held."""
        while self._queue and self.queued < limit and not self._closed:
            left = self._linger_ns - (time.perf_counter_ns() - min(job.arrived for _, _, job in self._queue))
            if left <= 0:
                return
            self._came.wait(left / 1e9)

    def _compute(self, batch: list[_Job]) -> Probabilities | None:
        """Return the probabilities of a batch; None if there are none because the engine failed."""
        if not batch:
            return None
        try:
            images = batch[0].images if len(batch) == 1 else np.concatenate([job.images for job in batch])
            probabilities = self._run(images)
            if len(probabilities) != len(images):
                raise RuntimeError(f"the engine returned {len(probabilities)} rows for {len(images)} images")
        except Exception:
            log.exception("the engine failed on a batch of %d requests", len(batch))
            return None
        return probabilities

    def _answer(
        self,
        batch: list[_Job],
        refused: list[tuple[_Job, ServingError]],
        probabilities: Probabilities | None,
        started: int,
        took: int,
    ) -> None:
        """Tell those whose requests were taken what became of them."""
        for job, error in refused:
            job.done(error)
        size = sum(len(job.images) for job in batch)
        start = 0
        for job in batch:
            stop = start + len(job.images)
            if probabilities is None:
                job.done(InternalError("the engine failed; the server's log has the details"))
            else:
                job.done(Answer(probabilities[start:stop], started - job.arrived, took, size))
                if self._goal:
                    self._goal.learn(started - job.arrived + took)
            start = stop
        with self._lock:
            self._answering -= 1
            self._idle.notify_all()
