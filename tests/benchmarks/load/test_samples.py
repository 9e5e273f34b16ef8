"""A stretch of load counts what belongs to it."""

from __future__ import annotations

import numpy as np

from benchmarks.load.generator import NOT_SENT, ClosedLoop, OpenLoop, Trace
from benchmarks.load.samples import summarize

OK, REFUSED = 0, 8
TRACE = Trace(
    due=np.array([0.0, 0.9, 1.2, 1.5, 1.9, 2.5]),
    sent=np.array([0.0, 0.9, 1.3, 1.5, 1.9, 2.5]),
    done=np.array([0.5, 1.1, 1.4, 1.6, 3.9, 2.6]),
    codes=np.array([OK, OK, OK, REFUSED, OK, OK]),
)


def test_a_closed_loop_counts_what_ended_in_the_stretch() -> None:
    """From 1 s to 2 s two requests of 3 images were answered, and one was refused."""
    sample = summarize(TRACE, ClosedLoop(1), images=3, begin=1, end=2)
    np.testing.assert_allclose(sample.latencies_ms, [200, 200])
    assert sample.images_per_second == 6
    assert sample.failures == {"RESOURCE_EXHAUSTED": 1}


def test_an_open_loop_counts_what_was_due_in_the_stretch() -> None:
    """Latencies count from then, also of the answer that came too late for the rate of the stretch."""
    sample = summarize(TRACE, OpenLoop(3), images=1, begin=1, end=2)
    np.testing.assert_allclose(sample.latencies_ms, [200, 2000])
    np.testing.assert_allclose(sample.late_ms, [100, 0, 0], atol=1e-9)
    assert sample.images_per_second == 2  # those due at 0.9 and 1.2
    assert sample.failures == {"RESOURCE_EXHAUSTED": 1}


def test_without_a_deadline_an_answer_after_the_stretch_is_not_in_time() -> None:
    """Of two answers one came within it: goodput is never more than what was answered."""
    sample = summarize(TRACE, OpenLoop(3), images=4, begin=1, end=2)
    assert sample.good_per_second == 4


def test_what_was_not_sent_is_missed() -> None:
    """It counts with the failures, under its own name."""
    sample = summarize(TRACE._replace(codes=np.full(6, NOT_SENT)), OpenLoop(3), images=1, begin=1, end=2)
    assert sample.failures == {"NOT_SENT": 3}
    assert sample.good_per_second == sample.images_per_second == 0


def test_an_answer_after_the_deadline_is_no_good() -> None:
    """Of two answers one came within a second of when it was due."""
    sample = summarize(TRACE, OpenLoop(3), images=4, begin=1, end=2, deadline=1)
    assert sample.good_per_second == 4
    assert len(sample.latencies_ms) == 2
