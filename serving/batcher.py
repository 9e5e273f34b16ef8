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
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from serving.batching import Batching
from serving.cost import CostCurve
from serving.engine import Images, Probabilities
from serving.errors import Cancelled, DeadlineExceeded, InternalError, Overloaded, ServingError, Unavailable
from serving.goal import Goal

PRIORITIES, DEFAULT_PRIORITY = (1, 2, 3), 2  # 1 comes first

# What is expected to take all the time that is left is late half of the time, and was computed for nothing. Under five
# times the load that a server bears, 2 % of the answers took longer than this times what was expected.
HURRY = 1.35

# Of a request: smaller ones take the interpreter longer than the copy does, and there is only one interpreter. Single
# images of 3 KB, put together ahead, cost a server on a GPU a tenth of its requests.
LARGE_BYTES = 2**15

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

    def tell(self, outcome: Outcome) -> None:
        """Hand the outcome over; who fails to take it harms no other request, nor the thread that leads."""
        try:
            self.done(outcome)
        except Exception:
            log.exception("an answer was lost")

    def refusal(self) -> ServingError | None:
        """Say why there is no use in computing this job, if so."""
        if not self.alive():
            return Cancelled("the caller went away")
        if time.monotonic() > self.deadline:
            return DeadlineExceeded("the deadline passed while the request was waiting")
        return None


_Entry = tuple[int, int, _Job]
"""One of the heap of those that wait: its priority, its number in the order of arrival, and the request."""


@dataclass(eq=False)
class _Batch:
    """What was taken from the queue at once.

    Attributes:
        jobs: What is computed.
        refused: What is not, and why.
        size: Images to compute.
        entries: What was taken from the queue, for the one and the other.
        gathered: The images put together, if that was begun ahead.
        expected_ns: What computing them is expected to take while nothing else shares the cores.
        began: When that began, on the clock of `time.perf_counter_ns`.
        spare: Whether others were under way, on every lane: it is computed by a part of the cores.
    """

    jobs: list[_Job] = field(default_factory=list)
    refused: list[tuple[_Job, ServingError]] = field(default_factory=list)
    size: int = 0
    entries: list[_Entry] = field(default_factory=list)
    gathered: Future[Images] | None = None
    expected_ns: float = 0.0
    began: int = 0
    spare: bool = False

    @property
    def taken(self) -> int:
        """Images that were taken from the queue."""
        return sum(len(job.images) for _, _, job in self.entries)


Gather = Callable[[Sequence[Images]], Images]
"""Puts the images of several requests together."""


class Leaders(Protocol):
    """Threads for those who form batches and have them computed."""

    ahead: bool
    """Whether the next batch is put together while one is computed, if enough waits to fill it; for one lane only."""

    def submit(self, work: Callable[[], object], /) -> object:
        """Begin it on one of them, or as soon as one is free."""
        ...

    def gatherer(self) -> Gather:
        """Return, on such a thread, what puts batches for it together, on any: each overwrites the last but one."""
        ...


