"""A stretch of load counts what belongs to it."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from benchmarks.load import samples
from benchmarks.load.callers import Closed, Open


def test_a_load_counts_answers_and_their_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that each call moves on by 10 ms, 100 calls of 4 images fit into a second."""
    now = 0.0

    def call(_: int) -> None:
        nonlocal now
        now += 0.01

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    sample = samples.run(call, in_flight=1, images=4, seconds=1)
    assert len(sample.latencies_ms) == pytest.approx(100, abs=1)
    np.testing.assert_allclose(sample.latencies_ms, 10)
    assert sample.images_per_second == pytest.approx(400, abs=4)


def test_a_stretch_too_short_for_an_answer_lasts_until_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """One image after two seconds is half an image per second."""
    now = 0.0

    def call(_: int) -> None:
        nonlocal now
        now += 2

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    sample = samples.run(call, in_flight=1, images=1, seconds=1)
    assert sample.latencies_ms.tolist() == [2000]
    assert sample.images_per_second == 0.5


def test_as_many_calls_as_asked_for_are_in_flight() -> None:
    """A barrier of 8 opens only if 8 threads are calling at the same time."""
    barrier = threading.Barrier(8)
    samples.run(lambda number: number < 8 and barrier.wait(10), in_flight=8, images=1, seconds=0.01)
    assert not barrier.broken


def test_a_failing_call_ends_the_load() -> None:
    """A load with failures measures nothing."""

    def call(number: int) -> None:
        raise ConnectionError(f"call {number}")

    with pytest.raises(ConnectionError, match="call"):
        samples.run(call, in_flight=2, images=1, seconds=10)


OK, REFUSED = 0, 8
TRACE = samples.Trace(
    due=np.array([0.0, 0.9, 1.2, 1.5, 1.9, 2.5]),
    sent=np.array([0.0, 0.9, 1.3, 1.5, 1.9, 2.5]),
    done=np.array([0.5, 1.1, 1.4, 1.6, 3.9, 2.6]),
    codes=np.array([OK, OK, OK, REFUSED, OK, OK]),
)


def test_a_closed_loop_counts_what_ended_in_the_stretch() -> None:
    """From 1 s to 2 s two requests of 3 images were answered, and one was refused."""
    sample = samples.sample(TRACE, Closed(1), images=3, begin=1, end=2)
    np.testing.assert_allclose(sample.latencies_ms, [200, 200])
    assert sample.images_per_second == 6
    assert sample.failures == {"RESOURCE_EXHAUSTED": 1}


def test_an_open_loop_counts_what_was_due_in_the_stretch() -> None:
    """Latencies count from then, also of the answer that came too late for the rate of the stretch."""
    sample = samples.sample(TRACE, Open(3), images=1, begin=1, end=2)
    np.testing.assert_allclose(sample.latencies_ms, [200, 2000])
    np.testing.assert_allclose(sample.late_ms, [100, 0, 0], atol=1e-9)
    assert sample.images_per_second == 2  # those due at 0.9 and 1.2
    assert sample.failures == {"RESOURCE_EXHAUSTED": 1}


def test_an_answer_after_the_deadline_is_no_good() -> None:
    """Of two answers one came within a second of when it was due."""
    sample = samples.sample(TRACE, Open(3), images=4, begin=1, end=2, deadline=1)
    assert sample.good_per_second == 4
    assert len(sample.latencies_ms) == 2
