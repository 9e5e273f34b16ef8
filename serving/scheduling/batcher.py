"""Continuous batching: each time the engine is free, whatever waits becomes the next batch.

There is no timer, unless one is asked for. A thread leads as long as there is work: it takes a batch, computes it, and
takes the next. It answers a batch by itself when nothing waits, so that a lone request changes threads once; else
another thread answers while the engine goes on, because the engine is what there is least of.
"""

from __future__ import annotations

import copy
import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress

from serving.config import Batching
from serving.errors import InternalError, ServingError, Unavailable
from serving.runtimes.base import EngineThreads, Gather, Images, Probabilities
from serving.runtimes.cost import CostCurve
from serving.scheduling.admission import QueueLimits, QueueState, judge
from serving.scheduling.latency_target import LatencyTarget
from serving.scheduling.queue import DEFAULT_PRIORITY, Batch, BatchResult, Job, Outcome, Queued, ThreadPool

# Of a request: smaller ones take the interpreter longer than the copy does, and there is only one interpreter. Single
# images of 3 KB, put together ahead, cost a server on a GPU a tenth of its requests.
LARGE_BYTES = 2**15

KEPT_NS = 1_000_000  # how long a refusal holds for others
DROP_NS = 10_000_000  # from one look through a full queue for those that nobody waits for to the next

log = logging.getLogger(__name__)