class _Pool(ThreadPoolExecutor):
    """Threads of no special kind."""

    ahead = False

    def gatherer(self) -> Gather:
        return np.concatenate


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
        leaders: Leaders | None = None,
    ) -> None:
        """Start empty.

        Args:
            run: Maps uint8 [n, height, width, 3] to float32 [n, classes].
            batching: How to work. A request with more images than a batch is computed alone.
            curve: What a batch costs, as far as it is known; every batch adds to it.
            lanes: Calls of `run` that may be under way at a time, each on a thread of its own.
            spare: Further calls, which begin only while a full batch waits: calls that share cores with the others, so
                that two small batches would take longer than one.
            leaders: Threads for the calls of `run`, where not every thread will do: as many as there are lanes.
        """
        self._run, self._lanes, self._spare, self._max_queue = run, lanes, spare, batching.max_queue
        self._max_queue_ns, self._linger_ns = batching.max_queue_ms * 1e6, batching.linger_ms * 1e6
        self.curve = curve or CostCurve()
        self._max_batch = self.curve.best(batching.max_batch)
        self._goal = Goal(batching.target_p99_ms, self.curve) if batching.target_p99_ms else None
        self._lock = threading.Lock()
        self._idle, self._came = threading.Condition(self._lock), threading.Condition(self._lock)
        self._queue: list[_Entry] = []  # a heap: by priority, then as they came
        self._numbers = itertools.count()
        self.queued = 0  # images that wait, among them those that are taken ahead
        self._leads = 0
        self._running: list[_Batch] = []
        self._answering = 0  # batches
        self._closed = False
        # Threads of these end with the batcher.
        self._leaders: Leaders = leaders or _Pool(lanes + spare, thread_name_prefix="lead")
        self._answerer = ThreadPoolExecutor(1, thread_name_prefix="answer")
        self._gatherer = ThreadPoolExecutor(1, thread_name_prefix="gather")

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
            leads = self._leads < self._lanes or (self._spares() and self._leads < self._lanes + self._spare)
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
        wait_ns = self._wait_ns(self.queued, job.arrived)
        retry_ms = 1 + int(wait_ns / 1e6)
        if not fits:
            raise Overloaded(
                f"{self.queued} images are waiting, {images} more would exceed the {self._max_queue} allowed", retry_ms
            )
        if wait_ns > self._max_queue_ns:
            allowed = f"{self._max_queue_ns / 1e6:g} ms"
            raise Overloaded(f"{wait_ns / 1e6:.0f} ms of work are waiting, more than the {allowed} allowed", retry_ms)
        if not self._goal and job.deadline == float("inf"):
            return
        takes_ns = self._takes_ns(images, job.arrived)
        if self._goal and takes_ns > self._goal.allowed_ns:
            raise Overloaded(f"the answer would take {takes_ns / 1e6:.0f} ms, too long for the server's goal", retry_ms)
        if job.deadline == float("inf"):
            return
        left_ns, own_ns = (job.deadline - time.monotonic()) * 1e9, self.curve.ns(images)
        if own_ns > left_ns:
            raise DeadlineExceeded(f"to compute takes {own_ns / 1e6:.0f} ms, {max(0, left_ns) / 1e6:.0f} ms are left")
        if HURRY * takes_ns > left_ns:
            raise Overloaded(
                f"the answer would take {takes_ns / 1e6:.0f} ms, {left_ns / 1e6:.0f} ms are left", retry_ms
            )

    def _wait_ns(self, images: int, now: int) -> float:
        """Return when the engine will have begun with so many of the images that wait, in nanoseconds from now."""
        full, rest = divmod(images, limit := self._limit())
        waiting = full * self.curve.ns(limit) + (self.curve.ns(rest) if rest else 0)
        return waiting / self._lanes + self._free_ns(now)

    def _free_ns(self, now: int) -> float:
        """Return when the next of the batches under way will make room for another, in nanoseconds from now."""
        if len(self._running) < self._lanes:
            return 0.0
        crowd = len(self._running) / self._lanes
        return max(0.0, min(batch.began + crowd * batch.expected_ns for batch in self._running) - now)

    def _takes_ns(self, images: int, now: int) -> float:
        """Return how long the answer to so many further images will take.

        Their batch begins after all that waits before it. Those that come later fill it up, and batches share the cores
        with those of spare lanes: nobody's answer is there before the whole batch is.
        """
        batch = max(images, min(self.queued + images, self._limit()))
        crowd = 1 + (self._spare / self._lanes if self._spares() else 0)
        return self._wait_ns(self.queued + images - batch, now) + crowd * self.curve.ns(batch)

    def _lead(self) -> None:
        """Compute batches as long as there are requests."""
        gather = self._leaders.gatherer()
        ahead: _Batch | None = None
        while batch := self._begin(ahead):
            # In this order: what is put together ahead takes the place of the batch before this one.
            images = self._assemble(batch, gather)
            ahead = self._look_ahead(gather)
            probabilities = self._compute(batch, images)
            took = time.perf_counter_ns() - batch.began
            with self._lock:
                if batch.jobs:
                    if probabilities is not None:
                        self.curve.learn(batch.size, took / self._crowd())
                    self._running.remove(batch)
                others = bool(self._queue or self._answering or ahead)  # also keeps the order of answers
                self._answering += 1
            if others:
                self._answerer.submit(self._answer, batch, probabilities, took)
            else:
                self._answer(batch, probabilities, took)
            if batch.jobs and probabilities is None:
                if ahead:
                    with self._lock:
                        self._put_back(ahead)
                self._leaders.submit(self._lead)  # to another thread, and perhaps to one that fares better
                return

    def _begin(self, batch: _Batch | None) -> _Batch | None:
        """Return what is computed now: a batch that was taken, or what waits; give up the lead if there is nothing."""
        with self._lock:
            if batch and self._is_stale(batch):
                self._put_back(batch)
                batch = None
            if batch is None:
                if len(self._running) >= self._lanes and not self._spares():
                    self._rest()  # another leads, and will take what there is
                    return None
                limit = self._limit()
                if self._linger_ns:
                    self._linger(limit)
                batch = self._take(limit)
                if not batch.entries:
                    self._rest()
                    return None
            self.queued -= batch.taken
            if batch.jobs:
                batch.spare = len(self._running) >= self._lanes
                batch.expected_ns, batch.began = self.curve.ns(batch.size), time.perf_counter_ns()
                self._running.append(batch)
        return batch

    def _look_ahead(self, gather: Gather) -> _Batch | None:
        """Take the next batch already, and begin to put it together, if it will be a full one of large requests."""
        if not self._leaders.ahead:
            return None
        with self._lock:
            limit = self._limit()
            if self.queued < limit or self._queue[0][-1].images.nbytes < LARGE_BYTES:
                return None
            batch = self._take(limit)
        if batch.jobs:
            with suppress(RuntimeError):  # no further thread is to be had; then it is put together when it begins
                batch.gathered = self._gatherer.submit(gather, [job.images for job in batch.jobs])
        return batch

    def _take(self, limit: int) -> _Batch:
        """Take whole requests from the queue, up to a batch, and those that nobody waits for; the lock is held."""
        batch, soonest = _Batch(), float("inf")
        while self._queue:
            job = self._queue[0][-1]
            error = job.refusal()
            if error is None:
                size, soonest = batch.size + len(job.images), min(soonest, job.deadline)
                if batch.jobs and (size > limit or self._misses(size, soonest)):
                    break
                batch.jobs.append(job)
                batch.size = size
            else:
                batch.refused.append((job, error))
            batch.entries.append(heapq.heappop(self._queue))
        return batch

    def _is_stale(self, batch: _Batch) -> bool:
        """Say whether another would be taken now: somebody has left, or somebody came who goes first."""
        overtaken = self._queue and self._queue[0] < batch.entries[-1]
        return bool(overtaken) or any(job.refusal() for job in batch.jobs)

    def _put_back(self, batch: _Batch) -> None:
        """Have those who were taken ahead wait as before; the lock is held."""
        if batch.gathered:
            wait([batch.gathered])  # it could overwrite what is put together next
        for entry in batch.entries:
            heapq.heappush(self._queue, entry)

    def _spares(self) -> bool:
        """Say whether spare lanes may begin: for a full batch, or where cores would idle beside a batch that has but a
        part of them.
        """
        if not self._spare:
            return False
        return self.queued >= self._limit() or any(batch.spare for batch in self._running)

    def _limit(self) -> int:
        """Return how many images may share a batch."""
        return min(self._max_batch, self._goal.batch) if self._goal else self._max_batch

    def _rest(self) -> None:
        """Give up the lead; the lock is held."""
        self._leads -= 1
        self._idle.notify_all()

    def _crowd(self) -> float:
        """Return how many batches share the cores that are meant for one."""
        return max(1.0, len(self._running) / self._lanes)

    def _misses(self, images: int, deadline: float) -> bool:
        """Say whether a batch that begins now will be done too late for a deadline."""
        if deadline == float("inf"):
            return False
        crowd = max(1.0, (len(self._running) + 1) / self._lanes)
        return time.monotonic() + crowd * self.curve.ns(images) / 1e9 > deadline

    def _linger(self, limit: int) -> None:
        """Wait for a full batch, as long as the first of those that wait may be kept waiting; the lock is held."""
        while self._queue and self.queued < limit and not self._closed:
            left = self._linger_ns - (time.perf_counter_ns() - min(job.arrived for _, _, job in self._queue))
            if left <= 0:
                return
            self._came.wait(left / 1e9)

    def _assemble(self, batch: _Batch, gather: Gather) -> Images | None:
        """Return the images of a batch; None if there are none, or they cannot be put together."""
        parts = [job.images for job in batch.jobs]
        try:
            if batch.gathered:
                return batch.gathered.result()
            return gather(parts) if len(parts) > 1 else parts[0] if parts else None
        except Exception:
            log.exception("a batch of %d requests cannot be put together", len(parts))
            return None

    def _compute(self, batch: _Batch, images: Images | None) -> Probabilities | None:
        """Return the probabilities of a batch; None if there are none because the engine failed."""
        if images is None:
            return None
        try:
            probabilities = self._run(images)
            if len(probabilities) != len(images):
                raise RuntimeError(f"the engine returned {len(probabilities)} rows for {len(images)} images")
        except Exception:
            log.exception("the engine failed on a batch of %d requests", len(batch.jobs))
            return None
        return probabilities

    def _answer(self, batch: _Batch, probabilities: Probabilities | None, took: int) -> None:
        """Tell those whose requests were taken what became of them."""
        for job, error in batch.refused:
            job.tell(error)
        start = 0
        for job in batch.jobs:
            stop = start + len(job.images)
            if probabilities is None:
                job.tell(InternalError("the engine failed; the server's log has the details"))
            else:
                job.tell(Answer(probabilities[start:stop], batch.began - job.arrived, took, batch.size))
                if self._goal:
                    self._goal.learn(batch.began - job.arrived + took)
            start = stop
        with self._lock:
            self._answering -= 1
            self._idle.notify_all()
