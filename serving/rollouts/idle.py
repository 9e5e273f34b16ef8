"""Idle capacity: when a shadow may compute, so that callers hardly ever wait for it."""

from __future__ import annotations

# A request that comes while a shadow computes shares the cores with it, or waits. That happens in this part of the idle
# moments only: so rarely that the 99th percentile stays as it is.
PART = 0.25
# A busy server has few idle moments, and whatever else is computed makes its queues longer. Below this share of idle
# looks, nothing is computed.
RESERVE = 0.05
SMOOTHING = 0.02  # weight of one look: the last fifty count
MIN_SHARE = 1e-5
# Each look takes a little of the interpreter. While the server is busy, it is looked at less and less often.
FIRST_PAUSE, LAST_PAUSE, LEFT_ALONE = 0.001, 0.008, 0.032  # seconds; the last, while nothing may be computed


class IdleCapacity:
    """Decides from looks at the server, whether it was idle, when the next batch of a shadow may be computed.

    Attributes:
        idle: Share of the recent looks at which the server was idle.
        pause: Seconds until the next look.
    """

    def __init__(self, reserve: float = RESERVE) -> None:
        """Begin as if the server had been busy; compute nothing while less than `reserve` of the time is idle."""
        self.idle, self.pause, self._reserve = 0.0, FIRST_PAUSE, reserve
        self._ended = self._spent = 0.0

    def may_compute(self, is_idle: bool, now: float) -> bool:
        """Take a look, and return whether a batch may be computed now.

        Args:
            is_idle: Whether the server has nothing else to do.
            now: The time, in seconds.
        """
        self.idle += SMOOTHING * (is_idle - self.idle)
        last = LAST_PAUSE if self.idle >= self._reserve else LEFT_ALONE
        self.pause = FIRST_PAUSE if is_idle else min(2 * self.pause, last)
        share = PART * (self.idle - self._reserve)
        return is_idle and share > MIN_SHARE and now - self._ended >= self._spent * (1 / share - 1)

    def record(self, start: float, end: float) -> None:
        """Record that a batch was computed, with its times in seconds."""
        self._ended, self._spent = end, end - start
