"""The latency target, with latencies given by the test."""

from __future__ import annotations

from serving.runtimes.cost import CostCurve
from serving.scheduling.latency_target import WINDOW, LatencyTarget

MS = 1e6


def test_a_missed_target_lets_less_in_and_later_more_again() -> None:
    """Three of two hundred are too many, two are not; and never more than the target itself is let in."""
    target = LatencyTarget(100, CostCurve({1: 10 * MS, 2: 20 * MS, 4: 40 * MS, 8: 80 * MS}))
    assert (target.limit_ns, target.max_batch) == (100 * MS, 4)
    for number in range(3 * WINDOW):
        target.record((101 if number % WINDOW < 3 else 50) * MS)
    tight = target.limit_ns
    assert tight < 75 * MS
    assert target.max_batch == 2
    for number in range(WINDOW):
        target.record((101 if number < 2 else 50) * MS)
    assert tight < target.limit_ns < 100 * MS
    for _ in range(30 * WINDOW):
        target.record(50 * MS)
    assert target.limit_ns == 100 * MS
