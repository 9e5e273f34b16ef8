"""Continuous batching: whenever the engine is free, the requests that wait become the next batch.

There is no batching timer unless `linger_ms` sets one. A worker runs as long as there are requests: it takes a batch,
computes it, and takes the next. If nothing else waits, the worker also responds, so that a lone request changes threads
only once. Otherwise another thread responds while the worker continues, because the engine is the bottleneck.
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
from serving.runtimes.base import Concatenator, EngineThreads, Images, Probabilities, ThreadPool
from serving.runtimes.cost import CostCurve
from serving.scheduling.admission import QueueLimits, QueueState, RecentRefusal, find_refusal
from serving.scheduling.latency_target import LatencyTarget
from serving.scheduling.queue import DEFAULT_PRIORITY, Batch, BatchResult, Entry, HeapItem, Outcome

# Batches of smaller requests are not prefetched: the interpreter's work for them takes longer than the copy, and there
# is only one interpreter. Prefetching single images of 3 KB cost a server on a GPU a tenth of its throughput.
MIN_PREFETCH_BYTES = 2**15

REFUSAL_TTL_NS = 1_000_000  # how long a refusal also holds for later requests
SWEEP_INTERVAL_NS = 10_000_000  # between two searches of a full queue for requests whose caller is gone

log = logging.getLogger(__name__)


class Batcher:
    """Computes the requests of many callers in batches, by priority, and in order of arrival within a priority.

    Attributes:
        queued: Images in the queue, those of a prefetched batch included.
        curve: Cost of a batch by its size, updated by every batch.
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
        """Begin with an empty queue.

        Args:
            run: Maps uint8 [n, height, width, 3] to float32 [n, classes].
            batching: Limits of batches and of the queue. A request with more images than a batch is computed alone.
            curve: Cost of a batch by its size, as measured so far; None if nothing was measured.
            instances: Concurrent calls of `run`, each on a thread of its own.
            overflow: Further concurrent calls, which share cores with the others. They begin only while a full batch
                waits: two small batches that share cores take longer than one.
            threads: Threads that call `run`, at least as many as instances; None for a `run` that any thread may call.
        """
        self._run, self._instances, self._overflow = run, instances, overflow
        self._limits = QueueLimits(batching.max_queue, batching.max_queue_ms * 1e6)
        self._linger_ns = batching.linger_ms * 1e6
        self.curve = curve or CostCurve()
        self._max_batch = self.curve.find_best_batch(batching.max_batch)
        self._target = LatencyTarget(batching.target_p99_ms, self.curve) if batching.target_p99_ms else None
        self._lock = threading.Lock()
        self._idle, self._arrival = threading.Condition(self._lock), threading.Condition(self._lock)
        self._heap: list[HeapItem] = []
        self._sequence = itertools.count()
        self.queued = 0
        self._workers = 0
        self._running: list[Batch] = []
        self._responding = 0  # batches
        self._swept_ns = 0
        self._recent_refusal: RecentRefusal = 0, 0.0, None
        self._has_priorities = False  # once a request had another priority, a refusal may not hold for others
        self._closed = False
        # The threads of executors end when the batcher is garbage-collected.
        self._threads: EngineThreads = threads or ThreadPool(instances + overflow, thread_name_prefix="batch")
        self._response_thread = ThreadPoolExecutor(1, thread_name_prefix="respond")
        self._prefetch_thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")

    def enqueue(
        self,
        images: Images,
        callback: Callable[[Outcome], None],
        deadline: float = float("inf"),
        is_active: Callable[[], bool] = lambda: True,
        priority: int = DEFAULT_PRIORITY,
    ) -> None:
        """Add a request to the queue, and return at once.

        Args:
            images: uint8 [n, height, width, 3], at least one image.
            callback: Called once with the result, or with the error if the engine failed or the request was dropped. It
                runs on a thread that the next batch may need: it must be quick and must not raise.
            deadline: As in `Entry`.
            is_active: As in `Entry`.
            priority: One of `PRIORITIES`; lower numbers are computed first.

        Raises:
            Overloaded: The queue is full, or too long for the deadline or the latency target.
            Unavailable: The batcher is closed.
            DeadlineExceeded: The deadline is too near even for the computation alone.
        """
        entry = Entry(images, deadline, is_active, callback)
        with self._lock:
            refusal = self._find_refusal(len(images), deadline, entry.arrival_ns, priority)
            if refusal and self._sweep(entry.arrival_ns):
                refusal = self._find_refusal(len(images), deadline, entry.arrival_ns, priority)
            if refusal:
                raise refusal
            heapq.heappush(self._heap, (priority, next(self._sequence), entry))
            self.queued += len(images)
            needs_worker = self._workers < self._instances or (
                self._may_overflow() and self._workers < self._instances + self._overflow
            )
            self._workers += needs_worker
            if self._linger_ns:
                self._arrival.notify_all()
        if needs_worker:
            self._threads.submit(self._run_worker)

    def refusal(self, deadline: float) -> ServingError | None:
        """Return the error of a recent refusal that also holds for a request with this deadline; None if there is none.

        Such a request need not be parsed.
        """
        expires_ns, latest_deadline, error = self._recent_refusal
        return error if error and deadline <= latest_deadline and time.perf_counter_ns() < expires_ns else None

    def close(self) -> None:
        """Refuse further requests; queued ones are still computed."""
        with self._lock:
            self._closed = True
            self._arrival.notify_all()  # no further request will fill a batch

    def drain(self, seconds: float) -> bool:
        """Wait until all requests are answered; return whether that was within `seconds`."""
        with self._lock:
            return self._idle.wait_for(lambda: not self._workers and not self._responding, seconds)

    def _find_refusal(self, images: int, deadline: float, now_ns: int, priority: int) -> ServingError | None:
        """Return why a request is refused; None if it is admitted. The lock is held."""
        if self._closed:
            return Unavailable("the server is shutting down")
        if not self._workers and self.queued + images <= self._limits.images:
            return None  # an idle engine accepts everything: only a batch can correct a cost that is too high
        running = [(batch.start_ns, batch.expected_ns) for batch in self._running]
        contention = 1 + (self._overflow / self._instances if self._may_overflow() else 0)
        ahead = self.queued
        if self._has_priorities or priority != DEFAULT_PRIORITY:
            self._has_priorities = True
            ahead = sum(len(entry.images) for other, _, entry in self._heap if other <= priority)
        state = QueueState(
            self.queued, ahead, running, self._instances, contention, self._find_max_batch(), self.curve, now_ns
        )
        remaining_ns = deadline if deadline == float("inf") else (deadline - time.monotonic()) * 1e9
        limits = self._limits._replace(latency_ns=self._target.limit_ns) if self._target else self._limits
        refusal = find_refusal(state, images, remaining_ns, limits)
        if refusal and images == 1 and not self._has_priorities:
            # A copy, because the error that is raised will carry the id of its own call.
            self._recent_refusal = now_ns + REFUSAL_TTL_NS, deadline + REFUSAL_TTL_NS / 1e9, copy.copy(refusal)
        return refusal

    def _sweep(self, now_ns: int) -> bool:
        """Drop all queued requests whose caller is gone, unless that was just done; return whether there were any.

        The lock is held.
        """
        if now_ns - self._swept_ns < SWEEP_INTERVAL_NS:
            return False
        self._swept_ns = now_ns
        batch, remaining = Batch(), []
        for item in self._heap:
            if error := item[-1].drop_reason():
                batch.items.append(item)
                batch.dropped.append((item[-1], error))
            else:
                remaining.append(item)
        if batch.items:
            heapq.heapify(remaining)
            self._heap = remaining
            self.queued -= batch.removed_images
            self._responding += 1
            self._response_thread.submit(self._respond, batch, None, 0)
        return bool(batch.items)

    def _run_worker(self) -> None:
        """Compute batches as long as there are requests."""
        concatenate = self._threads.concatenator()
        prefetched: Batch | None = None
        while batch := self._start_batch(prefetched):
            # In this order: the images of the prefetched batch overwrite those of the batch before this one.
            images = self._concatenate(batch, concatenate)
            prefetched = self._prefetch(concatenate)
            probabilities = self._compute(batch, images)
            compute_ns = time.perf_counter_ns() - batch.start_ns
            with self._lock:
                if batch.entries:
                    if probabilities is not None:
                        self.curve.update(batch.size, compute_ns / self._contention())
                    self._running.remove(batch)
                # While another batch is being answered, this one is answered after it, in order.
                is_busy = bool(self._heap or self._responding or prefetched)
                self._responding += 1
            if is_busy:
                self._response_thread.submit(self._respond, batch, probabilities, compute_ns)
            else:
                self._respond(batch, probabilities, compute_ns)
            if batch.entries and probabilities is None:
                if prefetched:
                    with self._lock:
                        self._requeue(prefetched)
                self._threads.submit(self._run_worker)  # on the next free thread, which may be that of another GPU
                return

    def _start_batch(self, batch: Batch | None) -> Batch | None:
        """Return the next batch to compute: the prefetched one, or one from the queue; None ends the worker."""
        with self._lock:
            if batch and self._is_stale(batch):
                self._requeue(batch)
                batch = None
            if batch is None:
                if len(self._running) >= self._instances and not self._may_overflow():
                    self._end_worker()  # another worker takes the requests that wait
                    return None
                max_batch = self._find_max_batch()
                if self._linger_ns:
                    self._linger(max_batch)
                batch = self._take_batch(max_batch)
                if not batch.items:
                    self._end_worker()
                    return None
            self.queued -= batch.removed_images
            if batch.entries:
                batch.is_overflow = len(self._running) >= self._instances
                batch.expected_ns, batch.start_ns = self.curve.ns(batch.size), time.perf_counter_ns()
                self._running.append(batch)
        return batch

    def _prefetch(self, concatenate: Concatenator) -> Batch | None:
        """Take the next batch and begin to concatenate it, if it is a full one of large requests."""
        if not self._threads.prefetch:
            return None
        with self._lock:
            max_batch = self._find_max_batch()
            if self.queued < max_batch or self._heap[0][-1].images.nbytes < MIN_PREFETCH_BYTES:
                return None
            batch = self._take_batch(max_batch)
        if batch.entries:
            with suppress(RuntimeError):  # no thread can be started: the batch is concatenated when it begins
                batch.concatenated = self._prefetch_thread.submit(
                    concatenate, [entry.images for entry in batch.entries]
                )
        return batch

    def _take_batch(self, max_batch: int) -> Batch:
        """Remove whole requests from the queue, up to a batch, and those whose caller is gone. The lock is held."""
        batch, earliest = Batch(), float("inf")
        while self._heap:
            entry = self._heap[0][-1]
            error = entry.drop_reason()
            if error is None:
                size, earliest = batch.size + len(entry.images), min(earliest, entry.deadline)
                if batch.entries and (size > max_batch or self._would_miss(size, earliest)):
                    break
                batch.entries.append(entry)
                batch.size = size
            else:
                batch.dropped.append((entry, error))
            batch.items.append(heapq.heappop(self._heap))
        return batch

    def _is_stale(self, batch: Batch) -> bool:
        """Return whether a prefetched batch is out of date: a caller is gone, or another request goes before it."""
        is_overtaken = self._heap and self._heap[0] < batch.items[-1]
        return bool(is_overtaken) or any(entry.drop_reason() for entry in batch.entries)

    def _requeue(self, batch: Batch) -> None:
        """Put the requests of a prefetched batch back into the queue. The lock is held."""
        if batch.concatenated:
            wait([batch.concatenated])  # it writes to the memory that the next batch may use
        for item in batch.items:
            heapq.heappush(self._heap, item)

    def _may_overflow(self) -> bool:
        """Return whether a batch may begin although all instances are busy.

        It may if it is full, or if cores are idle because an overflow batch runs, which uses only a part of them.
        """
        if not self._overflow:
            return False
        return self.queued >= self._find_max_batch() or any(batch.is_overflow for batch in self._running)

    def _find_max_batch(self) -> int:
        """Return the largest number of images in a batch."""
        return min(self._max_batch, self._target.max_batch) if self._target else self._max_batch

    def _end_worker(self) -> None:
        """Count a worker that ends. The lock is held."""
        self._workers -= 1
        self._idle.notify_all()

    def _contention(self) -> float:
        """Return how many running batches share the cores of one instance."""
        return max(1.0, len(self._running) / self._instances)

    def _would_miss(self, images: int, deadline: float) -> bool:
        """Return whether a batch that begins now would end after a deadline."""
        if deadline == float("inf"):
            return False
        contention = max(1.0, (len(self._running) + 1) / self._instances)
        return time.monotonic() + contention * self.curve.ns(images) / 1e9 > deadline

    def _linger(self, max_batch: int) -> None:
        """Wait for a full batch, until the oldest request has waited for `linger_ms`. The lock is held."""
        while self._heap and self.queued < max_batch and not self._closed:
            waited_ns = time.perf_counter_ns() - min(entry.arrival_ns for _, _, entry in self._heap)
            if waited_ns >= self._linger_ns:
                return
            self._arrival.wait((self._linger_ns - waited_ns) / 1e9)

    def _concatenate(self, batch: Batch, concatenate: Concatenator) -> Images | None:
        """Return the images of a batch; None if there are none or they cannot be concatenated."""
        parts = [entry.images for entry in batch.entries]
        try:
            if batch.concatenated:
                return batch.concatenated.result()
            return concatenate(parts) if len(parts) > 1 else parts[0] if parts else None
        except Exception:
            log.exception("a batch of %d requests cannot be concatenated", len(parts))
            return None

    def _compute(self, batch: Batch, images: Images | None) -> Probabilities | None:
        """Return the probabilities of a batch; None if it has no images or the engine failed."""
        if images is None:
            return None
        try:
            probabilities = self._run(images)
            if len(probabilities) != len(images):
                raise RuntimeError(f"the engine returned {len(probabilities)} rows for {len(images)} images")
        except Exception:
            log.exception("the engine failed on a batch of %d requests", len(batch.entries))
            return None
        return probabilities

    def _respond(self, batch: Batch, probabilities: Probabilities | None, compute_ns: int) -> None:
        """Respond to all requests of a batch; without probabilities, with an error."""
        for entry, error in batch.dropped:
            entry.respond(error)
        start = 0
        for entry in batch.entries:
            stop = start + len(entry.images)
            if probabilities is None:
                entry.respond(InternalError("the engine failed; the server's log has the details"))
            else:
                queue_ns = batch.start_ns - entry.arrival_ns
                entry.respond(BatchResult(probabilities[start:stop], queue_ns, compute_ns, batch.size))
                if self._target:
                    self._target.record(queue_ns + compute_ns)
            start = stop
        with self._lock:
            self._responding -= 1
            self._idle.notify_all()
