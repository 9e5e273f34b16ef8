"""The statistics of a model version: requests, images and batches, and where the time of requests went."""

from __future__ import annotations

import copy
import logging
import threading
import time
from bisect import bisect_left
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from serving.errors import ServingError
from serving.runtimes.base import Images
from serving.scheduling.queue import BatchResult

# Upper bounds of the histogram buckets: from 0.1 ms to 10 s, three in each decade.
BOUNDS_NS = (*(digit * 10**power for power in range(5, 10) for digit in (1, 2, 5)), 10**10)
FLUSH_SIZE = 512  # answered requests that are counted together: one by one, each costs as much as checking a request

log = logging.getLogger(__name__)


@dataclass
class Duration:
    """A histogram of durations.

    Attributes:
        count: Number of durations.
        ns: Their sum, in nanoseconds.
        buckets: Number of durations in each bucket, by the upper bounds `BOUNDS_NS`; the last bucket has no bound.
    """

    count: int = 0
    ns: int = 0
    buckets: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_NS) + 1))

    def add(self, ns: int) -> None:
        """Count a duration, in nanoseconds."""
        self.count += 1
        self.ns += ns
        self.buckets[bisect_left(BOUNDS_NS, ns)] += 1

    def extend(self, times: Sequence[int]) -> None:
        """Count several durations, in nanoseconds."""
        self.count += len(times)
        self.ns += sum(times)
        counts = np.bincount(np.searchsorted(BOUNDS_NS, times), minlength=len(self.buckets))
        self.buckets = [old + new for old, new in zip(self.buckets, counts.tolist(), strict=True)]


class TrackedRequest:
    """One running request, until `end` or `fail`.

    Attributes:
        span: Its span in a trace, if it is traced.
        find_id: Returns its id.
        arrived_ns: When it began, on the clock of `time.perf_counter_ns`.
        is_split: Whether a rollout decided which version answers.
        images: Its images, uint8 [n, height, width, channels], once they are decoded.
        decode_ns: Time to decode them, in nanoseconds.
        answer: Its result, once it is answered.
        error: Why it failed, once it has.
    """

    __slots__ = ("_statistics", "answer", "arrived_ns", "decode_ns", "error", "find_id", "images", "is_split", "span")

    def __init__(self, statistics: Statistics, span: Any, find_id: Callable[[], str], is_split: bool) -> None:
        self._statistics, self.span, self.find_id, self.is_split = statistics, span, find_id, is_split
        self.arrived_ns = time.perf_counter_ns()
        self.decode_ns = 0
        self.images: Images | None = None
        self.answer: BatchResult | None = None
        self.error: Exception | None = None

    @property
    def version(self) -> int:
        """The version of the model that it is for."""
        return self._statistics.version

    def decoded(self, images: Images) -> None:
        """Record that its images are decoded."""
        self.images, self.decode_ns = images, self.elapsed_ns()

    def elapsed_ns(self) -> int:
        """Return the time since its arrival, in nanoseconds."""
        return time.perf_counter_ns() - self.arrived_ns

    def end(self, answer: BatchResult) -> None:
        """Count it as answered."""
        self.answer = answer
        self._statistics.count(self, answer)

    def fail(self, error: Exception) -> None:
        """Count it as failed."""
        self.error = error
        self._statistics.count_failed(self, error)


class Observer(Protocol):
    """Observes every request for a model, on the thread that responds to it."""

    def end(self, request: TrackedRequest) -> None:
        """Observe the end of a request, which has an `answer` or an `error`. The caller waits for this."""
        ...


@dataclass
class Counts:
    """Counts of a model version since it was loaded.

    Attributes:
        images: Images of answered requests.
        success: Answered requests, from decoding to the response.
        fail: Refused and failed requests.
        queue: Queueing time of answered requests.
        decode: Decoding time of answered requests.
        compute: Compute time of the batches of answered requests.
        respond: Remaining time of answered requests: encoding the response, and changes of threads.
        batches: Calls of the engine, by the number of images.
        codes: Requests, by the name of their gRPC status.
        last_ms: Time of the last response, in milliseconds since 1970.
    """

    images: int = 0
    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    decode: Duration = field(default_factory=Duration)
    compute: Duration = field(default_factory=Duration)
    respond: Duration = field(default_factory=Duration)
    batches: dict[int, Duration] = field(default_factory=lambda: defaultdict(Duration))
    codes: dict[str, int] = field(default_factory=Counter)
    last_ms: int = 0


class Statistics:
    """Counts the requests for a model version; threads may share it.

    Attributes:
        model: Name of the model.
        version: Number of the version.
        observers: Observe every request, too; replaced as a whole, never changed.
    """

    def __init__(self, model: str, version: int) -> None:
        """Begin without requests."""
        self.model, self.version = model, version
        self.observers: tuple[Observer, ...] = ()
        self._lock = threading.Lock()
        self._counts = Counts()
        # Answered requests to be counted: images, and the nanoseconds in total, queue, decode, compute and respond.
        self._pending: deque[tuple[int, int, int, int, int, int]] = deque()
        self._last_ns = 0

    def begin(self, span: Any = None, find_id: Callable[[], str] = str, is_split: bool = False) -> TrackedRequest:
        """Return a new running request; arguments as in `TrackedRequest`."""
        return TrackedRequest(self, span, find_id, is_split)

    def count(self, request: TrackedRequest, answer: BatchResult) -> None:
        """Count an answered request, and notify the observers."""
        total, queue, compute = request.elapsed_ns(), answer.queue_ns, answer.compute_ns
        respond = max(0, total - queue - request.decode_ns - compute)
        self._last_ns = time.time_ns()
        self._pending.append((len(answer.probabilities), total, queue, request.decode_ns, compute, respond))
        if len(self._pending) >= FLUSH_SIZE:
            with self._lock:
                self._flush()
        if self.observers:
            self._notify(request)

    def count_failed(self, request: TrackedRequest, error: Exception) -> None:
        """Count a failed request, and notify the observers."""
        with self._lock:
            self._counts.fail.add(request.elapsed_ns())
            self._counts.codes[error.status.name if isinstance(error, ServingError) else "INTERNAL"] += 1
        if isinstance(error, ServingError):
            error.model, error.version = self.model, self.version
        if self.observers:
            self._notify(request)

    def _notify(self, request: TrackedRequest) -> None:
        """Notify the observers; what they fail on concerns no caller."""
        for observer in self.observers:
            try:
                observer.end(request)
            except Exception:
                log.exception("an observer of requests failed")

    def count_refused(self, error: ServingError) -> None:
        """Count a request that was refused on arrival."""
        with self._lock:
            self._counts.fail.add(0)
            self._counts.codes[error.status.name] += 1

    def count_batch(self, images: int, ns: int) -> None:
        """Count a call of the engine by its number of images and its nanoseconds."""
        with self._lock:
            self._counts.batches[images].add(ns)

    def counts(self) -> Counts:
        """Return a copy of the counts."""
        with self._lock:
            self._flush()
            return copy.deepcopy(self._counts)

    def _flush(self) -> None:
        """Add the pending requests to the counts. The lock is held."""
        # Other threads append meanwhile: only what is removed here is counted here.
        rows = [self._pending.popleft() for _ in range(len(self._pending))]
        if not rows:
            return
        counts, (images, *times) = self._counts, zip(*rows, strict=True)
        counts.images += sum(images)
        counts.codes["OK"] += len(rows)
        durations = (counts.success, counts.queue, counts.decode, counts.compute, counts.respond)
        for duration, column in zip(durations, times, strict=True):
            duration.extend(column)
        counts.last_ms = self._last_ns // 1_000_000
