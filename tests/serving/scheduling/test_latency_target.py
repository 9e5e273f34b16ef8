"""The latency target, told of latencies by the test."""

from __future__ import annotations

from serving.runtimes.cost import CostCurve
from serving.scheduling.latency_target import WINDOW, LatencyTarget

MS = 1e6


def test_a_goal_that_is_missed_lets_less_in_and_later_more_again() -> None:
    """Three of two hundred are too many, two are not; and never more than the target itself is let in."""
    target = LatencyTarget(100, CostCurve({1: 10 * MS, 2: 20 * MS, 4: 40 * MS, 8: 80 * MS}))
    assert (target.allowed_ns, target.batch) == (100 * MS, 4)
    for number in range(3 * WINDOW):
        target.learn((101 if number % WINDOW < 3 else 50) * MS)
    tight = target.allowed_ns
    assert tight < 75 * MS
    assert target.batch == 2
    for number in range(WINDOW):
        target.learn((101 if number < 2 else 50) * MS)
    assert tight < target.allowed_ns < 100 * MS
    for _ in range(30 * WINDOW):
        target.learn(50 * MS)
    assert target.allowed_ns == 100 * MS
