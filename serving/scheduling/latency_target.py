"""A latency to hold: what is let in, and how large batches are, follows from what requests took."""

from __future__ import annotations

import threading

from serving.runtimes.cost import CostCurve

WINDOW = 200  # requests behind each correction: of these, two may be slower than the goal
DOWN, UP = 0.9, 1.02  # too slow is mended quickly, and room for more is tried slowly


class LatencyTarget:
    """Holds the 99th percentile of the time from arrival to answer.

    Attributes:
        allowed_ns: A request that would take longer is not to be let in.
        batch: Images that may share a call of the engine: half of the goal is for the batch, half for the one before.
    """

    def __init__(self, target_ms: float, curve: CostCurve) -> None:
        """Aim at a latency.

        Args:
            target_ms: What 99 of 100 requests are to take at most, in milliseconds.
            curve: What batches cost.
        """
        self._target_ns, self._curve = target_ms * 1e6, curve
        self.allowed_ns = self._target_ns
        self.batch = self._fit()
        self._seen = self._slow = 0
        self._lock = threading.Lock()

    def learn(self, ns: float) -> None:
        """Take in what a request has taken, and after some correct what is allowed."""
        with self._lock:
            self._seen += 1
            self._slow += ns > self._target_ns
            if self._seen < WINDOW:
                return
            factor = DOWN if self._slow > WINDOW // 100 else UP
            self.allowed_ns = min(self._target_ns, self.allowed_ns * factor)
            self.batch = self._fit()
            self._seen = self._slow = 0

    def _fit(self) -> int:
        """Return the largest batch that takes half of what is allowed."""
        size = 1
        while self._curve.ns(2 * size) <= self.allowed_ns / 2 and size < 2**16:
            size *= 2
        return size
