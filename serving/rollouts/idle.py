"""Idle capacity: when a shadow may compute, so that callers hardly ever wait for it."""

from __future__ import annotations

# A request that comes while a shadow computes shares the cores with it, or waits. That happens in this part of the idle
# moments only: so rarely that the 99th percentile stays as it is. A busy server has few such moments, and no shadow
# begins while anything waits, so that its queues become no longer.
PART = 0.25
SMOOTHING = 0.02  # weight of one look; at a look a millisecond, the last tenth of a second counts
MIN_IDLE = 1e-4


class IdleCapacity:
    """Decides from looks at the server, whether it was idle, when the next batch of a shadow may be computed.

    Attributes:
        idle: Share of the recent looks at which the server was idle.
    """

    def __init__(self) -> None:
        """Begin as if the server had been busy."""
        self.idle = 0.0
        self._ended = self._spent = 0.0

    def may_compute(self, is_idle: bool, now: float) -> bool:
        """Take a look, and return whether a batch may be computed now.

        Args:
            is_idle: Whether the server has nothing else to do.
            now: The time, in seconds.
        """
        self.idle += SMOOTHING * (is_idle - self.idle)
        share = PART * max(MIN_IDLE, self.idle)
        return is_idle and now - self._ended >= self._spent * (1 / share - 1)

    def record(self, start: float, end: float) -> None:
        """Record that a batch was computed, with its times in seconds."""
        self._ended, self._spent = end, end - start