class Batcher:
    """Runs the requests of many callers through one engine, in batches: by priority, and then in order of arrival.

    Attributes:
        queued: Images that wait, among them those that are taken ahead.
        curve: What batches cost, as far as it is known.
    """

    def __init__(
        self,
        run: Callable[[Images], Probabilities],
        batching: Batching = Batching(),
        curve: CostCurve | None = None,
        instances: int = 1,
        overflow: int = 0,
        threads: EngineThreads | None = None,
    ) -> None:
        """Start empty.

        Args:
            run: Maps uint8 [n, height, width, 3] to float32 [n, classes].
            batching: How to work. A request with more images than a batch is computed alone.
            curve: What a batch costs, as far as it is known; every batch adds to it.
            instances: Calls of `run` that may be under way at a time, each on a thread of its own.
            overflow: Further calls, which begin only while a full batch waits: calls that share cores with the others, so
                that two small batches would take longer than one.
            threads: Threads for the calls of `run`, where not every thread will do: as many as there are instances.
        """
        self._run, self._instances, self._overflow = run, instances, overflow
        self._bounds = QueueLimits(batching.max_queue, batching.max_queue_ms * 1e6)
        self._linger_ns = batching.linger_ms * 1e6
        self.curve = curve or CostCurve()
        self._max_batch = self.curve.best(batching.max_batch)
        self._target = LatencyTarget(batching.target_p99_ms, self.curve) if batching.target_p99_ms else None
        self._lock = threading.Lock()
        self._idle, self._came = threading.Condition(self._lock), threading.Condition(self._lock)
        self._queue: list[Queued] = []  # a heap: by priority, then as they came
        self._numbers = itertools.count()
        self.queued = 0
        self._leads = 0
        self._running: list[Batch] = []
        self._answering = 0  # batches
        self._dropped_at = 0
        # Until when, and up to which deadline, one request is refused as another was.
        self._refused: tuple[int, float, ServingError | None] = 0, 0.0, None
        self._prefers = False  # whether any request had another priority: what holds for one may not for others then
        self._closed = False
        # Threads of these end with the batcher.
        self._threads: EngineThreads = threads or ThreadPool(instances + overflow, thread_name_prefix="lead")
        self._answerer = ThreadPoolExecutor(1, thread_name_prefix="answer")
        self._gatherer = ThreadPoolExecutor(1, thread_name_prefix="gather")

    def enqueue(
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
            done: Takes the answer, or what an engine or a caller that left made of it; called once, on another thread,
                which the next batch may need: it must be quick, and raise nothing.
            deadline: As in `Job`.
            alive: As in `Job`.
            priority: One of `PRIORITIES`: as long as others wait, a lower number goes before a higher one.

        Raises:
            Overloaded: The queue is full, or too long for the deadline or the latency that is the goal.
            Unavailable: The batcher was closed.
            DeadlineExceeded: The deadline is too near for the computation alone.
        """
        job = Job(images, deadline, alive, done)
        with self._lock:
            refusal = self._judge(len(images), deadline, job.arrived, priority)
            if refusal and self._drop_dead(job.arrived):
                refusal = self._judge(len(images), deadline, job.arrived, priority)
            if refusal:
                raise refusal
            heapq.heappush(self._queue, (priority, next(self._numbers), job))
            self.queued += len(images)
            leads = self._leads < self._instances or (
                self._overflows() and self._leads < self._instances + self._overflow
            )
            self._leads += leads
            if self._linger_ns:
                self._came.notify_all()
        if leads:
            self._threads.submit(self._lead)

    def refusal(self, deadline: float) -> ServingError | None:
        """Return why a request need not be read: just now another one was refused that had as long to wait."""
        until, latest, refusal = self._refused
        return refusal if refusal and deadline <= latest and time.perf_counter_ns() < until else None

    def close(self) -> None:
        """Refuse further requests; those that wait are still computed."""
        with self._lock:
            self._closed = True
            self._came.notify_all()  # nobody is to be waited for

    def drain(self, seconds: float) -> bool:
        """Wait until nothing is computed and nothing waits; return whether it came to that within `seconds`."""
        with self._lock:
            return self._idle.wait_for(lambda: not self._leads and not self._answering, seconds)

    def _judge(self, images: int, deadline: float, now: int, priority: int) -> ServingError | None:
        """Return what keeps a request out, if anything does; the lock is held."""
        if self._closed:
            return Unavailable("the server is shutting down")
        if not self._leads and self.queued + images <= self._bounds.images:
            return None  # an idle engine turns nothing down: what a batch really takes, only a batch can tell
        running = [(batch.began, batch.expected_ns) for batch in self._running]
        contention = 1 + (self._overflow / self._instances if self._overflows() else 0)
        before = self.queued
        if self._prefers or priority != DEFAULT_PRIORITY:
            self._prefers = True
            before = sum(len(job.images) for other, _, job in self._queue if other <= priority)
        load = QueueState(self.queued, before, running, self._instances, contention, self._limit(), self.curve, now)
        left_ns = deadline if deadline == float("inf") else (deadline - time.monotonic()) * 1e9
        bounds = self._bounds._replace(answer_ns=self._target.allowed_ns) if self._target else self._bounds
        refusal = judge(load, images, left_ns, bounds)
        if refusal and images == 1 and not self._prefers:
            # A copy: what is raised here will carry the id of its call.
            self._refused = now + KEPT_NS, deadline + KEPT_NS / 1e9, copy.copy(refusal)
        return refusal

    def _drop_dead(self, now: int) -> bool:
        """Take out what nobody waits for, once in a while; say whether there was any. The lock is held."""
        if now - self._dropped_at < DROP_NS:
            return False
        self._dropped_at = now
        batch, alive = Batch(), []
        for entry in self._queue:
            if error := entry[-1].refusal():
                batch.entries.append(entry)
                batch.refused.append((entry[-1], error))
            else:
                alive.append(entry)
        if batch.entries:
            heapq.heapify(alive)
            self._queue = alive
            self.queued -= batch.taken
            self._answering += 1
            self._answerer.submit(self._answer, batch, None, 0)
        return bool(batch.entries)

    def _lead(self) -> None:
        """Compute batches as long as there are requests."""
        gather = self._threads.gatherer()
        ahead: Batch | None = None
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
                self._threads.submit(self._lead)  # to another thread, and perhaps to one that fares better
                return

    def _begin(self, batch: Batch | None) -> Batch | None:
        """Return what is computed now: a batch that was taken, or what waits; give up the lead if there is nothing."""
        with self._lock:
            if batch and self._is_stale(batch):
                self._put_back(batch)
                batch = None
            if batch is None:
                if len(self._running) >= self._instances and not self._overflows():
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
                batch.overflow = len(self._running) >= self._instances
                batch.expected_ns, batch.began = self.curve.ns(batch.size), time.perf_counter_ns()
                self._running.append(batch)
        return batch

    def _look_ahead(self, gather: Gather) -> Batch | None:
        """Take the next batch already, and begin to put it together, if it will be a full one of large requests."""
        if not self._threads.ahead:
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

    def _take(self, limit: int) -> Batch:
        """Take whole requests from the queue, up to a batch, and those that nobody waits for; the lock is held."""
        batch, soonest = Batch(), float("inf")
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

    def _is_stale(self, batch: Batch) -> bool:
        """Say whether another would be taken now: somebody has left, or somebody came who goes first."""
        overtaken = self._queue and self._queue[0] < batch.entries[-1]
        return bool(overtaken) or any(job.refusal() for job in batch.jobs)

    def _put_back(self, batch: Batch) -> None:
        """Have those who were taken ahead wait as before; the lock is held."""
        if batch.gathered:
            wait([batch.gathered])  # it could overwrite what is put together next
        for entry in batch.entries:
            heapq.heappush(self._queue, entry)

    def _overflows(self) -> bool:
        """Say whether overflow instances may begin: for a full batch, or where cores would idle beside a batch that has but a
        part of them.
        """
        if not self._overflow:
            return False
        return self.queued >= self._limit() or any(batch.overflow for batch in self._running)

    def _limit(self) -> int:
        """Return how many images may share a batch."""
        return min(self._max_batch, self._target.batch) if self._target else self._max_batch

    def _rest(self) -> None:
        """Give up the lead; the lock is held."""
        self._leads -= 1
        self._idle.notify_all()

    def _crowd(self) -> float:
        """Return how many batches share the cores that are meant for one."""
        return max(1.0, len(self._running) / self._instances)

    def _misses(self, images: int, deadline: float) -> bool:
        """Say whether a batch that begins now will be done too late for a deadline."""
        if deadline == float("inf"):
            return False
        contention = max(1.0, (len(self._running) + 1) / self._instances)
        return time.monotonic() + contention * self.curve.ns(images) / 1e9 > deadline

    def _linger(self, limit: int) -> None:
        """Wait for a full batch, as long as the first of those that wait may be kept waiting; the lock is held."""
        while self._queue and self.queued < limit and not self._closed:
            left = self._linger_ns - (time.perf_counter_ns() - min(job.arrived for _, _, job in self._queue))
            if left <= 0:
                return
            self._came.wait(left / 1e9)

    def _assemble(self, batch: Batch, gather: Gather) -> Images | None:
        """Return the images of a batch; None if there are none, or they cannot be put together."""
        parts = [job.images for job in batch.jobs]
        try:
            if batch.gathered:
                return batch.gathered.result()
            return gather(parts) if len(parts) > 1 else parts[0] if parts else None
        except Exception:
            log.exception("a batch of %d requests cannot be put together", len(parts))
            return None

    def _compute(self, batch: Batch, images: Images | None) -> Probabilities | None:
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

    def _answer(self, batch: Batch, probabilities: Probabilities | None, took: int) -> None:
        """Tell those whose requests were taken what became of them."""
        for job, error in batch.refused:
            job.tell(error)
        start = 0
        for job in batch.jobs:
            stop = start + len(job.images)
            if probabilities is None:
                job.tell(InternalError("the engine failed; the server's log has the details"))
            else:
                job.tell(BatchResult(probabilities[start:stop], batch.began - job.arrived, took, batch.size))
                if self._target:
                    self._target.learn(batch.began - job.arrived + took)
            start = stop
        with self._lock:
            self._answering -= 1
            self._idle.notify_all()
