"""A target for the 99th percentile of the latency: measured latencies adjust what is admitted and the batch size."""

from __future__ import annotations

import threading

from serving.runtimes.cost import CostCurve

WINDOW = 200  # requests between two adjustments: two of them may be slower than the target
DECREASE, INCREASE = 0.9, 1.02  # of the limit: down quickly if requests are too slow, up slowly if they are not
MIN_SHARE = 0.1  # of the target: a limit far below it lets nothing in, and would take hours to come back


class LatencyTarget:
    """Keeps the 99th percentile of the time from arrival to response below a target.

    Attributes:
        limit_ns: Longest predicted latency of an admitted request, in nanoseconds.
        max_batch: Images in the largest batch: half of the limit is for it, half for the batch before it.
    """

    def __init__(self, target_ms: float, curve: CostCurve) -> None:
        """Begin with the target as the limit.

        Args:
            target_ms: Target of the 99th percentile, in milliseconds.
            curve: Cost of a batch by its size.
        """
        self._target_ns, self._curve = target_ms * 1e6, curve
        self.limit_ns = self._target_ns
        self.max_batch = self._find_max_batch()
        self._requests = self._slow = 0
        self._lock = threading.Lock()

    def record(self, latency_ns: float) -> None:
        """Count a request by its latency, in nanoseconds, and adjust the limit at the end of each window."""
        with self._lock:
            self._requests += 1
            self._slow += latency_ns > self._target_ns
            if self._requests < WINDOW:
                return
            factor = DECREASE if self._slow > WINDOW // 100 else INCREASE
            self.limit_ns = min(max(self.limit_ns * factor, MIN_SHARE * self._target_ns), self._target_ns)
            self.max_batch = self._find_max_batch()
            self._requests = self._slow = 0

    def _find_max_batch(self) -> int:
        """Return the largest batch that takes at most half of the limit, a power of two."""
        size = 1
        while self._curve.ns(2 * size) <= self.limit_ns / 2 and size < 2**16:
            size *= 2
        return size
