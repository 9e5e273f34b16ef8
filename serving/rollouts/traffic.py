"""What the guard of a rollout counts of the requests: answers, failures and latencies, for each of two versions."""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from serving.errors import DeadlineExceeded, InternalError, Overloaded, ServingError
from serving.models.statistics import TrackedRequest
from serving.rollouts.guard import TrafficCounts

LATENCIES = 5000  # that are kept of each version


class Traffic:
    """Observes the requests for a model, and counts those for each of some versions that did not choose it."""

    def __init__(
        self,
        versions: Sequence[int],
        is_disturbed: Callable[[TrackedRequest], bool] = lambda request: False,  # noqa: ARG005
    ) -> None:
        """Begin with nothing counted.

        Args:
            versions: Numbers of the versions.
            is_disturbed: Returns whether the latency of a request that ends says nothing about its version.
        """
        self._lock, self._is_disturbed = threading.Lock(), is_disturbed
        self._counters = {version: _Counter() for version in versions}

    def end(self, request: TrackedRequest) -> None:
        """Count a request."""
        counter = self._counters.get(request.version)
        if counter is None or not request.is_split:
            return
        with self._lock:
            if request.answer is not None:
                counter.answered += 1
                if random.random() < counter.kept and not self._is_disturbed(request):
                    counter.latencies.append((request.elapsed_ns(), time.monotonic()))
            elif is_failure(request.error):
                counter.failed += 1

    def count(self, version: int) -> TrafficCounts:
        """Return what was counted of a version since `forget`."""
        with self._lock:
            counter = self._counters[version]
            answered, failed, latencies = counter.answered, counter.failed, list(counter.latencies)
        ns, times = zip(*latencies, strict=True) if latencies else ((), ())
        return TrafficCounts(answered, failed, np.array(ns, np.int64), np.array(times, np.float64))

    def forget(self, version: int, kept: float = 1.0) -> None:
        """Begin again with a version, and keep a share of its latencies, so that they are of more seconds."""
        with self._lock:
            self._counters[version] = _Counter(kept)


class _Counter:
    def __init__(self, kept: float = 1.0) -> None:
        self.answered, self.failed, self.kept = 0, 0, kept
        self.latencies: deque[tuple[int, float]] = deque(maxlen=LATENCIES)  # nanoseconds, and when, in seconds


def is_failure(error: Exception | None) -> bool:
    """Return whether a request failed by what its version did, and not by what its caller did."""
    if isinstance(error, ServingError):
        return isinstance(error, Overloaded | InternalError | DeadlineExceeded)
    return error is not None
