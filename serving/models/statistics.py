"""What a model has answered so far, and where the time went."""

from __future__ import annotations

import copy
import threading
import time
from bisect import bisect_left
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from serving.errors import ServingError
from serving.scheduling.queue import BatchResult

# Upper bounds of the buckets of a histogram: from 0.1 ms to 10 s, three a decade.
BOUNDS_NS = (*(digit * 10**power for power in range(5, 10) for digit in (1, 2, 5)), 10**10)
AT_ONCE = 512  # answers that are counted together: one by one they cost as much as to check a request


@dataclass
class Duration:
    """How often something happened, and how long it took in all, in nanoseconds.

    Attributes:
        count: How often.
        ns: How long in all.
        buckets: How often it took at most each of `BOUNDS_NS` and more than the one before; the last is beyond all.
    """

    count: int = 0
    ns: int = 0
    buckets: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_NS) + 1))

    def add(self, ns: int) -> None:
        """Count it once more."""
        self.count += 1
        self.ns += ns
        self.buckets[bisect_left(BOUNDS_NS, ns)] += 1

    def extend(self, times: Sequence[int]) -> None:
        """Count it once for each of these, in nanoseconds."""
        self.count += len(times)
        self.ns += sum(times)
        found = np.bincount(np.searchsorted(BOUNDS_NS, times), minlength=len(self.buckets))
        self.buckets = [mine + more for mine, more in zip(self.buckets, found.tolist(), strict=True)]


class TrackedRequest:
    """One request under way, until `end` or `fail`.

    Attributes:
        span: Of the trace that it is part of, if there is one.
        decode_ns: Time that it took to unpack, in nanoseconds.
        answer: What it was answered by, if it was.
    """

    __slots__ = ("_arrived", "_statistics", "answer", "decode_ns", "span")

    def __init__(self, statistics: Statistics, span: Any) -> None:
        self._statistics, self.span, self._arrived = statistics, span, time.perf_counter_ns()
        self.decode_ns = 0
        self.answer: BatchResult | None = None

    def decoded(self) -> None:
        """Note that its images are unpacked."""
        self.decode_ns = self.elapsed_ns()

    def elapsed_ns(self) -> int:
        """Return the time since it arrived."""
        return time.perf_counter_ns() - self._arrived

    def end(self, answer: BatchResult) -> None:
        """Count it as answered."""
        self.answer = answer
        self._statistics.count(self, answer)

    def fail(self, error: Exception) -> None:
        """Count it as failed."""
        self._statistics.count_failed(self, error)


class Observer(Protocol):
    """Is told of every request for a model, on the thread that answers it."""

    def end(self, request: TrackedRequest) -> None:
        """Note that it was answered, or if there is no answer, that it failed."""
        ...


@dataclass
class Counts:
    """What was answered with a model version, since it was loaded.

    Attributes:
        images: Images answered.
        success: Requests answered, from unpacking to packing.
        fail: Requests refused or failed.
        queue: Of the answered, the wait for the engine.
        decode: Of the answered, unpacking.
        compute: Of the answered, the batch that they were in.
        respond: Of the answered, the rest: packing, and waking up.
        batches: Calls of the engine, by number of images.
        codes: Requests, by the name of their gRPC status.
        last_ms: When the last request was answered, milliseconds since 1970.
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
    """What is answered with a model version; threads may share it.

    Attributes:
        model: Name of the model.
        version: Of the model.
        observer: Is told of every request too, if there is one.
    """

    def __init__(self, model: str, version: int) -> None:
        """Begin with nothing."""
        self.model, self.version = model, version
        self.observer: Observer | None = None
        self._lock = threading.Lock()
        self._counts = Counts()
        # Images, and the time in all, in the queue, for unpacking, computing and the rest, of those not counted yet.
        self._answered: deque[tuple[int, int, int, int, int, int]] = deque()
        self._last_ns = 0

    def begin(self, span: Any = None) -> TrackedRequest:
        """Return what counts one more request; `span` as in `TrackedRequest`."""
        return TrackedRequest(self, span)

    def count(self, request: TrackedRequest, answer: BatchResult) -> None:
        """Count a request that was answered, and let the observer know."""
        total, waited, computed = request.elapsed_ns(), answer.queue_ns, answer.compute_ns
        rest = max(0, total - waited - request.decode_ns - computed)
        self._last_ns = time.time_ns()
        self._answered.append((len(answer.probabilities), total, waited, request.decode_ns, computed, rest))
        if len(self._answered) >= AT_ONCE:
            with self._lock:
                self._sum_up()
        if self.observer:
            self.observer.end(request)

    def count_failed(self, request: TrackedRequest, error: Exception) -> None:
        """Count a request that failed, and let the observer know."""
        with self._lock:
            self._counts.fail.add(request.elapsed_ns())
            self._counts.codes[error.status.name if isinstance(error, ServingError) else "INTERNAL"] += 1
        if isinstance(error, ServingError):
            error.model, error.version = self.model, self.version
        if self.observer:
            self.observer.end(request)

    def count_refused(self, error: ServingError) -> None:
        """Count a request that failed as soon as it had come."""
        with self._lock:
            self._counts.fail.add(0)
            self._counts.codes[error.status.name] += 1

    def batch(self, images: int, ns: int) -> None:
        """Count a call of the engine."""
        with self._lock:
            self._counts.batches[images].add(ns)

    def counts(self) -> Counts:
        """Return what was counted until now."""
        with self._lock:
            self._sum_up()
            return copy.deepcopy(self._counts)

    def _sum_up(self) -> None:
        """Count what was answered since the last time; the lock is held."""
        # Others go on adding: what is taken out here is counted here.
        rows = [self._answered.popleft() for _ in range(len(self._answered))]
        if not rows:
            return
        counts, (images, *times) = self._counts, zip(*rows, strict=True)
        counts.images += sum(images)
        counts.codes["OK"] += len(rows)
        durations = (counts.success, counts.queue, counts.decode, counts.compute, counts.respond)
        for duration, some in zip(durations, times, strict=True):
            duration.extend(some)
        counts.last_ms = self._last_ns // 1_000_000
