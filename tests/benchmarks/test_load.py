"""The load generator counts what it sends."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from benchmarks import load


def test_a_load_counts_answers_and_their_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that each call moves on by 10 ms, 100 calls of 4 images fit into a second."""
    now = 0.0

    def call(_: int) -> None:
        nonlocal now
        now += 0.01

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    sample = load.run(call, in_flight=1, images=4, seconds=1)
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
    sample = load.run(call, in_flight=1, images=1, seconds=1)
    assert sample.latencies_ms.tolist() == [2000]
    assert sample.images_per_second == 0.5


def test_as_many_calls_as_asked_for_are_in_flight() -> None:
    """A barrier of 8 opens only if 8 threads are calling at the same time."""
    barrier = threading.Barrier(8)
    load.run(lambda number: number < 8 and barrier.wait(10), in_flight=8, images=1, seconds=0.01)
    assert not barrier.broken


def test_a_failing_call_ends_the_load() -> None:
    """A load with failures measures nothing."""

    def call(number: int) -> None:
        raise ConnectionError(f"call {number}")

    with pytest.raises(ConnectionError, match="call"):
        load.run(call, in_flight=2, images=1, seconds=10)
