"""Continuous batching: whenever the engine is free, the requests that wait become the next batch.

There is no batching timer unless `linger_ms` sets one. A worker runs as long as there are requests: it takes a batch,
computes it, and takes the next. If nothing else waits, the worker also responds, so that a lone request changes threads
only once. Otherwise another thread responds while the worker continues, because the engine is the bottleneck.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import wait

import numpy as np

from serving.config import Batching
from serving.errors import ServingError, Unavailable
from serving.runtimes.base import Concatenator, EngineThreads, Images, Probabilities, ThreadPool
from serving.runtimes.cost import CostCurve
from serving.scheduling.admission import Admission, QueueLimits, QueueState, predict_queue_ns
from serving.scheduling.batch import Batch
from serving.scheduling.latency_target import LatencyTarget
from serving.scheduling.queue import DEFAULT_PRIORITY, PROBE_PRIORITY, Entry, Outcome, RequestQueue
from serving.threads import WorkerPool

# Batches of smaller requests are not prefetched: the interpreter's work for them takes longer than the copy, and there
# is only one interpreter. Prefetching single images of 3 KB cost a server on a GPU a tenth of its throughput.
MIN_PREFETCH_BYTES = 2**15

SMALLEST = np.empty((1, 1, 1, 3), np.uint8)  # a request of one image

SWEEP_INTERVAL_NS = 10_000_000  # between two searches of a full queue for requests whose caller is gone

log = logging.getLogger(__name__)


class Batcher:
    """Computes the requests of many callers in batches, in the order of `serving.scheduling.queue`.

    Attributes:
        queued: Images in the queue, those of a prefetched batch included.
        curve: Cost of a batch by its size, updated by every batch.
        answered: Batches that were answered.
    """

    def __init__(
        self,
        run: Callable[[Images], Probabilities],
        batching: Batching = Batching(),
        curve: CostCurve | None = None,
        instances: int = 1,
        overflow: int = 0,
        threads: EngineThreads | None = None,
        count: Callable[[int, int], object] = lambda images, ns: None,  # noqa: ARG005
    ) -> None:
        """Begin with an empty queue.

        Args:
            run: Maps uint8 [n, height, width, channels] to float32 [n, classes].
            batching: Limits of batches and of the queue. A request with more images than a batch is computed alone.
            curve: Cost of a batch by its size, as measured so far; None if nothing was measured.
            instances: Concurrent calls of `run`, each on a thread of its own.
            overflow: Further concurrent calls, which share cores with the others. They begin only while a full batch
                waits: two small batches that share cores take longer than one.
            threads: Threads that call `run`, at least as many as instances; None for a `run` that any thread may call.
            count: Called for each batch that was computed for callers, with its images and the nanoseconds of `run`.

        Raises:
            BadInput: The process may have no further threads.
        """
        self._run, self._instances, self._overflow, self._count = run, instances, overflow, count
        self._linger_ns = batching.linger_ms * 1e6
        self.curve = curve or CostCurve()
        self._max_batch = self.curve.find_best_batch(batching.max_batch)
        self._target = LatencyTarget(batching.target_p99_ms, self.curve) if batching.target_p99_ms else None
        self._admission = Admission(QueueLimits(batching.max_queue, batching.max_queue_ms * 1e6), self._target)
        self._lock = threading.Lock()
        self._idle, self._arrival = threading.Condition(self._lock), threading.Condition(self._lock)
        self._queue = RequestQueue(batching.max_queue_ms * 1e6)
        self.queued = self.answered = 0
        self._workers = 0
        self._running: list[Batch] = []
        self._responding = 0  # batches
        self._swept_ns = 0
        self._closed = False
        # These threads end when the batcher is garbage-collected.
        self._threads: EngineThreads = threads or ThreadPool(instances + overflow, "batch")
        self._response_thread = WorkerPool(1, "respond")
        self._prefetch_thread = WorkerPool(1, "prefetch") if self._threads.prefetch else None

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
            images: uint8 [n, height, width, channels], at least one image.
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
        entry = Entry(images, deadline, is_active, callback, priority)
        with self._lock:
            refusal = self._find_refusal(entry)
            if refusal and self._sweep(entry.arrival_ns):
                refusal = self._find_refusal(entry)
            if refusal:
                raise refusal
            needs_worker = self._push(entry)
            if self._linger_ns:
                self._arrival.notify_all()
        if needs_worker:
            self._threads.submit(self._run_worker)

    def probe(self, images: Images, callback: Callable[[Outcome], None] = lambda _: None) -> bool:
        """Compute images of the server's own, if there is nothing else to do; nothing counts that, except `answered`.

        Requests of callers go before it, and share no batch with it.

        Args:
            images: As in `enqueue`.
            callback: As in `enqueue`.

        Returns:
            Whether the images will be computed.
        """
        entry = Entry(images, float("inf"), lambda: True, callback, PROBE_PRIORITY)
        with self._lock:
            if self._closed or self._workers:
                return False
            self._push(entry)
        self._threads.submit(self._run_worker)
        return True

    def check(self, deadline: float) -> None:
        """Raise the error with which a request would be refused now, whatever it holds: it need not be decoded.

        Args:
            deadline: As in `Entry`.

        Raises:
            ServingError: As in `enqueue`.
        """
        entry = Entry(SMALLEST, deadline, lambda: True, lambda _: None)
        with self._lock:
            # Nobody knows the priority of a request that was not read.
            refusal = None if self._admission.has_priorities else self._find_refusal(entry)
        if refusal:
            raise refusal

    @property
    def is_busy(self) -> bool:
        """Whether there are requests that are not answered."""
        return bool(self._workers or self._responding)

    @property
    def expected_ns(self) -> float:
        """Longest time until a batch is answered if all goes well, in nanoseconds."""
        running = [batch.expected_ns for batch in self._running.copy()]
        return max([self.curve.ns(self._max_batch), *running]) + self._linger_ns

    @property
    def queue_ns(self) -> float:
        """Predicted time until the computation of all queued images has begun, in nanoseconds; 0 if none waits."""
        with self._lock:
            state = self._find_state(self.queued, time.perf_counter_ns())
        return predict_queue_ns(state, state.queued) if state.queued else 0.0

    def refusal(self, deadline: float) -> ServingError | None:
        """Return the error of a recent refusal that also holds for a request with this deadline; None if there is none.

        Such a request need not be parsed.
        """
        return self._admission.recall_refusal(deadline)

    def close(self) -> None:
        """Refuse further requests; queued ones are still computed."""
        with self._lock:
            self._closed = True
            self._arrival.notify_all()  # no further request will fill a batch

    def drain(self, seconds: float) -> bool:
        """Wait until all requests are answered; return whether that was within `seconds`."""
        with self._lock:
            return self._idle.wait_for(lambda: not self._workers and not self._responding, seconds)

    def _push(self, entry: Entry) -> bool:
        """Add a request to the queue; return whether a worker must be started, which is counted. The lock is held."""
        self._queue.push(entry)
        self.queued += len(entry.images)
        needs_worker = self._workers < self._instances or (
            self._may_overflow() and self._workers < self._instances + self._overflow
        )
        self._workers += needs_worker
        return needs_worker

    def _find_refusal(self, entry: Entry) -> ServingError | None:
        """Return why a request is refused; None if it is admitted. The lock is held."""
        if self._closed:
            return Unavailable("the server is shutting down")
        if self._is_idle() and len(entry.images) <= self._admission.limits.images:
            return None  # only a batch can correct a cost that is too high
        ahead = self._queue.count_ahead(entry) + self.queued - self._queue.images
        return self._admission.find_refusal(entry, self._find_state(ahead, entry.arrival_ns))

    def _find_state(self, ahead: int, now_ns: int) -> QueueState:
        """Return the load, as it is for a request that arrives now behind so many images. The lock is held."""
        return QueueState(
            self.queued,
            ahead,
            [(batch.start_ns, batch.expected_ns) for batch in self._running],
            self._instances,
            1 + (self._overflow / self._instances if self._may_overflow() else 0),
            self._find_max_batch(),
            self.curve,
            now_ns,
        )

    def _is_idle(self) -> bool:
        """Return whether nothing of callers waits or is computed. The lock is held."""
        if self._running and not self._running[0].is_probe:
            return False
        first = self._queue.peek()
        is_empty = (first is None or first.is_probe) and self.queued == self._queue.images
        return is_empty and all(batch.is_probe for batch in self._running)

    def _sweep(self, now_ns: int) -> bool:
        """Drop all queued requests whose caller is gone, unless that was just done; return whether there were any.

        The lock is held.
        """
        if now_ns - self._swept_ns < SWEEP_INTERVAL_NS:
            return False
        self._swept_ns = now_ns
        before = self._queue.images
        batch = Batch(dropped=self._queue.remove_dropped())
        if batch.dropped:
            self.queued -= before - self._queue.images
            self._responding += 1
            self._response_thread.submit(self._respond, batch, None, 0)
        return bool(batch.dropped)

    def _run_worker(self) -> None:
        """Compute batches as long as there are requests."""
        batch: Batch | None = None
        prefetched: Batch | None = None
        try:
            concatenate = self._threads.concatenator()
            while batch := self._start_batch(prefetched):
                # In this order: the images of the prefetched batch overwrite those of the batch before this one.
                images = batch.concatenate(concatenate)
                prefetched = self._prefetch(concatenate)
                probabilities = self._compute(batch, images)
                self._end_batch(batch, probabilities, is_last=prefetched is None)
                if batch.entries and probabilities is None:
                    break
            else:
                return
        except BaseException:
            log.exception("a batch failed outside of the engine")
            if not (batch and batch in self._running):
                return  # no batch can be formed: the worker counts as busy for good, which a watchdog finds
            self._end_batch(batch, None)
        # The next batch runs on the next free thread, which may be that of another GPU.
        if prefetched:
            with self._lock:
                self._requeue(prefetched)
        self._threads.submit(self._run_worker)

    def _end_batch(self, batch: Batch, probabilities: Probabilities | None, is_last: bool = False) -> None:
        """Respond to the requests of a batch, on this thread if nothing else waits for it."""
        compute_ns = time.perf_counter_ns() - batch.start_ns
        with self._lock:
            if batch.entries:
                if probabilities is not None and not batch.is_probe:
                    self.curve.update(batch.size, compute_ns / self._contention())
                self._running.remove(batch)
            # While another batch is being answered, this one is answered after it, in order.
            is_busy = bool(self._queue.images or self._responding or not is_last)
            self._responding += 1
        if is_busy:
            self._response_thread.submit(self._respond, batch, probabilities, compute_ns)
        else:
            self._respond(batch, probabilities, compute_ns)

    def _start_batch(self, batch: Batch | None) -> Batch | None:
        """Return the next batch to compute: the prefetched one, or one from the queue; None ends the worker."""
        with self._lock:
            if batch and batch.is_stale(self._queue.peek()):
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
                if not batch.removed_images:
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
        if self._prefetch_thread is None:
            return None
        with self._lock:
            max_batch, first = self._find_max_batch(), self._queue.peek()
            if first is None or self.queued < max_batch or first.images.nbytes < MIN_PREFETCH_BYTES:
                return None
            batch = self._take_batch(max_batch)
        if batch.entries:
            batch.prefetch(concatenate, self._prefetch_thread)
        return batch

    def _take_batch(self, max_batch: int) -> Batch:
        """Remove whole requests from the queue, up to a batch, and those whose caller is gone. The lock is held."""
        batch, earliest = Batch(), float("inf")
        while entry := self._queue.peek():
            error = entry.drop_reason()
            if error is None:
                size, earliest = batch.size + len(entry.images), min(earliest, entry.deadline)
                is_full = size > max_batch or entry.is_probe or self._would_miss(size, earliest)
                if batch.entries and is_full:
                    break
                batch.entries.append(entry)
                batch.size, batch.is_probe = size, entry.is_probe
            else:
                batch.dropped.append((entry, error))
            batch.removed_images += len(entry.images)
            self._queue.pop(entry)
        return batch

    def _requeue(self, batch: Batch) -> None:
        """Put the requests of a prefetched batch back into the queue. The lock is held."""
        if batch.concatenated:
            wait([batch.concatenated])  # it writes to the memory that the next batch may use
        self._queue.restore(batch.removed)

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
        if not self._workers:
            self._admission.forget_refusal()  # an idle engine accepts everything
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
        while (first := self._queue.peek()) and not first.is_probe and self.queued < max_batch and not self._closed:
            waited_ns = time.perf_counter_ns() - min(entry.arrival_ns for entry in self._queue)
            if waited_ns >= self._linger_ns:
                return
            self._arrival.wait((self._linger_ns - waited_ns) / 1e9)

    def _compute(self, batch: Batch, images: Images | None) -> Probabilities | None:
        """Return the probabilities of a batch; None if it has no images or the engine failed."""
        if images is None:
            return None
        start_ns = time.perf_counter_ns()
        try:
            probabilities = self._run(images)
            if len(probabilities) != len(images):
                raise RuntimeError(f"the engine returned {len(probabilities)} rows for {len(images)} images")
        except Exception:
            log.exception("the engine failed on a batch of %d requests", len(batch.entries))
            return None
        if not batch.is_probe:
            self._count(batch.size, time.perf_counter_ns() - start_ns)
        return probabilities

    def _respond(self, batch: Batch, probabilities: Probabilities | None, compute_ns: int) -> None:
        """Respond to all requests of a batch; without probabilities, with an error."""
        batch.respond(probabilities, compute_ns)
        if self._target and probabilities is not None and not batch.is_probe:
            for entry in batch.entries:
                self._target.record(batch.start_ns - entry.arrival_ns + compute_ns)
        with self._lock:
            self._responding -= 1
            self.answered += 1
            self._idle.notify_all()
