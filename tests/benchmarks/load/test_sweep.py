"""Sweeps over loads, of callers whose server keeps what it can."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.load import sweep
from benchmarks.load.arrivals import ARRIVALS
from benchmarks.load.endpoints import Endpoint, Input
from benchmarks.load.generator import ClosedLoop, Load, OpenLoop, Trace
from benchmarks.load.processes import LoadProcesses
from benchmarks.load.samples import summarize
from benchmarks.load.sweep import Point, Sweep, SweepPlan
from resnet import CheckFailed

NOWHERE = Endpoint("127.0.0.1:1", "/", (b"",), 1, Input("cats", "image", (1, 4, 4, 3), "UINT8"), "native")
CAPACITY, SERVICE = 500.0, 0.01


class FakeLoadProcesses(LoadProcesses):
    """A server that answers after 10 ms, 500 times a second at most, and refuses what would wait for over a second."""

    def __init__(self) -> None:
        """Start empty."""
        self.loads: list[Load] = []

    def run(self, load: Load, seconds: float, deadline: float | None = None) -> Trace:  # noqa: ARG002
        """Answer."""
        self.loads.append(load)
        if isinstance(load, ClosedLoop):
            rate = min(CAPACITY, load.in_flight / SERVICE)
            done = np.arange(1, rate * seconds) / rate
            due = done - load.in_flight / rate
            return Trace(due, due, done, np.zeros(len(due), int))
        due = ARRIVALS[load.arrivals](load.rate, seconds, load.seed)
        free, done, codes = 0.0, [], []
        for at in due:
            refused = free - at > 1
            free = free if refused else max(free, at) + 1 / CAPACITY
            done.append(at if refused else free + SERVICE)
            codes.append(8 if refused else 0)
        return Trace(due, due, np.array(done), np.array(codes))


def test_rates_rise_until_the_server_falls_behind() -> None:
    """The rest is left out, in later rounds too; every round has arrivals of its own."""
    processes = FakeLoadProcesses()
    points = Sweep(NOWHERE, processes, SweepPlan(seconds=4, rounds=2)).run(
        [OpenLoop(rate) for rate in (100, 400, 800, 900)], True
    )
    assert [point.load for point in points] == [OpenLoop(100), OpenLoop(400), OpenLoop(800)]
    assert processes.loads == [OpenLoop(rate, seed=seed) for seed in (0, 1) for rate in (100, 400, 800)]
    assert points[1].images_per_second == pytest.approx(400, rel=0.1)
    assert points[2].images_per_second == pytest.approx(CAPACITY, rel=0.02)
    assert points[2].failures.keys() == {"RESOURCE_EXHAUSTED"}


def test_a_latency_without_bound_is_saturation_too() -> None:
    """The server keeps the rate, but its 99th percentile is above what was allowed."""
    processes = FakeLoadProcesses()
    points = Sweep(NOWHERE, processes, SweepPlan(seconds=2, rounds=1, p99_limit_ms=5)).run(
        [OpenLoop(50), OpenLoop(100)], stop=True
    )
    assert len(points) == 1


def test_capacity_is_what_a_closed_loop_finds() -> None:
    """Its shares are loads of their own, which are measured to the last although they saturate the server."""
    running = Sweep(NOWHERE, FakeLoadProcesses(), SweepPlan(seconds=2, rounds=1))
    closed = running.run([ClosedLoop(1), ClosedLoop(32)])
    assert [point.images_per_second for point in closed] == pytest.approx([100, CAPACITY], rel=0.02)
    loads = sweep.take_shares(closed, "constant")
    assert [load.rate for load in loads if isinstance(load, OpenLoop)] == pytest.approx(
        [250, 400, 475, 1000, 2500], rel=0.02
    )
    assert len(running.run(loads)) == len(loads)


def test_a_server_without_answers_has_no_capacity() -> None:
    """There is nothing to take shares of."""
    point = Point(ClosedLoop(1), 1, [summarize(Trace(*[np.zeros(0)] * 3, np.zeros(0, int)), ClosedLoop(1), 1, 0, 1)])
    with pytest.raises(CheckFailed, match="answered nothing"):
        sweep.take_shares([point], "poisson")
    assert point.percentile(99) is None
