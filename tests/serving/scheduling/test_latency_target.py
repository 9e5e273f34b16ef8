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


def test_a_bad_hour_does_not_close_the_server() -> None:
    """However long all requests are too slow, a tenth of the target is let in, and some windows later all of it."""
    target = LatencyTarget(100, CostCurve({1: 10 * MS}))
    for _ in range(100 * WINDOW):
        target.record(10_000 * MS)
    assert target.limit_ns == 10 * MS
    for _ in range(120 * WINDOW):
        target.record(50 * MS)
    assert target.limit_ns == 100 * MS
