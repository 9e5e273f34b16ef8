"""A clock and threads for the batcher."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the time in nanoseconds, which stands still unless the test changes it."""
    now = [time.perf_counter_ns()]
    monkeypatch.setattr(time, "perf_counter_ns", lambda: now[0])
    return now


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Threads for requests."""
    with ThreadPoolExecutor(16) as threads:
        yield threads
